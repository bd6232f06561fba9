"""Signals end a training between two steps: Ctrl-C, and SIGTERM and SIGUSR1, which schedulers of clusters send."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """Raised after one of ``SIGNALS``, when the checkpoint has been written."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, as of a shell. After the others EX_TEMPFAIL, 75: the run is to be continued."""
        return 128 + signal.SIGINT if self.signal_number == signal.SIGINT else os.EX_TEMPFAIL


@contextmanager
def handled(receive: Callable[[int, Any], None]) -> Iterator[None]:
    """``receive`` handles the signals; in other threads than the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_raise() -> Iterator[None]:
    """A signal raises Interrupted at once: before the first step there is nothing to save."""

    def receive(number: int, _frame: Any) -> None:
        raise Interrupted(number, "stopped outside of the training; what was saved before is kept")

    with handled(receive):
        yield


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Defer signals: the yielded function returns the first, or None. A second Ctrl-C or SIGTERM acts at once."""
    received: list[int] = []

    def receive(number: int, _frame: Any) -> None:
        # Slurm repeats SIGUSR1 for every step of a job.
        if received and number != signal.SIGUSR1:
            raise KeyboardInterrupt
        received.append(number)

    with handled(receive):
        yield lambda: received[0] if received else None
