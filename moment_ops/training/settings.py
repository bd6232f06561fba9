"""The settings that all methods share. Each is an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

import moment_ops as mo
from moment_ops.training import generators, judges
from moment_ops.training.data import SIZES


def option(default: Any, help: str, **keywords: Any) -> Any:
    """A setting that is an option of the command line, with the same name."""
    return field(default=default, metadata={"help": help, **keywords})


DATA_HELP = (
    "mnist; cifar10, cifar100, fashion-mnist or stl10 with their files in the folder data; a folder with such files or"
    " with images; a .npz or .npy file of uint8 images"
)
SECONDS_HELP = "time limit in seconds, which the schedule of the learning rate follows; none if only --steps is given"
WEIGHT_AVERAGE_HELP = "decay of the moving average of the generator's weights, from which samples are drawn"
EVALUATE_HELP = "steps between evaluations, which compute the Frechet distance and draw samples"


SCHEDULES = ("linear", "constant")
AUTOCAST = ("none", "bfloat16", "float16")


@dataclass(frozen=True)
class LoopSettings:
    """Settings of all methods."""

    method: ClassVar[str]

    data: str = option("mnist", DATA_HELP)
    size: int = option(32, "height and width of the images in pixels", choices=SIZES)
    generator: str = option("dcgan", f"generator: {generators.EXPECTED}", metavar="NAME")
    steps: int = option(3000, "training steps")
    seconds: float = option(140.0, SECONDS_HELP)
    batch_size: int = option(32, "generated images per step")
    lr: float = option(2e-3, "learning rate of the generator")
    schedule: str = option(
        "linear",
        "schedule of the learning rates: linear from half of the training on, down to a fiftieth, or constant",
        choices=SCHEDULES,
    )
    betas: tuple[float, float] = (0.5, 0.999)
    weight_average: float = option(0.999, WEIGHT_AVERAGE_HELP)
    latent_size: int = option(64, "length of the latent vectors")
    judge: str = option(
        judges.AUTO,
        "network in whose features samples are judged, never one that is matched; auto is the digit classifier for"
        " mnist, and EfficientNet-Lite2 for other data, or Lite1 where Lite2 is matched;"
        f" {judges.EXPECTED}",
    )
    judge_weights: str = option("", "file with the weights of the judge, for inception and timm:NAME", metavar="FILE")
    seed: int = option(0, "seed of all random numbers")
    amp: str = option(
        "none",
        "dtype of autocast for the networks; with float16 the loss is scaled so that gradients do not underflow",
        choices=AUTOCAST,
    )
    channels_last: bool = option(False, "store feature maps with channels innermost, which convolutions may prefer")
    compile: bool = option(False, "compile the generator, and networks whose features are matched, in the first steps")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    evaluate_every: int = option(300, EVALUATE_HELP)
    checkpoint_every: int = option(300, "steps between checkpoints")
    keep_checkpoints: int = option(3, "number of checkpoints that are kept, the last ones")

    def __post_init__(self) -> None:
        positive = ("steps", "latent_size", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size}, expected one of {', '.join(map(str, SIZES))}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 2 images, for a variance")
        for name in ("seconds", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")
        for name, choices in (("amp", AUTOCAST), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        generators.check_name(self.generator)
        judges.check_name(self.judge)
        if not 0 <= self.weight_average < 1:
            raise ValueError(f"weight_average: got {self.weight_average}, expected a number in [0, 1)")

    def make_generator(self, channels: int) -> nn.Module:
        """The generator with initial weights."""
        return generators.make(self.generator, channels, self.latent_size, self.size)


@dataclass(frozen=True)
class MatchingSettings(LoopSettings):
    """Settings of methods that match moments through a running average."""

    average: str = option("adam", "running average of the moments", choices=("adam", "moving", "none"))
    average_lr: float = option(1e-3, "learning rate of the average 'adam'")
    average_reduction: str = option(
        "sum",
        "scale of the gradients that the average 'adam' sees, and with it the meaning of its eps: the sum over all"
        " features, or their mean as in the released code of GFMN",
        choices=("sum", "mean"),
    )
    decay: float = option(0.99, "decay of the average 'moving', the weight of its previous value")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_average()

    def make_average(self) -> mo.AdamMovingAverage | mo.MovingAverage | None:
        if self.average == "adam":
            return mo.AdamMovingAverage(lr=self.average_lr, betas=(0.5, 0.999), reduction=self.average_reduction)
        if self.average == "moving":
            return mo.MovingAverage(self.decay)
        if self.average == "none":
            return None
        raise ValueError(f"average: got {self.average!r}, expected 'adam', 'moving' or 'none'")
