"""What `moment-ops env` prints: the backends that can run on this machine, and why the others cannot."""

import platform

import numpy
import torch

import moment_ops
from moment_ops.ops import backends
from moment_ops.ops.checks import FEATURE_DTYPES
from moment_ops.ops.library import OPERATORS


def report() -> str:
    """Versions, devices and backends, one per line."""
    lines = [
        f"moment_ops  {moment_ops.__version__}",
        f"python      {platform.python_version()} on {platform.platform()}",
        f"torch       {torch.__version__}, {torch.get_num_threads()} threads",
        f"numpy       {numpy.__version__}",
        f"cpu         {torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        lines += [f"cuda:{i}      {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append("gpu         torch finds none")
    lines.append("backends")
    for name in backends.NAMES[1:]:
        reason = backends.unavailable(name)
        state = "available" if reason is None else f"not available: {reason}"
        if name == "triton" and torch.version.hip is not None:
            state += f"; {backends.UNPROVEN_ON_AMD}"
        lines.append(f"  {name:<9} {state}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table = [("auto uses", *(f"{device} tensors" for device in devices))]
    table += [(f"  {operator}", *(_choice(operator, device) for device in devices)) for operator in OPERATORS]
    lines += ["".join(f"{cell:<28}" for cell in row).rstrip() for row in table]
    return "\n".join(lines)


def _choice(operator: str, device: str) -> str:
    """The backend for float32, and for other dtypes if it differs."""
    usual = backends.chosen(operator, device)
    others = {str(dtype).removeprefix("torch."): backends.chosen(operator, device, dtype) for dtype in FEATURE_DTYPES}
    others = {dtype: name for dtype, name in others.items() if name != usual}
    return usual + "".join(f" ({dtype}: {name})" for dtype, name in others.items())
