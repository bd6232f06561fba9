"""The training loop that every method shares: metrics, evaluations, pictures, checkpoints, an orderly end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from moment_ops.training import runs
from moment_ops.training.errors import TrainingError, import_extra
from moment_ops.training.evaluator import Evaluator
from moment_ops.training.interruption import Interrupted, deferred_signals
from moment_ops.training.metrics import Metrics
from moment_ops.training.trainer import Trainer


def train(trainer: Trainer, run: Path, evaluator: Evaluator, *, say: Callable[[str], None] = print) -> float:
    """Train to the end; the Frechet distance reached. Everything is written into the folder ``run``.

    Raises ``Interrupted`` after Ctrl-C or SIGTERM, with the checkpoint written.
    """
    settings = trainer.settings
    metrics = Metrics(run / runs.METRICS, trainer.step)
    bar = import_extra("tqdm").tqdm(
        total=settings.steps,
        initial=trainer.step,
        desc="generator",
        unit="it",
        disable=None,
        smoothing=0.05,
        dynamic_ncols=True,
    )
    distance = math.nan
    start = time.monotonic() - trainer.elapsed
    with bar, deferred_signals() as received_signal:
        while trainer.progress < 1:
            loss = trainer.advance()
            trainer.elapsed = time.monotonic() - start
            bar.total = round(trainer.step / trainer.progress)
            bar.update()

            stop_signal = received_signal()
            last = trainer.progress >= 1
            evaluating = last or trainer.step % settings.evaluate_every == 0
            saving = last or trainer.step % settings.checkpoint_every == 0 or stop_signal is not None
            if last or is_snapshot_step(trainer.step):
                trainer.take_snapshot()
            # The loss is read only where it is used: reading waits for the device.
            if evaluating or saving or trainer.step % settings.log_every == 0:
                line = {
                    "step": trainer.step,
                    "seconds": trainer.elapsed,
                    "lr": trainer.lr,
                    "loss": loss.item(),
                    **trainer.metrics(),
                }
                if not math.isfinite(line["loss"]):
                    raise TrainingError(f"the loss is not finite at step {trainer.step}; try a lower --lr")
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
                raise Interrupted(stop_signal, f"stopped and saved at step {trainer.step}; --resume continues")

    if math.isnan(distance):
        distance = evaluator(trainer.averaged)
        runs.draw(run, trainer, curves=True)
    return distance


def is_snapshot_step(step: int) -> bool:
    """50, 100, 200, 400 ...: most happens early."""
    return step % 50 == 0 and math.log2(step / 50).is_integer()
