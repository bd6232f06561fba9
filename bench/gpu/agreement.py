"""Three questions to every operator and loss on every backend: is it right, does it wait, can a graph hold it?"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

import moment_ops as mo
from bench.gpu.cases import Case, Context, Emit, NotThere, Wrong
from bench.gpu.device import BACKENDS, Device
from bench.gpu.exactness import Results, compare
from bench.gpu.operators import DTYPES, OPERATORS, Call, Draw, Operator

# The first call finds averages that start, the second finds them under way.
CALLS = 2
REPLAYS = 3
# Layouts and sizes are the business of the comparison with float64.
FEW_DTYPES = ("float32", "bfloat16")


def _tags(operator: Operator, backend: str, dtype: str) -> Mapping[str, str]:
    return {"family": operator.family, "backend": backend, "dtype": dtype}


def _shard(name: str, operator: Operator, backend: str) -> str:
    """Triton compiles while its operators run for the first time: each of them in a process of its own."""
    return f"{backend}, {name if backend == 'triton' else operator.family}"


def _built(device: Device, operator: Operator, size: str, layout: str, dtype: str) -> Call:
    return operator.build(Draw(size, DTYPES[dtype], layout, device.device))


def _agrees(
    device: Device, operator: Operator, backend: str, dtype: str, size: str, layout: str
) -> dict[str, Any] | None:
    with mo.backend("reference"):
        exact_call = operator.build(Draw(size, DTYPES[dtype], layout, "cpu", exact=True))
        exact = [exact_call() for _ in range(CALLS)][-1]
    with device.backend(backend), device.full_precision():
        call = _built(device, operator, size, layout, dtype)
        results = [call() for _ in range(CALLS)][-1]
    device.synchronize()
    return compare(results, exact, DTYPES[dtype])


def smoke_cases_by_backend(context: Context) -> list[list[Case]]:
    """Every operator, dtype, size and layout."""

    def made(backend: str) -> Iterator[Case]:
        for name, operator in OPERATORS.items():
            for dtype, size, layout in itertools.product(operator.dtypes, operator.sizes, operator.layouts):

                def run(device: Device, emit: Emit, given: Any = (operator, backend, dtype, size, layout)) -> Any:
                    return _agrees(device, *given)

                title = f"{name}: {backend}, {dtype}, {size}, {layout}"
                yield Case(title, run, 60.0, _shard(name, operator, backend), _tags(operator, backend, dtype))

    return [list(made(backend)) for backend in BACKENDS]


def _few(operator: Operator) -> Iterator[tuple[str, str]]:
    """(dtype, size)."""
    size = "aligned" if "aligned" in operator.sizes else operator.sizes[-1]
    return ((dtype, size) for dtype in FEW_DTYPES if dtype in operator.dtypes)


def _does_not_wait(device: Device, operator: Operator, backend: str, dtype: str, size: str) -> None:
    with device.backend(backend):
        call = _built(device, operator, size, "contiguous", dtype)
        call()
        with device.no_sync():
            call()


def _is_captured(device: Device, operator: Operator, backend: str, dtype: str, size: str) -> dict[str, Any]:
    """Replays compute what calls do, bit for bit, from the state that the replays and calls before have left."""
    with device.backend(backend):
        plain, captured = (_built(device, operator, size, "contiguous", dtype) for _ in range(2))
        plain()
        replay = device.capture(captured)
        for i in range(REPLAYS):
            replay.replay()
            expected, got = plain(), replay.outputs()
            device.synchronize()
            if operator.exact_repeats:
                _check_same_bits(got, expected, f"replay {i}")
            else:
                exact = {name: replace(result, value=result.value.cpu().double()) for name, result in expected.items()}
                compare(got, exact, DTYPES[dtype])
        return {"launches": device.launches(plain) if dtype == FEW_DTYPES[0] else None}


def _check_same_bits(got: Results, expected: Results, what: str) -> None:
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(torch.nan_to_num(a, nan=1e30), torch.nan_to_num(b, nan=1e30))

    different = [name for name in expected if not same(got[name].value, expected[name].value)]
    if different:
        raise Wrong(f"{what} differs from the call in {', '.join(different)[:120]}", {"different": different})


def _few_cases(question: Any, excuse: str) -> list[Case]:
    def made() -> Iterator[Case]:
        for backend, (name, operator) in itertools.product(BACKENDS, OPERATORS.items()):
            for dtype, size in _few(operator):

                def run(device: Device, emit: Emit, given: Any = (operator, backend, dtype, size)) -> Any:
                    if given[0].waits:
                        raise NotThere(excuse)
                    return question(device, *given)

                title = f"{name}: {backend}, {dtype}"
                yield Case(title, run, 60.0, backend, _tags(operator, backend, dtype))

    return list(made())


def sync_cases(context: Context) -> list[Case]:
    """Every operator under torch's sync debug mode."""
    return _few_cases(_does_not_wait, "it is said to wait for the device")


def graph_cases(context: Context) -> list[Case]:
    """Every operator captured and replayed."""
    return _few_cases(_is_captured, "it is said to wait for the device")
