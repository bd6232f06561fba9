"""`python -m bench.gpu.main_kernels BACKEND`: each kernel once between the marks of the profiler, for ncu."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.gpu.cases import Context
from bench.gpu.kernel_times import ALL, Inputs
from bench.gpu.worker import NO_KERNEL
from bench.workloads import DTYPES, make_features, make_vectors

LAUNCHES = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.main_kernels", description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    device = Context(options.rehearse, Path(), Path()).device()
    device.start()
    for kernel in ALL:
        workload, dtype = device.workload(kernel.workload), kernel.dtypes[0]
        if kernel.workload == "vgg19":
            # Its layers are launches of their own.
            workload = replace(workload, shapes=workload.shapes[:LAUNCHES])
        features = [x.detach() for x in make_features(workload, DTYPES[dtype], device.device)]
        try:
            with device.backend(options.backend):
                call, _ = kernel.build(Inputs(features, make_vectors(workload, device.device)))
                call()
                device.synchronize()
                device.cuda.profiler.start()
                call()
                device.synchronize()
                device.cuda.profiler.stop()
        except RuntimeError as problem:
            if NO_KERNEL not in str(problem):
                raise


if __name__ == "__main__":
    main()
