"""The folder of a run: its checkpoint, settings and pictures."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moment_ops.training import checkpoints, pictures
from moment_ops.training.data import unscale
from moment_ops.training.errors import TrainingError
from moment_ops.training.evaluator import sample
from moment_ops.training.metrics import read_metrics
from moment_ops.training.networks import Generator, freeze
from moment_ops.training.settings import LoopSettings
from moment_ops.training.trainer import Trainer

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
CHANGEABLE = {"data", "steps", "seconds", "lr", "moment_lr", "amp", "log_every", "evaluate_every", "checkpoint_every"}
GRID_IMAGES = 100
GRID_SEED = 1


def save_checkpoint(run: Path, trainer: Trainer) -> None:
    """Write ``checkpoint.pt``. If weights are non-finite it raises, and keeps the last checkpoint."""
    if not all(bool(value.isfinite().all()) for value in trainer.generator.parameters()):
        raise TrainingError(f"the weights are non-finite at step {trainer.step}; try a lower --lr")
    checkpoints.save(run / CHECKPOINT, "checkpoint", state_of(trainer))


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The content of a checkpoint."""
    settings = trainer.settings
    return {
        "method": settings.method,
        "settings": asdict(settings),
        "channels": trainer.generator.channels,
        "trainer": trainer.state_dict(),
    }


def load_checkpoint(run: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote: method, settings, channels and the state of the trainer."""
    if not (run / CHECKPOINT).exists():
        raise TrainingError(f"{run} holds no {CHECKPOINT}")
    return checkpoints.load(run / CHECKPOINT, "checkpoint")


def describe_last(run: Path) -> str:
    """What can be continued, in words."""
    if not (run / CHECKPOINT).exists():
        return "there is no checkpoint yet"
    step = load_checkpoint(run)["trainer"]["step"]
    return f"the last checkpoint is of step {step}, which --resume continues"


def averaged_generator(state: dict[str, Any]) -> Generator:
    """The averaged generator of a loaded checkpoint, frozen."""
    generator = Generator(state["channels"], state["settings"]["latent_size"])
    generator.load_state_dict(state["trainer"]["averaged"])
    return freeze(generator)


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
