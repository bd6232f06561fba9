"""`python -m bench.gpu.probe`: does the library load here, what can run, on which device? One line of JSON.

In a process of its own, as a library that was built elsewhere may end it.
"""

import json
import sys
import time
from pathlib import Path

from bench.gpu.cases import Context


def main() -> None:
    start = time.perf_counter()
    import torch

    imported = time.perf_counter()
    device = Context("--rehearse" in sys.argv, Path(), Path()).device()
    loaded = time.perf_counter()
    from bench import environment
    from bench.gpu.device import BACKENDS
    from moment_ops.ops import backends

    facts = {
        "import_torch_s": round(imported - start, 2),
        "import_moment_ops_s": round(loaded - imported, 2),
        "unavailable": {name: reason for name in BACKENDS if (reason := device.unavailable(name)) is not None},
        "environment": environment.describe() | {"backend": backends.chosen("moments", device.device)},
        "torch_cuda": torch.version.cuda,
        "computes": device.alive(),
    }
    if facts["computes"]:
        facts["device"] = device.properties()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
