"""Generators by name."""

import math
import sys

import pytest
import torch
from torch import nn

from moment_ops.training import data, generators, gfmn, runs
from moment_ops.training.command_line import main
from moment_ops.training.errors import TrainingError

TINY = {"steps": 2, "seconds": math.inf, "batch_size": 2, "latent_size": 4, "evaluate_every": 100, "judge": "digits"}


def factory(channels, latent_size, image_size):
    return nn.Sequential(
        nn.Linear(latent_size, channels * image_size**2), nn.Unflatten(1, (channels, image_size, image_size)), nn.Tanh()
    )


@pytest.mark.parametrize("size", data.SIZES)
@pytest.mark.parametrize("name", ["dcgan", "gfmn-dcgan", "gfmn-resnet", "molm-dcgan"])
def test_images_have_the_size_and_the_range_of_the_data(name, size):
    with torch.no_grad():
        images = generators.make(name, 3, 5, size)(torch.randn(2, 5))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [("gfmn-dcgan", 32, 1.14), ("gfmn-dcgan", 64, 3.65), ("gfmn-resnet", 32, 3.32), ("gfmn-resnet", 64, 11.7)],
)
def test_generators_of_the_paper_have_its_numbers_of_weights(name, size, millions):
    weights = sum(p.numel() for p in generators.make(name, 3, 100, size).parameters())
    assert weights / 1e6 == pytest.approx(millions, rel=5e-3)


def test_a_run_with_a_generator_of_the_user_is_trained_continued_and_sampled(pictures, tmp_path, extractor_path):
    run = tmp_path / "run"
    files = {"extractor_files": [extractor_path], "say": lambda line: None}
    gfmn.train(run, {"data": str(pictures), "extractor_iterations": 2, **TINY}, generator=factory, **files)
    gfmn.train(run, {"steps": 3}, resume=True, **files)
    state = runs.load_checkpoint(run)
    assert state["settings"]["generator"] == f"{__name__}:factory"
    assert state["trainer"]["step"] == 3
    assert main(["sample", f"--run-dir={run}", f"--output={tmp_path / 'samples.png'}", "--device=cpu"]) == 0


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (nn.Linear(4, 4), r"--generator: .* makes \(2, 4\) of 2 latent vectors, expected \(2, 1, 32, 32\)"),
        (3, "--generator: got int from .*, expected a torch.nn.Module"),
    ],
)
def test_what_makes_no_images_is_an_error(made, message):
    name = generators.name_of(lambda *given: made)
    with pytest.raises(TrainingError, match=message):
        generators.make(name, 1, 4, 32)


def test_names_that_do_not_exist_are_errors():
    with pytest.raises(ValueError, match="generator: got 'gan', expected dcgan, gfmn-dcgan, gfmn-resnet"):
        gfmn.Settings(generator="gan")
    with pytest.raises(TrainingError, match="no_such_module:make: no module named 'no_such_module'"):
        generators.make("no_such_module:make", 1, 4, 32)
    assert "no_such_module" not in sys.modules
