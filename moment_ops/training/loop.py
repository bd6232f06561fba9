"""The training loop of all methods: metrics, evaluations, pictures and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from moment_ops.training import processes, runs
from moment_ops.training.data import ImageData, load
from moment_ops.training.errors import TrainingError, import_extra
from moment_ops.training.evaluator import Evaluator
from moment_ops.training.interruption import Interrupted, deferred_signals
from moment_ops.training.locks import locked
from moment_ops.training.metrics import Metrics
from moment_ops.training.settings import LoopSettings
from moment_ops.training.trainer import Trainer

Settings = TypeVar("Settings", bound=LoopSettings)


def train(trainer: Trainer, run: Path, evaluator: Evaluator | None, *, say: Callable[[str], None] = print) -> float:
    """Train to the end, and return the Frechet distance of the last samples. Files are written to the folder ``run``.

    Of several processes, the first has the evaluator and writes; the others take part in the steps, and return NaN.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint has been written.
        TrainingError: the loss is non-finite, or another process ended.
    """
    settings = trainer.settings
    trainer.distribute()
    metrics = None if evaluator is None else Metrics(run / runs.METRICS, trainer.step)
    bar = import_extra("tqdm").tqdm(
        total=settings.steps,
        initial=trainer.step,
        desc="generator",
        unit="it",
        disable=None if processes.is_first() else True,
        smoothing=0.05,
        dynamic_ncols=True,
    )
    distance = math.nan
    start = time.monotonic() - trainer.elapsed
    with bar, deferred_signals() as received_signal:
        while trainer.progress < 1:
            with processes.lost_processes(lambda: runs.describe_last(run)):
                loss = trainer.advance()
                trainer.elapsed, stop_signal = processes.agree(time.monotonic() - start, received_signal())
            bar.total = round(trainer.step / trainer.progress)
            bar.update()

            last = trainer.progress >= 1
            evaluating = last or trainer.step % settings.evaluate_every == 0
            saving = last or trainer.step % settings.checkpoint_every == 0 or stop_signal is not None
            if last or is_snapshot_step(trainer.step):
                trainer.take_snapshot()
            if evaluator is None or metrics is None:
                if stop_signal is not None and not last:
                    raise Interrupted(stop_signal, "")
                continue
            # The loss is read only if it is used, since reading waits for the device.
            if evaluating or saving or trainer.step % settings.log_every == 0:
                line = {
                    "step": trainer.step,
                    "seconds": trainer.elapsed,
                    "lr": trainer.lr,
                    "loss": loss.item(),
                    **trainer.metrics(),
                }
                if not math.isfinite(line["loss"]):
                    raise TrainingError(f"the loss is non-finite at step {trainer.step}; try a lower --lr")
                if evaluating:
                    distance = evaluator(trainer.averaged)
                    line |= {
                        "frechet_distance": distance,
                        "held_out_frechet_distance": evaluator.held_out_distance,
                    }
                metrics.append(line)
                report = f"loss {line['loss']:.3g}"
                if not math.isnan(distance):
                    report += f", Frechet distance {distance:.2f}"
                bar.set_postfix_str(report, refresh=False)
                if evaluating and bar.disable:
                    say(f"step {trainer.step}: {report}")
            if saving:
                runs.save_checkpoint(run, trainer)
            if evaluating:
                runs.draw(run, trainer, curves=last)
            if stop_signal is not None and not last:
                raise Interrupted(stop_signal, f"stopped and saved at step {trainer.step}; --resume continues the run")

    if evaluator is not None and math.isnan(distance):
        distance = evaluator(trainer.averaged)
        runs.draw(run, trainer, curves=True)
    return distance


def run_method(
    run: Path,
    settings_type: type[Settings],
    given: dict[str, Any],
    *,
    resume: bool,
    device: torch.device | str,
    say: Callable[[str], None],
    new: Callable[[ImageData, Settings], Trainer],
    resumed: Callable[[dict[str, Any], ImageData, Settings], Trainer],
) -> tuple[float, float]:
    """Train in the folder ``run``, from the start or from its checkpoint.

    Args:
        run: the folder, which is made. An earlier run in it is moved to another folder.
        settings_type: the settings of the method.
        given: settings that differ from the defaults or, with ``resume``, from those of the run.
        resume: whether the run is continued from its last checkpoint.
        say: prints a line.
        new: makes the trainer of a new run, in whose folder it may write.
        resumed: makes the trainer from the content of a checkpoint.

    Returns:
        The Frechet distances of the last samples, and of held-out real images; NaN on all processes but the first.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint has been written.
        TrainingError: files or folders that cannot be used, a folder that another trainer uses, or a run that
            diverges.
    """
    with contextlib.ExitStack() as stack:
        state: dict[str, Any] = {}

        def last_state() -> dict[str, Any]:
            stack.enter_context(locked(run))
            return runs.load_checkpoint(run)

        if resume:
            state = processes.from_first(last_state)
            settings = settings_type(**runs.continued_settings(state, settings_type.method, given))
        else:
            settings = settings_type(**given)
        data = processes.first_then_others(lambda: load(settings.data)).to(torch.device(device))
        trainer: Trainer | None = None
        evaluator: Evaluator | None = None

        def begin() -> dict[str, Any]:
            """What the first process does before all of them train."""
            nonlocal trainer, evaluator
            if not resume:
                stack.enter_context(locked(run))
                earlier = runs.start_run(run, settings)
                if earlier is not None:
                    say(f"the earlier run is kept in {earlier}")
            # Before the trainer, which sets the state of the random numbers.
            evaluator = Evaluator(data)
            trainer = resumed(state, data, settings) if resume else new(data, settings)
            return runs.state_of(trainer)

        state = processes.from_first(begin)
        if trainer is None:
            trainer = resumed(state, data, settings)
        if resume:
            say(f"continuing {run} at step {trainer.step}")
        held_out = math.nan if evaluator is None else evaluator.held_out_distance
        return train(trainer, run, evaluator, say=say), held_out


def is_snapshot_step(step: int) -> bool:
    """Whether samples are kept at this step: 50, 100, 200, 400 and so on, since samples change most at the start."""
    return step % 50 == 0 and math.log2(step / 50).is_integer()
