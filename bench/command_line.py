"""`python -m bench`: which operators, on which workloads, for how long."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment, report, results
from bench.harness import Bench, measure
from bench.isolation import isolated
from bench.machine import MACHINES
from bench.workloads import DTYPES, WORKLOADS

OPERATORS = results.ORDER
SECONDS, QUICK_SECONDS = 6.0, 0.5
# Load beyond which a warning is printed.
BUSY = 0.5


def bench_class(operator: str) -> type[Bench]:
    """The benchmark of an operator, from the file of its name."""
    return getattr(importlib.import_module(f"bench.bench_{operator}"), f"{operator.title().replace('_', '')}Bench")


def cases(kind: type[Bench], workloads: Sequence[str] | None, quick: bool) -> list[tuple[str, str]]:
    """(workload, dtype) to run."""
    if quick and not workloads:
        return [("digits" if "digits" in (kind.workloads or WORKLOADS) else kind.default_cases[0][0], "float32")]
    if workloads:
        runnable = [workload for workload in workloads if workload in (kind.workloads or WORKLOADS)]
        return [(workload, dtype) for workload in runnable for dtype in (["float32"] if quick else DTYPES)]
    return list(kind.default_cases)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def parser(operators: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Time {', '.join(operators)} against plain PyTorch, torch.compile and the published code.",
    )
    parser.add_argument(
        "--workload", action="append", choices=tuple(WORKLOADS), help="workload to time; may be given several times"
    )
    parser.add_argument(
        "--quick", action="store_true", help="time one small workload with few repetitions; results are not kept"
    )
    parser.add_argument(
        "--repeat", type=positive, metavar="N", help=f"timed rounds (default: as many as fit into {SECONDS:g} s)"
    )
    parser.add_argument("--device", choices=tuple(MACHINES), default="cpu", help="device (default: cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of PyTorch (default: PyTorch's choice)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="output folder (default: bench/results/<device>)")
    return parser


def describe(device: str) -> dict[str, Any]:
    """The environment, where the device is there."""
    MACHINES[device]().begin()
    return environment.describe(device)


def run_case(
    operator: str, workload: str, dtype: str, device: str, quick: bool, repeat: int | None, threads: int
) -> dict[str, Any]:
    """Measure one case, in a process that has done nothing else."""
    torch.set_num_threads(threads)
    kind = bench_class(operator)
    return measure(
        kind(WORKLOADS[workload], dtype, device),
        MACHINES[device](),
        seconds=QUICK_SECONDS if quick else SECONDS,
        repeat=repeat,
        contestants=[name for name in kind.contestants if not (quick and name in kind.slow_to_prepare)],
        say=lambda text: print(text, flush=True),
    )


def main(arguments: Sequence[str] | None = None, operators: Sequence[str] = OPERATORS) -> None:
    """Run, print a table per case, keep the results. Exits with 1 if an operator of ours is not exact."""
    options = parser(operators).parse_args(arguments)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    described = isolated(describe, options.device)
    folder = options.output or (None if options.quick else results.device_folder(described))
    print(environment.line(described), flush=True)
    if (described["load"] or 0) > BUSY:
        print("This machine is busy with something else: what needs many threads looks slower than it is.", flush=True)
    wrong = []
    for operator in operators:
        for workload, dtype in cases(bench_class(operator), options.workload, options.quick):
            print(f"\n{operator}, {workload}, {dtype}", flush=True)
            result = isolated(
                run_case, operator, workload, dtype, options.device, options.quick, options.repeat, threads
            )
            print("\n" + report.table(result), flush=True)
            if not report.ours_agrees(result):
                wrong.append(f"{operator} {workload} {dtype}")
            if folder is not None:
                results.save(result, described, folder)
    if folder is not None:
        print(f"\nresults in {folder}; `python -m bench.report` makes tables and plots of them")
    if wrong:
        sys.exit(f"not exact, no factors: {', '.join(wrong)}")
