"""`python -m bench.gpu.small_shapes BACKEND`: every operator on small shapes, for compute-sanitizer."""

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.cases import Context
from bench.gpu.operators import DTYPES, OPERATORS, Draw
from bench.gpu.worker import NO_KERNEL


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.small_shapes", description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--seconds", type=float, default=60.0, help="no call starts later (default: 60)")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    device = Context(options.rehearse, Path(), Path()).device()
    device.start()
    calls = [
        (operator, draw)
        for operator in OPERATORS.values()
        for draw in itertools.product(operator.sizes, operator.dtypes, operator.layouts)
    ]
    # Where time does not suffice for all, some of everything has run.
    random.Random(0).shuffle(calls)
    start, done, without = time.monotonic(), 0, 0
    with device.backend(options.backend):
        for operator, (size, dtype, layout) in calls:
            if time.monotonic() - start > options.seconds:
                break
            try:
                operator.build(Draw(size, DTYPES[dtype], layout, device.device))()
                done += 1
            except RuntimeError as problem:
                if NO_KERNEL not in str(problem):
                    raise
                without += 1
    device.synchronize()
    print(f"{done} of {len(calls)} calls ran, {without} have no kernel on {options.backend}")


if __name__ == "__main__":
    main()
