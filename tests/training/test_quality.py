"""Measures of samples, against their definitions and known cases."""

import pytest
import torch

from moment_ops.training import quality


def features(count, seed, shift=0.0, scale=1.0, columns=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) * scale + shift


def test_the_kernel_distance_is_its_definition_over_pairs():
    x, y = features(5, 0).double(), features(7, 1, 0.5).double()

    def kernel(a, b):
        return (a @ b / 6 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    across = sum(kernel(a, b) for a in x for b in y) / 35
    assert quality.kernel_distance(x, y) == pytest.approx(float(within_x + within_y - 2 * across), rel=1e-10)


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average_and_grows_with_the_shift():
    same = [quality.kernel_distance(features(200, seed), features(200, 1000 + seed)) for seed in range(40)]
    error = torch.tensor(same).std() / 40**0.5
    assert abs(sum(same) / 40) < 4 * error
    assert quality.kernel_distance(features(200, 0), features(200, 1, 0.5)) > 10 * max(same)


def test_precision_and_recall_of_samples_of_the_same_distribution_are_high_and_equal():
    precision, recall = quality.precision_recall(features(500, 0), features(500, 1))
    assert precision > 0.75
    assert abs(precision - recall) < 0.1


def test_samples_of_a_part_have_precision_without_recall_and_spread_ones_recall_without_precision():
    real = features(500, 0)
    precision, recall = quality.precision_recall(features(500, 1, scale=0.3), real)
    assert precision > 0.95 > 0.5 > recall
    precision, recall = quality.precision_recall(features(500, 1, scale=4.0), real)
    assert recall > 0.95 > 0.5 > precision


def test_precision_is_the_share_within_the_radius_of_a_real_image():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    # Radii to the third neighbour: 3, 2, 2, 3, 9. The balls cover -3 to 19.
    samples = torch.tensor([[-2.9], [-3.1], [18.9], [19.1]])
    assert quality.precision_recall(samples, real)[0] == 0.5


@pytest.mark.parametrize(("size", "scales"), [(32, 2), (64, 3), (128, 4)])
def test_ms_ssim_is_1_for_equal_images_and_falls_with_noise(size, scales):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, size, size, generator=generator) * 2 - 1
    torch.testing.assert_close(quality.ms_ssim(images, images, scales), torch.ones(3))
    noise = torch.randn(images.shape, generator=generator)
    little, much = (quality.ms_ssim(images, (images + s * noise).clamp(-1, 1), scales) for s in (0.1, 1.0))
    assert (little < 1).all()
    assert (much < little).all()


def test_one_scale_of_ms_ssim_is_ssim_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 1, 11, 11, generator=generator, dtype=torch.float64) * 2 - 1
    value = quality.ms_ssim(x, y, 1)
    axis = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    window = window / window.sum()
    a, b = (x[0, 0] + 1) / 2, (y[0, 0] + 1) / 2
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    cov = (window * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert float(value) == pytest.approx(float(expected.clamp_min(0)), rel=1e-9)


def test_similarity_is_1_without_diversity():
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    assert quality.similarity(image.expand(6, -1, -1, -1)) == pytest.approx(1)
    assert quality.similarity(torch.rand(6, 1, 32, 32) * 2 - 1) < 0.3
