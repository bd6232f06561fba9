"""GFMN: train a generator until the features of its images have the moments of the data's features."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import moment_ops as mo
from moment_ops.training import checkpoints, classifiers, runs
from moment_ops.training.data import ImageData, load, scale
from moment_ops.training.evaluator import Evaluator
from moment_ops.training.loop import train as train_generator
from moment_ops.training.networks import Classifier, Generator, freeze
from moment_ops.training.settings import LoopSettings, option
from moment_ops.training.trainer import Trainer

TARGET = "target.npz"
EXTRACTOR_SECONDS = 60.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings(LoopSettings):
    """What GFMN can be told besides."""

    method: ClassVar[str] = "gfmn"

    average: str = option("adam", "running average of the moments", choices=("adam", "moving", "none"))
    average_lr: float = option(1e-3, "learning rate of the Adam moving average")
    decay: float = option(0.99, "weight of the past in the plain moving average")
    mean_weight: float = option(1.0, "weight of the means in the loss")
    var_weight: float = option(1.0, "weight of the variances in the loss")
    extractor_iterations: int = option(640, "training steps of the extractor, when there is none yet")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor_iterations < 1:
            raise ValueError(f"extractor_iterations must be at least 1, got {self.extractor_iterations}")
        self.make_average()

    def make_average(self) -> mo.AdamMovingAverage | mo.MovingAverage | None:
        if self.average == "adam":
            return mo.AdamMovingAverage(lr=self.average_lr, betas=(0.5, 0.999), reduction="sum")
        if self.average == "moving":
            return mo.MovingAverage(self.decay)
        if self.average == "none":
            return None
        raise ValueError(f"average must be adam, moving or none, got {self.average}")


class Objective(nn.Module):
    """The matching loss of generated images: a frozen extractor and a ``MomentLoss`` on its moments."""

    def __init__(self, extractor: mo.MomentExtractor, target: mo.Moments, settings: Settings) -> None:
        super().__init__()
        self.extractor = extractor
        self.moment_loss = mo.MomentLoss(
            target,
            settings.make_average(),
            mean_weight=settings.mean_weight,
            var_weight=settings.var_weight,
            # A mean over all features would bring the gradients near the eps of the generator's optimizer.
            reduction="sum",
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.moment_loss(self.extractor(images))


def fingerprint(data: ImageData) -> str:
    """Tells data sets apart, so that an extractor is not reused for another one of the same name."""
    digest = hashlib.sha256(data.train.cpu().numpy().tobytes())
    if data.train_labels is not None:
        digest.update(data.train_labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_or_train_extractor(
    data: ImageData, path: Path, *, iterations: int = Settings.extractor_iterations, say: Say = print
) -> Classifier:
    """The frozen classifier whose features are matched; trained at first use and kept at ``path``.

    It learns the labels of ``data``, or, where there are none, to tell how an image was turned.
    """
    images, labels = data.train, data.train_labels
    held_out, held_out_labels = data.held_out, data.held_out_labels
    if labels is None or held_out_labels is None:
        images, labels = classifiers.rotation_task(images)
        held_out, held_out_labels = classifiers.rotation_task(held_out)
    classes = int(torch.cat([labels, held_out_labels]).max()) + 1
    data_fingerprint = fingerprint(data)

    if path.exists():
        state = checkpoints.load(path, "feature extractor")
        if state["data"] == data_fingerprint:
            return restore_extractor(state["network"], data.train.device)
        say(f"{path} was trained on other data")
    torch.manual_seed(0)
    extractor = Classifier(data.channels, classes).to(data.train.device)
    classifiers.train_classifier(
        extractor,
        images,
        labels,
        iterations=iterations,
        strength=0.5,
        seconds=EXTRACTOR_SECONDS,
        description="extractor",
    )
    share = classifiers.accuracy(extractor, held_out, held_out_labels)
    state = {"network": extractor.state_dict(), "data": data_fingerprint}
    checkpoints.save(path, "feature extractor", state)
    say(f"extractor: {share:.1%} of the held-out images right; kept in {path}")
    return freeze(extractor)


def restore_extractor(state: dict[str, Tensor], device: torch.device) -> Classifier:
    """The frozen classifier that a state dict came from."""
    channels, classes = state["blocks.0.0.weight"].shape[1], state["head.weight"].shape[0]
    extractor = Classifier(channels, classes)
    extractor.load_state_dict(state)
    return freeze(extractor).to(device)


def target_moments(data: ImageData, extractor: mo.MomentExtractor, *, batch_size: int = 250) -> mo.Moments:
    """Moments of the extractor's features over all training images."""

    def moments(images: Tensor) -> mo.Moments:
        return extractor(scale(images))

    return mo.dataset_moments(moments, data.train.split(batch_size), progress=sys.stderr.isatty())


def new_trainer(data: ImageData, extractor: mo.MomentExtractor, target: mo.Moments, settings: Settings) -> Trainer:
    torch.manual_seed(settings.seed)
    device = data.train.device
    generator = Generator(data.channels, settings.latent_size).to(device)
    return Trainer(generator, Objective(extractor, target, settings).to(device), settings)


def resumed_trainer(state: dict[str, Any], data: ImageData, settings: Settings) -> Trainer:
    """The trainer of a checkpoint, which needs no file besides: extractor and targets are in it."""
    extractor = mo.MomentExtractor(Classifier(data.channels)).to(data.train.device)
    with torch.no_grad():
        placeholder = extractor(scale(data.train[:2]))
    trainer = new_trainer(data, extractor, placeholder, settings)
    trainer.load_state_dict(state["trainer"])
    return trainer


def train(
    run: Path,
    given: dict[str, Any],
    *,
    resume: bool = False,
    extractor_path: Path | None = None,
    device: torch.device | str = "cpu",
    say: Say = print,
) -> tuple[float, float]:
    """Train into the folder ``run``; the Frechet distances reached and of held-out real images.

    ``given``: settings that are not the defaults, or, for a run that is continued, not its own.
    """
    device = torch.device(device)
    if resume:
        state = runs.load_checkpoint(run)
        settings = Settings(**runs.continued_settings(state, Settings.method, given))
        data = load(settings.data).to(device)
        evaluator = Evaluator(data)
        trainer = resumed_trainer(state, data, settings)
        say(f"continuing {run} at step {trainer.step}")
    else:
        settings = Settings(**given)
        data = load(settings.data).to(device)
        earlier = runs.start_run(run, settings)
        if earlier is not None:
            say(f"the earlier run is kept in {earlier}")
        extractor_path = extractor_path or run.parent / f"extractor-{data.name}.pt"
        classifier = load_or_train_extractor(data, extractor_path, iterations=settings.extractor_iterations, say=say)
        extractor = mo.MomentExtractor(classifier)
        target = target_moments(data, extractor)
        target.save(run / TARGET)
        evaluator = Evaluator(data)
        trainer = new_trainer(data, extractor, target, settings)
    return train_generator(trainer, run, evaluator, say=say), evaluator.held_out_distance
