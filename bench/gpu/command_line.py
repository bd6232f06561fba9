"""`python -m bench.gpu`: runs stages, prints a page about them; `report` and `summary` read what they have written."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import summary
from bench.gpu.cases import BAD, Context
from bench.gpu.records import Records, read
from bench.gpu.session import Session
from bench.gpu.stages import STAGES

SECONDS = 560.0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Check all operators on a GPU for correctness, synchronization and graph capture, and time them.",
        epilog="`python -m bench.gpu report FOLDER...` makes tables and plots of results. `python -m bench.gpu summary"
        " FOLDER...` prints their summary.",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="X", help=f"time limit of the run (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="output folder (default: $OUT, or runs/gpu/<time> if it is not set)",
    )
    parser.add_argument("--from-stage", choices=tuple(STAGES), help="skip the stages before this one, except the first")
    parser.add_argument(
        "--only", action="append", choices=tuple(STAGES), help="run only this stage; may be given several times"
    )
    parser.add_argument(
        "--resume", type=Path, action="append", default=[], metavar="FOLDER", help="continue the run of this folder"
    )
    parser.add_argument("--build", action="store_true", help="build the library from source even if it is installed")
    parser.add_argument("--commit", default="unknown", help="commit of the sources, for folders without git")
    parser.add_argument(
        "--rehearse", action="store_true", help="run without a GPU, on small shapes and with injected failures"
    )
    return parser


def _stages(options: argparse.Namespace) -> list[str]:
    names = list(STAGES)
    if options.from_stage:
        # Every machine has to show what it is.
        names = [names[0], *names[max(names.index(options.from_stage), 1) :]]
    return [name for name in names if name in options.only] if options.only else names


def run(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    output = options.output or Path(os.environ.get("OUT") or time.strftime("runs/gpu/%Y%m%d-%H%M%S"))
    scratch = Path(tempfile.mkdtemp(prefix="moment_ops-bench-"))
    # Of this program alone: it deletes files in it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "moment_ops-bench-inductor")
    context = Context(options.rehearse, output, scratch, options.commit, force_build=options.build or options.rehearse)
    stamp = {"rehearsal": True, "device": summary.REHEARSAL} if options.rehearse else {}
    records = Records(output, stamp)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    names = _stages(options)
    records.write(
        "environment.jsonl",
        {"stage": "run", "status": "so far", "started": started, "commit": options.commit, "stages": names},
    )
    budget = ", ".join(f"{name} {STAGES[name].most:g}" for name in names)
    print(f"{summary.REHEARSAL + ': ' if options.rehearse else ''}{options.seconds:g} s; at most: {budget}", flush=True)
    session = Session(
        context, records, options.seconds, list(read(options.resume)), lambda text: print(text, flush=True)
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        session.run(names)
    except KeyboardInterrupt:
        records.write("environment.jsonl", {"stage": "run", "status": "failed", "error": "the run was interrupted"})
    page = summary.page(session.all_records, records.full)
    (output / "summary.txt").write_text(page)
    print(page, flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return int(any(record.get("status") in BAD for record in records.written))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        from bench.gpu import report

        report.main(arguments[1:])
    elif arguments[:1] == ["summary"]:
        print(summary.page(list(read(Path(path) for path in arguments[1:]))))
    else:
        sys.exit(run(arguments))
