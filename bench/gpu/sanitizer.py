"""compute-sanitizer over every kernel on small shapes, and counters of ncu of the kernels that matter."""

import csv
import re
from functools import partial
from typing import Any

from bench.gpu.cases import Case, Context, Emit, Wrong
from bench.gpu.records import cut_middle
from bench.gpu.tools import Tools

CHECKS = (
    ("memcheck", "cuda"),
    ("racecheck", "cuda"),
    ("memcheck", "triton"),
    ("racecheck", "triton"),
    ("initcheck", "cuda"),
    ("synccheck", "cuda"),
)
CHECK_SECONDS, PROFILE_SECONDS = 150.0, 120.0
# To start under a tool and to end.
MARGIN_SECONDS = 60.0
ERROR_CODE = 9
SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of DRAM peak",
    "dram__bytes_read.sum": "MB read",
    "dram__bytes_write.sum": "MB written",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% occupancy",
    "launch__registers_per_thread": "registers",
}
# From the base units in which ncu prints.
_SCALES = {"gpu__time_duration.sum": 1e-3, "dram__bytes_read.sum": 1e-6, "dram__bytes_write.sum": 1e-6}
MOST_KERNELS = 60


def _check(tool: str, backend: str, tools: Tools, emit: Emit) -> dict[str, Any]:
    seconds = tools.seconds(CHECK_SECONDS)
    command = [tools.which("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(ERROR_CODE)]
    # The kernels of CUDA C++ are in this namespace; those of Triton have no name in common.
    command += ["--kernel-regex", "kns=moment_ops"] if backend == "cuda" else []
    within = str(tools.patience * max(seconds - MARGIN_SECONDS, seconds / 3))
    command += tools.module("bench.gpu.small_shapes", backend, "--seconds", within)
    # Otherwise torch hands out parts of large blocks, and what is read beyond a tensor is in the block.
    ended = tools.run(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    found = SUMMARY.findall(ended.text)
    reports = [line for line in ended.text.splitlines() if line.startswith("=========")]
    program = [line for line in ended.text.splitlines() if " calls ran" in line]
    facts = {"verdict": found[-1] if found else "no summary", "program": program[-1] if program else ended.how}
    if ended.code == 0 and found:
        return facts
    facts["log"] = cut_middle("\n".join(reports) or ended.text, 3000)
    if ended.code == ERROR_CODE:
        raise Wrong(facts["verdict"], facts)
    raise RuntimeError(f"{tool}: {ended.how}: {cut_middle(ended.text.strip(), 600)}")


def _profile(backend: str, tools: Tools, emit: Emit) -> dict[str, Any]:
    command = [tools.which("ncu"), "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    # The clocks are not this program's to set.
    command += ["--clock-control", "none", "--metrics", ",".join(METRICS), "--launch-count", str(MOST_KERNELS)]
    ended = tools.run([*command, *tools.module("bench.gpu.main_kernels", backend)], tools.seconds(PROFILE_SECONDS))
    kernels = parse_ncu(ended.text)
    if not kernels:
        raise RuntimeError(f"ncu: {ended.how}: {cut_middle(ended.text.strip(), 600)}")
    return {"kernels": kernels, "ended": ended.how}


def parse_ncu(text: str) -> list[dict[str, Any]]:
    """The rows of ncu's raw CSV page, which stand between what the program and ncu print."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    kernels = []
    for row in rows:
        # The first row has units and no ID.
        if not row.get("ID"):
            continue
        kernel: dict[str, Any] = {"kernel": re.sub(r"\(.*", "", row.get("Kernel Name", "?"))[:80]}
        kernel["grid"] = row.get("Grid Size", "")
        for metric, title in METRICS.items():
            try:
                value = float((row.get(metric) or "").replace(",", ""))
            except ValueError:
                continue
            kernel[title] = round(value * _SCALES.get(metric, 1.0), 2)
        kernels.append(kernel)
    return kernels


def cases(context: Context) -> list[Case]:
    checks = [
        Case(f"{tool}: {backend}", partial(_check, tool, backend), CHECK_SECONDS + 20, backend, {"backend": backend})
        for tool, backend in CHECKS
    ]
    profiles = [
        Case(f"ncu: {backend}", partial(_profile, backend), PROFILE_SECONDS + 20, "cuda", {"backend": backend})
        for backend in ("cuda", "triton")
    ]
    return [*profiles, *checks]
