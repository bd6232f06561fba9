"""MoLM: a generator matches moments of a network that learns, between rounds, to tell its images from real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import moment_ops as mo
from moment_ops.losses.weights import weight_number
from moment_ops.moment_network import PENALTIES
from moment_ops.training import processes
from moment_ops.training.data import Batches, ImageData, scale
from moment_ops.training.errors import TrainingError
from moment_ops.training.evaluator import Quality
from moment_ops.training.finite import adam, step_if_finite
from moment_ops.training.generators import Factory
from moment_ops.training.loop import run_method
from moment_ops.training.moment_networks import ConvMomentNetwork, SmallMomentNetwork
from moment_ops.training.settings import (
    EVALUATE_HELP,
    SECONDS_HELP,
    WEIGHT_AVERAGE_HELP,
    MatchingSettings,
    option,
)
from moment_ops.training.trainer import RESEED, Trainer

NETWORKS = {"small": SmallMomentNetwork, "conv": ConvMomentNetwork}
RESCALING_IMAGES = 256
DATA_BATCH_SIZE = 250


@dataclass(frozen=True)
class Settings(MatchingSettings):
    """The settings of MoLM. The defaults train digits in minutes on two CPU cores.

    The published rounds have 100 steps of the moment network and 2000 of the generator, and use no average.
    """

    method: ClassVar[str] = "molm"

    steps: int = option(7500, "training steps of the generator")
    seconds: float = option(320.0, SECONDS_HELP)
    weight_average: float = option(0.99, WEIGHT_AVERAGE_HELP)
    evaluate_every: int = option(500, EVALUATE_HELP)
    checkpoint_every: int = option(500, "steps between checkpoints")

    network: str = option(
        "small", "moment network: small has three convolutions, conv the six published", choices=tuple(NETWORKS)
    )
    width: int = option(32, "channels of the moment network's first convolution; 128 to 384 as published, with conv")
    moment_lr: float = option(5e-4, "learning rate of the moment network, which follows the generator's schedule")
    first_moment_steps: int = option(100, "steps of the moment network before the first round")
    moment_steps: int = option(20, "steps of the moment network before each later round")
    generator_steps: int = option(80, "steps of the generator per round")
    real_images: int = option(2000, "real images per round, drawn anew, whose moments are the target")
    penalty: str = option(
        "alternating", "batches on which the norm of the moment network's gradient is penalised", choices=PENALTIES
    )
    penalty_weight: float = option(3e-3, "weight of the penalty; if it is too large, the moment network does not learn")
    squared_norm: float = option(1.0, "squared norm of the gradient that has no penalty, and that f is rescaled to")
    hidden_weight: float = option(0.1, "weight of the hidden units in the matching loss")
    gradient_weight: float = option(1.0, "weight of the parameter gradients in the matching loss")
    input_weight: float = option(0.1, "weight of the images themselves in the matching loss")
    average_lr: float = option(5e-3, "learning rate of the average 'adam'")
    decay: float = option(0.9, "decay of the average 'moving', the weight of its previous value")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "first_moment_steps", "moment_steps", "generator_steps", "real_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("moment_lr", "squared_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")
        for name in ("penalty_weight", "hidden_weight", "gradient_weight", "input_weight"):
            weight_number(getattr(self, name), name)
        for name, choices in (("network", tuple(NETWORKS)), ("penalty", PENALTIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}")

    def make_network(self, channels: int) -> mo.MomentNetwork:
        weights = {"hidden": self.hidden_weight, "gradient": self.gradient_weight, "input": self.input_weight}
        return mo.MomentNetwork(NETWORKS[self.network](channels, self.size, self.width), weights=weights)


class Matching(nn.Module):
    """The matching loss of generated images. Its moment network is trained before every round.

    A round is ``generator_steps`` calls. Before the first call of a round, the moment network is trained to tell the
    generator's images from real ones, the target moments are computed again, and the running average restarts.
    """

    def __init__(self, net: mo.MomentNetwork, generator: nn.Module, data: ImageData, settings: Settings) -> None:
        super().__init__()
        self.net, self.settings = net, settings
        images, self.device = data.train, data.device
        # In a tuple, so that its weights do not become parameters of this module.
        self.generator, self.images = (generator,), images
        self.optimizer = adam(net.parameters(), settings.moment_lr, settings.betas)
        self.batches = Batches(len(images), settings.batch_size, settings.seed)
        self.chosen = Batches(len(images), min(settings.real_images, len(images)), settings.seed + 1)
        self.noise = torch.Generator().manual_seed(settings.seed + 1)
        self.lr = settings.moment_lr
        self.steps, self.rounds = 0, 0
        self.parts: dict[str, Tensor] = {}
        # A target of a few images, which is replaced before the first round or by a loaded state.
        target = net.moments(scale(images[:2], self.device))
        self.moment_loss = mo.MomentLoss(
            target, settings.make_average(), mean_weight=net.mean_weight(target), reduction="sum"
        )

    def forward(self, images: Tensor) -> Tensor:
        if self.steps % self.settings.generator_steps == 0:
            self.begin_round()
        self.steps += 1
        return self.moment_loss(self.net.moments(images))

    def begin_round(self) -> None:
        for _ in range(self.settings.moment_steps if self.rounds else self.settings.first_moment_steps):
            self.train_network()
        try:
            self.moment_loss.reset(self.data_moments())
        except ValueError as error:
            raise TrainingError(
                f"the moments of the data are non-finite at step {self.steps}; try a lower --moment-lr"
            ) from error
        self.rounds += 1

    def train_network(self) -> None:
        """One step of the moment network."""
        settings, device = self.settings, self.device
        (generator,) = self.generator
        latent = torch.randn(settings.batch_size, settings.latent_size, generator=self.noise)
        own = processes.own_rows(settings.batch_size)
        with torch.no_grad():
            generated = generator(latent[own].to(device))
        chosen = next(self.batches)[processes.own_rows(self.batches.batch_size)]
        parts = self.net.objective_parts(
            scale(self.images[chosen], device),
            generated,
            penalty=settings.penalty,
            penalty_weight=settings.penalty_weight,
            squared_norm=settings.squared_norm,
            process_group=None,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        with torch.autocast(device.type, enabled=False):
            parts.loss.backward()
        processes.average_gradients(self.net.parameters())
        step_if_finite(self.optimizer)
        self.parts = {name: value for name, value in parts._asdict().items() if name != "loss"}

    def data_moments(self) -> mo.Moments:
        """The moments of real images, which are drawn from the data."""
        chosen = next(self.chosen)
        images = self.images[chosen[processes.own_rows(len(chosen))]]
        batches = (scale(part, self.device) for part in images.split(DATA_BATCH_SIZE))
        return processes.merged(mo.dataset_moments(self.net.moments, batches))

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "chosen": self.chosen.state_dict(),
            "noise": self.noise.get_state(),
            "steps": self.steps,
            "rounds": self.rounds,
            "parts": self.parts,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.chosen.load_state_dict(state["chosen"])
        self.noise.set_state(state["noise"])
        self.steps, self.rounds = state["steps"], state["rounds"]
        self.parts = dict(state["parts"])


class MolmTrainer(Trainer):
    """A trainer whose moment network follows the generator's schedule."""

    matching: Matching

    def advance(self) -> Tensor:
        self.matching.lr = self.matching.settings.moment_lr * self.lr / self.settings.lr
        return super().advance()

    def reseed(self) -> None:
        super().reseed()
        matching, seed = self.matching, self.settings.seed + RESEED * self.returns
        for generator in (matching.noise, matching.batches.generator, matching.chosen.generator):
            seed += 1
            generator.manual_seed(seed)

    def metrics(self) -> dict[str, float]:
        """The number of rounds, and the objective of the moment network in its last step."""
        parts = {f"moment_{name}": value.item() for name, value in self.matching.parts.items()}
        return {"round": self.matching.rounds, **parts}


def new_trainer(data: ImageData, settings: Settings) -> MolmTrainer:
    torch.manual_seed(settings.seed)
    device = data.device
    generator = settings.make_generator(data.channels).to(device)
    net = settings.make_network(data.channels).to(device)
    try:
        net.rescale(scale(data.train[:RESCALING_IMAGES], device), settings.squared_norm)
    except ValueError as error:
        raise TrainingError(f"the moment network cannot be rescaled to this data: {error}") from error
    return MolmTrainer(generator, Matching(net, generator, data, settings), settings)


def resumed_trainer(state: dict[str, Any], data: ImageData, settings: Settings) -> MolmTrainer:
    """The trainer of a checkpoint."""
    trainer = new_trainer(data, settings)
    trainer.load_state_dict(state["trainer"])
    return trainer


def train(
    run: Path | str,
    given: dict[str, Any],
    *,
    data: Any = None,
    generator: Factory | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> Quality | None:
    """Train in the folder ``run``. Arguments and results are those of ``run_method``."""
    return run_method(
        Path(run),
        Settings,
        given,
        resume=resume,
        device=device,
        say=say,
        new=new_trainer,
        resumed=resumed_trainer,
        data=data,
        generator=generator,
    )
