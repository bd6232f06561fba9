"""The training loop of all methods: metrics, evaluations, pictures and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from moment_ops.training import judges, processes, runs
from moment_ops.training.data import ImageData, load
from moment_ops.training.errors import TrainingError, import_extra
from moment_ops.training.evaluator import Evaluator, Quality
from moment_ops.training.generators import Factory, name_of
from moment_ops.training.interruption import Interrupted, deferred_signals
from moment_ops.training.locks import locked
from moment_ops.training.metrics import Metrics
from moment_ops.training.settings import LoopSettings
from moment_ops.training.trainer import Trainer

Settings = TypeVar("Settings", bound=LoopSettings)
SKIPPED_IN_A_ROW = 10


def train(
    trainer: Trainer, run: Path, evaluator: Evaluator | None, *, say: Callable[[str], None] = print
) -> Quality | None:
    """Train to the end, and return the quality of the last samples. Files are written to the folder ``run``.

    Of several processes, the first has the evaluator and writes; the others take part in the steps, and return None.

    Raises:
        Interrupted: after a signal, when the checkpoint has been written.
        TrainingError: gradients are non-finite again and again, or another process ended.
    """
    settings = trainer.settings
    trainer.distribute()
    record = None if evaluator is None else Record(trainer, run, evaluator, say)
    start = time.monotonic() - trainer.elapsed
    with deferred_signals() as received_signal, record or contextlib.nullcontext():
        while trainer.progress < 1:
            with processes.lost_processes(lambda: runs.describe_last(run)):
                loss = trainer.advance()
                trainer.elapsed, stop_signal = processes.agree(time.monotonic() - start, received_signal())
            last = trainer.progress >= 1
            stopping = stop_signal is not None and not last
            evaluating = last or trainer.step % settings.evaluate_every == 0
            saving = last or stopping or trainer.step % settings.checkpoint_every == 0
            if last or is_snapshot_step(trainer.step):
                trainer.take_snapshot()
            # The device is read only if the result is used, since reading waits for it.
            if evaluating or saving or trainer.step % settings.log_every == 0:
                skipped, in_a_row = trainer.skipped.tolist()
                if in_a_row >= SKIPPED_IN_A_ROW:
                    return_once(trainer, run, say)
                    start = time.monotonic() - trainer.elapsed
                    if record:
                        record.restart()
                    continue
                # Among skipped steps there is nothing new to save.
                saving = saving and (in_a_row == 0 or last or stopping)
                if record:
                    record.log(loss.item(), skipped, evaluating)
                    if saving:
                        runs.save_checkpoint(run, trainer)
                    if evaluating:
                        runs.draw(run, trainer, curves=last)
            if record:
                record.update()
            if stopping:
                assert stop_signal is not None
                message = f"stopped and saved at step {trainer.step}; --resume continues the run"
                raise Interrupted(stop_signal, message)
    return record.final_quality() if record else None


def return_once(trainer: Trainer, run: Path, say: Callable[[str], None]) -> None:
    """After too many skipped steps, return to the last good checkpoint, with other random numbers.

    Raises:
        TrainingError: the run returned before.
    """
    text = f"the gradients were non-finite in {trainer.skipped[1].item()} steps in a row up to step {trainer.step}"
    if trainer.returns:
        raise TrainingError(f"{text}, for the second time; try a lower --lr")
    runs.return_to_good(run, trainer)
    say(f"{text}; continuing from step {trainer.step} with other random numbers")


class Record:
    """What the first process writes and shows while all of them train: metrics, progress bar and distances."""

    def __init__(self, trainer: Trainer, run: Path, evaluator: Evaluator, say: Callable[[str], None]) -> None:
        self.trainer, self.run, self.evaluator, self.say = trainer, run, evaluator, say
        self.distance = math.nan
        self.metrics = Metrics(run / runs.METRICS, trainer.step)
        if trainer.step == 0:
            runs.save_checkpoint(run, trainer)
        self.bar = import_extra("tqdm").tqdm(
            total=trainer.settings.steps,
            initial=trainer.step,
            desc="generator",
            unit="it",
            disable=None,
            smoothing=0.05,
            dynamic_ncols=True,
        )

    def __enter__(self) -> None:
        self.bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def restart(self) -> None:
        """Forget the steps after that of the trainer."""
        self.metrics = Metrics(self.run / runs.METRICS, self.trainer.step)
        self.bar.reset(total=self.trainer.settings.steps)
        self.bar.update(self.trainer.step)

    def update(self) -> None:
        self.bar.total = round(self.trainer.step / self.trainer.progress)
        self.bar.update()

    def log(self, loss: float, skipped: int, evaluating: bool) -> None:
        """Write a line of metrics, with the Frechet distance if it is time for that."""
        trainer = self.trainer
        line: dict[str, Any] = {"step": trainer.step, "seconds": trainer.elapsed, "lr": trainer.lr, "skipped": skipped}
        # JSON has no numbers that are not finite.
        line |= {name: x for name, x in {"loss": loss, **trainer.metrics()}.items() if math.isfinite(x)}
        if evaluating:
            self.distance = self.evaluator(trainer.averaged)
            line["frechet_distance"] = self.distance
            line["held_out_frechet_distance"] = self.evaluator.held_out_distance
            line["judge"] = self.evaluator.description
        self.metrics.append(line)
        report = f"loss {loss:.3g}"
        if not math.isnan(self.distance):
            report += f", Frechet distance {self.distance:.2f}"
        if skipped:
            report += f", {skipped} steps skipped"
        self.bar.set_postfix_str(report, refresh=False)
        if evaluating and self.bar.disable:
            self.say(f"step {trainer.step}: {report}")

    def final_quality(self) -> Quality:
        """All measures of the last samples."""
        if math.isnan(self.distance):
            # The run was continued after its end.
            runs.draw(self.run, self.trainer, curves=True)
        measured = self.evaluator.measure(self.trainer.averaged)
        measured.save(self.run / runs.QUALITY)
        return measured


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
    data: Any = None,
    generator: Factory | None = None,
) -> Quality | None:
    """Train in the folder ``run``, from the start or from its checkpoint.

    Args:
        run: the folder, which is made. An earlier run in it is moved to another folder.
        settings_type: the settings of the method.
        given: settings that differ from the defaults or, with ``resume``, from those of the run.
        resume: whether the run is continued from its last checkpoint.
        say: prints a line.
        new: makes the trainer of a new run, in whose folder it may write.
        resumed: makes the trainer from the content of a checkpoint.
        generator: a function (channels, latent_size, image_size) -> module, in the place of the setting ``generator``.
        data: a map-style Dataset of images or of (image, label), in the place of the setting ``data``.

    Returns:
        The quality of the last samples; None on all processes but the first.

    Raises:
        Interrupted: after a signal, when the checkpoint has been written.
        TrainingError: files or folders that cannot be used, a folder that another trainer uses, or a run that
            diverges.
    """
    if generator is not None:
        given = {**given, "generator": name_of(generator)}
    with contextlib.ExitStack() as stack:
        state: dict[str, Any] = {}

        def last_state() -> dict[str, Any]:
            stack.enter_context(locked(run))
            runs.remove_leftovers(run)
            return runs.load_checkpoint(run, say)

        if resume:
            state = processes.from_first(last_state)
            settings = settings_type(**runs.continued_settings(state, settings_type.method, given))
        else:
            settings = settings_type(**given)
        source = settings.data if data is None else data
        images = processes.first_then_others(lambda: load(source, settings.size, say)).to(torch.device(device))
        trainer: Trainer | None = None
        evaluator: Evaluator | None = None

        def begin() -> dict[str, Any]:
            """What the first process does before all of them train."""
            nonlocal trainer, evaluator
            if not resume:
                stack.enter_context(locked(run))
            # Before the trainer, which sets the state of the random numbers.
            judge = judges.choose(settings.judge, images.name, getattr(settings, "features", ""))
            evaluator = Evaluator(images, judges.make(judge, settings.judge_weights))
            say(f"samples are judged by: {evaluator.description}")
            if not resume:
                runs.remove_leftovers(run)
                earlier = runs.start_run(run, settings)
                if earlier is not None:
                    say(f"the earlier run is kept in {earlier}")
            trainer = resumed(state, images, settings) if resume else new(images, settings)
            return runs.state_of(trainer)

        state = processes.from_first(begin)
        if trainer is None:
            trainer = resumed(state, images, settings)
        if resume:
            say(f"continuing {run} at step {trainer.step}")
        return train(trainer, run, evaluator, say=say)


def is_snapshot_step(step: int) -> bool:
    """Whether samples are kept at this step: 50, 100, 200, 400 and so on, since samples change most at the start."""
    return step % 50 == 0 and math.log2(step / 50).is_integer()
