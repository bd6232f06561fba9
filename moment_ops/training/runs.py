"""The folder of a run: its checkpoint, settings and pictures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moment_ops.training import checkpoints, generators, pictures, processes
from moment_ops.training.data import unscale
from moment_ops.training.errors import TrainingError
from moment_ops.training.evaluator import sample
from moment_ops.training.metrics import read_metrics
from moment_ops.training.networks import freeze
from moment_ops.training.settings import LoopSettings
from moment_ops.training.trainer import Trainer

CHECKPOINT = "checkpoint.pt"
# What a checkpoint contains; a change makes earlier ones unusable.
VERSION = 3
METRICS = "metrics.jsonl"
SETTINGS, QUALITY = "settings.json", "quality.json"
CHANGEABLE = {"data", "steps", "seconds", "lr", "moment_lr"}
CHANGEABLE |= {
    "judge_weights",
    "micro_batches",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
}
GRID_IMAGES = 100
GRID_SEED = 1


def save_checkpoint(run: Path, trainer: Trainer) -> None:
    """Write ``checkpoint-STEP.pt``, of which ``checkpoint.pt`` becomes another name, and remove the oldest ones.

    If weights are non-finite it raises, and keeps the last checkpoint.
    """
    if not all(bool(value.isfinite().all()) for value in trainer.generator.parameters()):
        raise TrainingError(f"the weights are non-finite at step {trainer.step}; try a lower --lr")
    path = run / f"checkpoint-{trainer.step}.pt"
    checkpoints.save(path, "checkpoint", state_of(trainer))
    checkpoints.link_atomically(run / CHECKPOINT, path)
    for old in kept_checkpoints(run)[trainer.settings.keep_checkpoints :]:
        old.unlink(missing_ok=True)


def kept_checkpoints(run: Path) -> list[Path]:
    """The files ``checkpoint-STEP.pt``, the last step first."""
    steps = {path: path.stem.removeprefix("checkpoint-") for path in run.glob("checkpoint-*.pt")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: -int(steps[path]))


def return_to_good(run: Path, trainer: Trainer) -> None:
    """Load the last checkpoint before the steps that are skipped now, and remove those after it."""

    def good() -> dict[str, Any]:
        for path in kept_checkpoints(run):
            state = checkpoints.load(path, "checkpoint")
            if int(state["trainer"]["skipped"][1]) == 0:
                checkpoints.link_atomically(run / CHECKPOINT, path)
                return state
            path.unlink()
        raise TrainingError(
            f"the gradients are non-finite at step {trainer.step}, and {run} holds no checkpoint before"
        )

    trainer.load_state_dict(processes.from_first(good)["trainer"])
    trainer.reseed()


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The content of a checkpoint."""
    settings = trainer.settings
    return {
        "version": VERSION,
        "method": settings.method,
        "settings": asdict(settings),
        "channels": trainer.generator.channels,
        "trainer": trainer.state_dict(),
    }


def load_checkpoint(run: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote: method, settings, channels and the state of the trainer.

    Args:
        say: if the last checkpoint is damaged, prints so, and the one before it is read. Without it that is an error.
    """
    if not (run / CHECKPOINT).exists():
        raise TrainingError(f"{run} holds no {CHECKPOINT}")
    try:
        state = checkpoints.load(run / CHECKPOINT, "checkpoint")
    except TrainingError as error:
        if say is None:
            raise
        for path in kept_checkpoints(run):
            with suppress(TrainingError):
                state = checkpoints.load(path, "checkpoint")
                say(f"{error}; continuing from {path.name}")
                break
        else:
            raise
    if state.get("version") != VERSION:
        raise TrainingError(f"{run / CHECKPOINT} was written by an earlier version of moment_ops, and cannot be used")
    return state


def describe_last(run: Path) -> str:
    """What can be continued, in words."""
    if not (run / CHECKPOINT).exists():
        return "there is no checkpoint yet"
    step = load_checkpoint(run)["trainer"]["step"]
    return f"the last checkpoint is of step {step}, which --resume continues"


def averaged_generator(state: dict[str, Any]) -> nn.Module:
    """The averaged generator of a loaded checkpoint, frozen."""
    settings = state["settings"]
    generator = generators.make(settings["generator"], state["channels"], settings["latent_size"], settings["size"])
    generator.load_state_dict(state["trainer"]["averaged"])
    return freeze(generator)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed trainer left of a file that it was writing."""
    for path in run.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def start_run(run: Path, settings: LoopSettings) -> Path | None:
    """Make the folder of a new run. An earlier run there is moved to another folder, which is returned."""
    earlier = None
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run} is not a folder; choose another --run-dir")
    if run.exists() and any(run.iterdir()) and not (run / SETTINGS).is_file():
        raise TrainingError(f"{run} holds files that are not of a run; choose another --run-dir")
    if (run / CHECKPOINT).exists():
        free = (run.with_name(f"{run.name}.{number}") for number in itertools.count(1))
        earlier = run.rename(next(path for path in free if not path.exists()))
    content = {"method": settings.method, **asdict(settings)}
    checkpoints.write_atomically(run / SETTINGS, (json.dumps(content, indent=2) + "\n").encode())
    return earlier


def continued_settings(state: dict[str, Any], method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a loaded checkpoint, updated by those ``given``, if they may change in a continued run."""
    if state["method"] != method:
        raise TrainingError(f"this is a run of {state['method']}, not of {method}")
    saved = state["settings"]
    fixed = sorted(name for name, value in given.items() if name not in CHANGEABLE and value != saved[name])
    if fixed:
        raise TrainingError(f"--resume: a continued run keeps its {', '.join(fixed)}")
    return {**saved, **given}


def draw(run: Path, trainer: Trainer, *, curves: bool) -> None:
    """Write the pictures of a run: samples, their progress and, on request, the curves, which take a second."""
    samples = torch.cat(sample(trainer.averaged, GRID_IMAGES, GRID_SEED))
    pictures.save_grid(run / "samples.png", unscale(samples))
    pictures.save_progress(run / "progress.png", trainer.snapshots)
    if curves:
        pictures.save_curves(run / "curves.png", read_metrics(run / METRICS))
