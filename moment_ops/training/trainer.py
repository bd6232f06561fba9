"""The state of a training, and one step of it, for all methods."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moment_ops.training import processes
from moment_ops.training.data import unscale
from moment_ops.training.evaluator import sample
from moment_ops.training.finite import adam, restore_if, step_if_finite
from moment_ops.training.networks import freeze
from moment_ops.training.settings import LoopSettings

SNAPSHOT_IMAGES = 16
SNAPSHOT_SEED = 0
RESEED = 1_000_003


class Trainer:
    """Everything that changes during training.

    Args:
        matching: maps generated images to a scalar loss, and is called once per step. It may train networks of its own.
            All of its state must be in its ``state_dict``.
    """

    def __init__(self, generator: nn.Module, matching: nn.Module, settings: LoopSettings) -> None:
        if settings.channels_last:
            for network in (generator, matching):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.generator = generator
        self.averaged = freeze(copy.deepcopy(generator))
        self.matching = matching
        self.settings = settings
        if settings.compile:
            # In place: the names of weights stay as they are.
            generator.compile()
        self.optimizer = adam(generator.parameters(), settings.lr, settings.betas)
        self.noise = torch.Generator().manual_seed(settings.seed)
        self.device = next(generator.parameters()).device
        self.forward: nn.Module = generator
        self.autocast = None if settings.amp == "none" else getattr(torch, settings.amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "float16")
        # Steps with non-finite gradients, in all and in a row, counted on the device.
        self.skipped = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.returns = 0
        self.step = 0
        self.elapsed = 0.0
        self.snapshots: dict[int, Tensor] = {}

    def distribute(self) -> None:
        """Train on the rows of all processes from now on. Without other processes it does nothing."""
        if processes.size() == 1:
            return
        from torch.nn.parallel import DistributedDataParallel

        from moment_ops.training.batch_norm import merge_batch_norm

        devices = None if self.device.type == "cpu" else [self.device]
        # Running statistics are the same on all processes already.
        self.forward = DistributedDataParallel(merge_batch_norm(self.generator), devices, broadcast_buffers=False)

    @property
    def progress(self) -> float:
        """The share of the training that is done, from 0 to 1."""
        return min(1.0, max(self.step / self.settings.steps, self.elapsed / self.settings.seconds))

    @property
    def lr(self) -> float:
        """The learning rate. A linear schedule is constant for the first half of the training, and ends at 2 %."""
        if self.settings.schedule == "constant":
            return self.settings.lr
        return self.settings.lr * min(1.0, 1 - 0.98 * (2 * self.progress - 1))

    def advance(self) -> Tensor:
        """Take one step, and return the loss of the whole batch, detached and on the device.

        A step whose gradients are non-finite is skipped: only the step of the schedule advances.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.generator.train()
        latent = torch.randn(self.settings.batch_size, self.settings.latent_size, generator=self.noise)
        statistics = list(self.generator.buffers())
        earlier = [value.clone() for value in statistics]
        latent = latent[processes.own_rows(len(latent))]
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.matching(self.forward(latent.to(self.device)))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        skipped = step_if_finite(self.optimizer)
        self.scaler.update()
        restore_if(skipped, statistics, earlier)
        self.skipped.add_(skipped.long())
        self.skipped[1] *= skipped.long()
        self.step += 1
        average_weights(self.averaged, self.generator, self.settings.weight_average, self.step)
        return loss.detach()

    def metrics(self) -> dict[str, float]:
        """What a method reports in addition to the loss."""
        return {}

    def reseed(self) -> None:
        """Go on with other random numbers than before, from the same state, after a return to a checkpoint."""
        self.returns += 1
        seed = self.settings.seed + RESEED * self.returns
        torch.manual_seed(seed)
        self.noise.manual_seed(seed)

    def take_snapshot(self) -> None:
        """Keep a few samples, from the same latent vectors at every step, to show how they change."""
        images = torch.cat(sample(self.averaged, SNAPSHOT_IMAGES, SNAPSHOT_SEED))
        self.snapshots[self.step] = unscale(images)

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "matching": self.matching.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "noise": self.noise.get_state(),
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "snapshots": self.snapshots,
            "skipped": self.skipped,
            "returns": self.returns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.averaged.load_state_dict(state["averaged"])
        self.matching.load_state_dict(state["matching"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.noise.set_state(state["noise"])
        torch.set_rng_state(state["torch_rng"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.snapshots = dict(state["snapshots"])
        self.skipped.copy_(state["skipped"])
        self.returns = state["returns"]


@torch.no_grad()
def average_weights(averaged: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move ``averaged`` towards ``network``, buffers included. It moves faster in the first steps."""
    share = 1 - min(decay, step / (step + 10))
    state = network.state_dict()
    old = [value for value in averaged.state_dict().values() if value.is_floating_point()]
    torch._foreach_lerp_(old, [value for value in state.values() if value.is_floating_point()], share)
