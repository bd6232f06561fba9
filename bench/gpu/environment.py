"""What there is: driver, device, tools, versions, and the library, built from source where it does not load."""

import importlib.metadata
import json
import os
import platform
import time
from functools import partial
from typing import Any

from bench.gpu.cases import Case, Context, Emit, Wrong
from bench.gpu.records import cut_middle
from bench.gpu.tools import ROOT, Ended, Tools

# What nvidia-smi is asked for; a driver that does not know all of the first refuses them all.
QUERIES = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,power.draw,"
    "temperature.gpu,memory.total,memory.used,ecc.mode.current,mig.mode.current",
    "name,driver_version,clocks.sm,clocks.mem",
)
# Each tool, and how it tells its version.
TOOLS = {
    "nvcc": ["--version"],
    "gcc": ["--version"],
    "ninja": ["--version"],
    "compute-sanitizer": ["--version"],
    "ncu": ["--version"],
}
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "ninja", "setuptools", "torchvision", "timm")
BUILD_SECONDS = 240.0
# The one name that setup.py builds.
LIBRARY = "moment_ops/_C.abi3.so"


def clocks(tools: Tools) -> dict[str, str]:
    """What nvidia-smi says of the device now."""
    said = ""
    for query in QUERIES:
        ended = tools.run([tools.which("nvidia-smi"), f"--query-gpu={query}", "--format=csv,noheader"], 20)
        names, line = query.split(","), next(iter(ended.text.strip().splitlines()), "")
        values = [value.strip() for value in line.split(",")]
        if ended.code == 0 and len(values) == len(names):
            return dict(zip(names, values, strict=True))
        said = f"{ended.how}: {cut_middle(ended.text, 300)}"
    raise RuntimeError(f"nvidia-smi: {said}")


def _smi(tools: Tools, emit: Emit) -> dict[str, Any]:
    return dict(clocks(tools))


def _version(tool: str, tools: Tools, emit: Emit) -> dict[str, Any]:
    ended = tools.run([tools.which(tool), *TOOLS[tool]], 30)
    if ended.code != 0:
        raise RuntimeError(f"{tool}: {ended.how}: {cut_middle(ended.text, 300)}")
    lines = [line for line in ended.text.splitlines() if any(character.isdigit() for character in line)]
    return {"version": max(lines, key=lambda line: "release" in line.lower() or "version" in line.lower())}


def _machine(tools: Tools, emit: Emit) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cores = len(os.sched_getaffinity(0))
    return {"python": platform.python_version(), "platform": platform.platform(), "cores": cores, "packages": versions}


def _probe(tools: Tools) -> tuple[dict[str, Any] | None, Ended]:
    """What the probe says, if it lives to say it."""
    ended = tools.run(tools.module("bench.gpu.probe"), tools.seconds(90))
    lines = ended.text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if ended.code == 0 and lines else None, ended
    except json.JSONDecodeError:
        return None, ended


def _library(tools: Tools, emit: Emit) -> dict[str, Any]:
    """Loads what is there; where that has no CUDA kernels that run here, builds from source and loads that."""
    library = ROOT / LIBRARY
    facts: dict[str, Any] = {"found": library.exists()}
    before, ended = _probe(tools)
    facts["as_found"] = before or {"does_not_load": f"{ended.how}: {cut_middle(ended.text, 600)}"}
    emit(facts)
    if before and "cuda" not in before["unavailable"] and not tools.context.force_build:
        return facts
    start = time.perf_counter()
    built = tools.run(tools.build_command(), tools.seconds(BUILD_SECONDS), _build_environment(before))
    facts["build"] = {"seconds": round(time.perf_counter() - start, 1), "ended": built.how}
    facts["build"]["log"] = cut_middle(built.text, 2000)
    emit(facts)
    after, ended = _probe(tools)
    facts["as_built"] = after or {"does_not_load": f"{ended.how}: {cut_middle(ended.text, 600)}"}
    if after is None:
        if library.exists():
            facts["set_aside"] = library.rename(library.with_suffix(".broken")).name
        raise Wrong("the library does not load; it was set aside, so that Triton can run", facts)
    if built.code != 0 or "cuda" in after["unavailable"]:
        reason = after["unavailable"].get("cuda", "")
        raise Wrong(f"the build ended with {built.how}; no CUDA kernels: {reason}", facts)
    return facts


def _build_environment(probed: dict[str, Any] | None) -> dict[str, str]:
    """For this device alone: a third of the time."""
    capability = (probed or {}).get("device", {}).get("capability")
    return {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}


def cases(context: Context) -> list[Case]:
    return [
        Case("nvidia-smi", _smi, 30),
        Case("machine", _machine, 30),
        *(Case(tool, partial(_version, tool), 40) for tool in TOOLS),
        Case("library", _library, BUILD_SECONDS + 190),
    ]
