"""The demo's networks."""

import pytest
import torch

from moment_ops.training.networks import Classifier, Generator, freeze
from moment_ops.training.trainer import average_weights


@pytest.mark.parametrize("size", [8, 32, 64, 128])
def test_the_generator_makes_images_in_range(size):
    images = Generator(width=4, image_size=size)(torch.randn(3, 64))
    assert images.shape == (3, 1, size, size)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("size", [4, 48, 96])
def test_a_size_that_is_no_power_of_two_is_an_error(size):
    with pytest.raises(ValueError, match=f"image_size: got {size}, expected a power of two from 8 on"):
        Generator(image_size=size)


def test_the_extractor_has_six_layers_with_43008_features():
    features = Classifier().features(torch.zeros(2, 1, 32, 32))
    assert len(features) == 6
    assert sum(layer[0].numel() for layer in features) == 43_008


def test_a_frozen_extractor_passes_gradients_to_the_images_only():
    extractor = freeze(Classifier())
    images = torch.randn(2, 1, 32, 32, requires_grad=True)
    extractor(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(value.grad is None for value in extractor.parameters())


def test_the_averaged_weights_are_a_moving_average_once_warmed_up():
    averaged, network = Generator(latent_size=8), Generator(latent_size=8)
    old, new = averaged.project.weight.clone(), network.project.weight
    average_weights(averaged, network, decay=0.75, step=1000)
    torch.testing.assert_close(averaged.project.weight, 0.75 * old + 0.25 * new)
