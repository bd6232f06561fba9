"""The settings that every method shares; the command line offers each as an option."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import moment_ops as mo


def option(default: Any, help: str, **keywords: Any) -> Any:
    """A setting that the command line offers under the same name."""
    return field(default=default, metadata={"help": help, **keywords})


@dataclass(frozen=True)
class LoopSettings:
    """What every method can be told.

    The learning rate is constant for the first half of the training and then falls linearly to 2 %.
    """

    method: ClassVar[str]

    data: str = option("mnist", "mnist, or a folder of png and jpg images")
    steps: int = option(3000, "training steps")
    seconds: float = option(140.0, "end after this time, schedule and all; no limit when only --steps is given")
    batch_size: int = option(32, "generated images a step")
    lr: float = option(2e-3, "learning rate of the generator")
    betas: tuple[float, float] = (0.5, 0.999)
    weight_average: float = option(0.999, "decay of the averaged generator, the one that is sampled")
    latent_size: int = option(64, "length of the latent vectors")
    seed: int = option(0, "seed of everything random")
    amp: bool = option(False, "run the networks in bfloat16")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    evaluate_every: int = option(300, "steps between Frechet distances and sample grids")
    checkpoint_every: int = option(300, "steps between checkpoints")

    def __post_init__(self) -> None:
        for name in ("steps", "latent_size", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (a variance needs two images), got {self.batch_size}")
        for name in ("seconds", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.weight_average < 1:
            raise ValueError(f"weight_average must be in [0, 1), got {self.weight_average}")


@dataclass(frozen=True)
class MatchingSettings(LoopSettings):
    """What methods can be told that match moments through a running average."""

    average: str = option("adam", "running average of the moments", choices=("adam", "moving", "none"))
    average_lr: float = option(1e-3, "learning rate of the Adam moving average")
    decay: float = option(0.99, "weight of the past in the plain moving average")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_average()

    def make_average(self) -> mo.AdamMovingAverage | mo.MovingAverage | None:
        if self.average == "adam":
            return mo.AdamMovingAverage(lr=self.average_lr, betas=(0.5, 0.999), reduction="sum")
        if self.average == "moving":
            return mo.MovingAverage(self.decay)
        if self.average == "none":
            return None
        raise ValueError(f"average must be adam, moving or none, got {self.average}")
