"""The process that runs cases: each of them guarded, what it finds sent to the supervisor at once."""

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.gpu.cases import FAILED, NOT_THERE, OK, WRONG, Case, Context, MissingTool, NotThere, Wrong
from bench.gpu.records import cut_middle

# How it ends after an error that all further calls would meet, too.
POISONED = 70
TRACEBACK_LINES = 8
# How the library says that a forced backend has no kernel for what was asked.
NO_KERNEL = "was forced but cannot run"


def work(connection: Connection, context: Context, stage_name: str, names: Sequence[str], log: Path) -> None:
    """Run the named cases of a stage in their order."""
    # A group of its own, so that it can be ended with all that it started.
    os.setsid()
    _redirect(log)
    faulthandler.enable()
    from bench.gpu import stages

    stage = stages.STAGES[stage_name]
    worker = stage.worker(context)
    by_name = {case.name: case for case in stage.cases(context)}
    for name in names:
        case = by_name[name]
        connection.send(("start", name, case.seconds, os.fstat(2).st_size))
        # Where it hangs is known before the supervisor ends it.
        faulthandler.dump_traceback_later(case.seconds)
        result = _guarded(case, worker, lambda facts, name=name: connection.send(("facts", name, facts)))
        faulthandler.cancel_dump_traceback_later()
        poisoned = result["status"] == FAILED and stage.needs_device and not worker.alive()
        connection.send(("end", name, result | ({"poisoned": True} if poisoned else {})))
        if poisoned:
            connection.close()
            os._exit(POISONED)
    connection.send(("done",))
    connection.close()
    # What the destructors of a device's libraries do at the end is no result.
    os._exit(0)


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _guarded(case: Case, worker: Any, emit: Any) -> dict[str, Any]:
    start = time.perf_counter()
    status, problem, facts = OK, None, None
    try:
        facts = case.run(worker, emit)
        worker.synchronize()
    except Wrong as wrong:
        status, problem, facts = WRONG, wrong, wrong.facts
    except NotThere as missing:
        status, problem = NOT_THERE, missing
    except Exception as failure:
        status, problem = NOT_THERE if NO_KERNEL in str(failure) else FAILED, failure
    result: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - start, 3)}
    if problem is not None:
        result["error"] = describe(problem)
    if status == FAILED and not isinstance(problem, MissingTool):
        result["traceback"] = _last_frames(problem)
    if facts is not None:
        result["facts"] = facts
    return result


def describe(problem: BaseException) -> str:
    """The first lines of an exception; CUDA errors have long texts."""
    text = "; ".join(str(problem).strip().splitlines()[:2])
    name = type(problem).__name__
    return cut_middle(text if isinstance(problem, (Wrong, NotThere, MissingTool)) else f"{name}: {text}", 400)


def _last_frames(problem: BaseException) -> list[str]:
    """Innermost frames first."""
    frames = traceback.extract_tb(problem.__traceback__)[::-1]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames][
        :TRACEBACK_LINES
    ]
