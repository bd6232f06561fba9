"""What a launch compiles to, read from its machine code; needs no GPU and no driver."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from moment_ops.kernels._launch import Launch
from specs import machine_code as code

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses; accesses are instructions in the machine code.

    in_flight: bytes that a thread has on their way from global memory (machine_code.py says when); blocks: that a
    processor has room for; processor_in_flight: bytes of all their threads; round_trips: to memory, outside of loops.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    matrix_products: int = 0
    in_flight: int = 0
    blocks: int = 0
    processor_in_flight: int = 0
    round_trips: int = 0


@dataclass(frozen=True)
class Budget:
    """Bounds on Resources; stack and spills are always 0."""

    registers: int
    shared: int
    wide_loads: int = 0  # at least
    narrow_loads: int | None = None
    wide_stores: int = 0  # at least
    narrow_stores: int | None = None
    matrix_products: int = 0  # at least
    processor_in_flight: int = 0  # at least
    round_trips: int | None = None

    def violations(self, got: Resources) -> list[str]:
        """The names of the resources that are outside of the budget."""
        most = {
            "registers": self.registers,
            "stack": 0,
            "spills": 0,
            "shared": self.shared,
            "narrow_loads": self.narrow_loads,
            "narrow_stores": self.narrow_stores,
            "round_trips": self.round_trips,
        }
        least = {
            "wide_loads": self.wide_loads,
            "wide_stores": self.wide_stores,
            "matrix_products": self.matrix_products,
            "processor_in_flight": self.processor_in_flight,
        }
        values = asdict(got)
        over = [name for name, limit in most.items() if limit is not None and values[name] > limit]
        return over + [name for name, limit in least.items() if values[name] < limit]


@dataclass(frozen=True)
class Spec:
    """A kernel as it is launched for typical tensors, and its budget."""

    name: str
    launch: Callable[[], Launch]
    budget: Callable[[Launch], Budget]
    architectures: tuple[int, ...]


def specialization(launch: Launch, architecture: int | str) -> tuple[Any, ...]:
    """(signature, constants, attributes, options): all that a launch on a GPU is compiled for, and remembered by.

    architecture: a compute capability, 90, or AMD's, "gfx942".
    """
    kernel = launch.kernel
    backend = make_backend(_target(architecture))
    keywords = {**launch.arguments, **launch.options(isinstance(architecture, str)), "debug": False}
    # As JITFunction.run does, which wants a driver.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, found, options = bind(**keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, found, options)
    return signature, constants, attributes, options


def _target(architecture: int | str) -> GPUTarget:
    return GPUTarget("hip", architecture, 64) if isinstance(architecture, str) else GPUTarget("cuda", architecture, 32)


def compile_launch(launch: Launch, architecture: int | str) -> Any:
    """Compile what a launch would compile on a GPU; needs no driver."""
    signature, constants, attributes, options = specialization(launch, architecture)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=_target(architecture), options=options.__dict__)


def machine_code(compiled: Any) -> code.Function:
    """The machine code, read with the tools that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (function,) = code.functions(cubin).values()
    return function


def resources(compiled: Any) -> Resources:
    """What the machine code uses."""
    function = machine_code(compiled)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = function.resident_blocks(warps, shared)
    in_flight = round(function.in_flight)
    return Resources(
        registers=function.registers,
        stack=function.stack,
        spills=function.spills,
        shared=shared,
        wide_loads=function.loads(wide=True),
        narrow_loads=function.loads(wide=False),
        wide_stores=function.stores(wide=True),
        narrow_stores=function.stores(wide=False),
        matrix_products=function.matrix_products,
        in_flight=in_flight,
        blocks=blocks,
        processor_in_flight=blocks * 32 * warps * in_flight,
        round_trips=round(function.straight_flight.round_trips),
    )


def without_alignment(launch: Launch) -> Launch:
    """The same launch, compiled as if nothing were known about alignment."""
    return with_constants(launch, layers={"VECTOR": 1})


def is_record(value: Any) -> bool:
    """Whether a kernel knows the entries by name."""
    return hasattr(value, "_fields")


def named(launch: Launch) -> dict[str, Any]:
    """Arguments by name, and entries of records by `record.entry`; constants are values."""
    return dict(_named(launch.arguments))


def _named(arguments: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        yield prefix + name, value.value if isinstance(value, tl.constexpr) else value
        if is_record(value):
            yield from _named(value._asdict(), f"{prefix}{name}.")


def with_constants(launch: Launch, **records: dict[str, Any]) -> Launch:
    """The same launch with other constants in its records."""
    arguments = dict(launch.arguments)
    for name, constants in records.items():
        values = {constant: tl.constexpr(value) for constant, value in constants.items()}
        arguments[name] = arguments[name]._replace(**values)
    return replace(launch, arguments=arguments)


def table(rows: Sequence[tuple[str, Resources | None, Resources]]) -> str:
    """Resources of named kernels, `old -> new` where they differ from those before."""
    names = list(Resources.__dataclass_fields__)
    width = max(len(name) for name, _, _ in rows) + 2
    lines = ["kernel".ljust(width) + "".join(name.rjust(15) for name in names)]
    for name, old, new in rows:
        cells = []
        for field in names:
            before, now = getattr(old, field, None), getattr(new, field)
            cells.append((f"{now}" if before in (None, now) else f"{before} -> {now}").rjust(15))
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def recorded(path: Path) -> dict[str, Resources]:
    """The resources that were recorded last, by `kernel, sm_xx`."""
    return {name: Resources(**values) for name, values in json.loads(path.read_text()).items()}
