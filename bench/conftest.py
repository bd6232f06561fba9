"""`pytest bench --benchmark-only`: every contestant on its own, for statistics and comparisons by pytest-benchmark."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.command_line import OPERATORS, bench_class
from bench.harness import BOTH, FORWARD, Bench, Entry
from bench.machine import Cpu
from bench.workloads import DTYPES, WORKLOADS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workload", choices=tuple(WORKLOADS), default="digits", help="layers to run on")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operator = metafunc.function.__name__.removeprefix("test_")
    if operator not in OPERATORS:
        return
    workload = metafunc.config.getoption("workload")
    contestants = bench_class(operator).contestants
    metafunc.parametrize("bench", [(operator, workload, dtype) for dtype in DTYPES], indirect=True, ids=DTYPES)
    metafunc.parametrize("entry", contestants, indirect=True, ids=contestants)
    metafunc.parametrize("direction", (FORWARD, BOTH))


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Bench:
    operator, workload, dtype = request.param
    return bench_class(operator)(WORKLOADS[workload], dtype)


@pytest.fixture(scope="module")
def entry(request: pytest.FixtureRequest, bench: Bench) -> Entry:
    """A contestant whose results were found right."""
    torch.compiler.reset()
    entry = bench.entry(request.param)
    error = entry.error()
    if not error <= bench.tolerance:
        pytest.fail(f"{request.param}: error against float64 {error:.1e}, tolerance {bench.tolerance:.0e}")
    return entry


@pytest.fixture
def call(bench: Bench, entry: Entry, direction: str, benchmark: Any) -> Callable[[], object]:
    """What is timed, in a group with the other contestants."""
    Cpu().prepare()
    benchmark.group = f"{bench.operator}, {bench.workload.name}, {bench.dtype_name}, {direction}"
    entry.calls[direction]()
    return entry.calls[direction]
