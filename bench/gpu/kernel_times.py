"""The kernels on their own: captured, over inputs that are not in the cache, beside a copy in the same turns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.baselines import BETAS, EPS, LR
from bench.gpu.cases import Case, Context, Emit, NotThere
from bench.gpu.device import BACKENDS, Device
from bench.gpu.targets import KERNELS
from bench.machine import Call
from bench.workloads import DTYPES, Workload, make_features, make_vectors
from moment_ops.ops import triangle

OPS = torch.ops.moment_ops
SECONDS = 0.6
COPY = "copy"


@dataclass(frozen=True)
class Inputs:
    """The features of one step and what goes with them."""

    features: list[Tensor]
    vectors: tuple[Tensor, Tensor]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.itemsize for x in self.features)

    @property
    def columns(self) -> int:
        return len(self.vectors[0])

    @property
    def vector_bytes(self) -> int:
        return 4 * self.columns

    def state(self) -> list[Tensor]:
        step = torch.zeros((), dtype=torch.int64, device=self.vectors[0].device)
        return [*(torch.zeros_like(self.vectors[0]) for _ in range(6)), step]


# From inputs to a call, and the bytes that it has to move.
Build = Callable[[Inputs], tuple[Call, int]]


def match_forward(inputs: Inputs) -> tuple[Call, int]:
    state, scale = inputs.state(), 1 / inputs.columns
    options = [LR, *BETAS, EPS, 2 * scale]
    arguments = (*inputs.vectors, 1.0, 1.0, None, None, scale, "adam", options, state, True)
    # Two targets are read, the state is read and written, the mean and two derivatives are written.
    return lambda: OPS.match_.features(inputs.features, 1, *arguments), inputs.bytes + 17 * inputs.vector_bytes


def moments_forward(inputs: Inputs) -> tuple[Call, int]:
    moved = inputs.bytes + 2 * inputs.vector_bytes
    return lambda: OPS.moments.default(inputs.features, 0, 1, True), moved


def _backward(inputs: Inputs, added: list[Tensor]) -> tuple[Call, int]:
    mean, _, count = OPS.moments.default(inputs.features, 0, 1, True)
    moved = (2 + bool(added)) * inputs.bytes + 3 * inputs.vector_bytes
    return lambda: OPS.moments_backward.default(
        added, *inputs.vectors, inputs.features, mean, count, 0, 1, None
    ), moved  # fmt: skip


def moments_backward(inputs: Inputs) -> tuple[Call, int]:
    return _backward(inputs, [])


def moments_backward_joined(inputs: Inputs) -> tuple[Call, int]:
    return _backward(inputs, [torch.ones_like(x) for x in inputs.features])


def tap_forward(inputs: Inputs) -> tuple[Call, int]:
    def call() -> Any:
        for x in inputs.features:
            OPS.relu_moments.default(x, None, 1)

    return call, 2 * inputs.bytes + 2 * inputs.vector_bytes


def tap_backward(inputs: Inputs) -> tuple[Call, int]:
    sizes = [x[0].numel() for x in inputs.features]
    vectors = list(zip(*(vector.split(sizes) for vector in inputs.vectors), strict=True))
    steps = []
    for x, (grad_mean, grad_var) in zip(inputs.features, vectors, strict=True):
        y, mean, _ = OPS.relu_moments.default(x, None, 1)
        steps.append((torch.ones_like(y), grad_mean, grad_var, y, mean, 1))

    def call() -> Any:
        for step in steps:
            OPS.relu_moments_backward.default(*step)

    return call, 3 * inputs.bytes + 3 * inputs.vector_bytes


def covariance_forward(inputs: Inputs, precision: str = "ieee") -> tuple[Call, int]:
    rows = [x.flatten(1) for x in inputs.features]
    targets = [triangle.pack(torch.eye(x.shape[1], device=x.device)) for x in rows]
    matrix = sum(4 * target.numel() for target in targets)
    arguments = (1, targets, [1.0] * len(rows), "none", [], [], False, True, precision)
    return lambda: OPS.covariance_match_.default(rows, *arguments), inputs.bytes + 2 * matrix


def covariance_forward_bf16x3(inputs: Inputs) -> tuple[Call, int]:
    return covariance_forward(inputs, "bf16x3")


def full_product(inputs: Inputs) -> tuple[Call, int]:
    rows = [x.flatten(1) for x in inputs.features]
    matrix = sum(x.itemsize * x.shape[1] ** 2 for x in rows)
    return lambda: [torch.mm(x.T, x) for x in rows], inputs.bytes + matrix


def gram_both(inputs: Inputs) -> tuple[Call, int]:
    """Products of rows with samples of the same shapes, and the gradients of the rows."""
    rows = [x.flatten(1) for x in inputs.features]
    groups = [*rows, *(x.flip(0) for x in rows)]
    shift = [x[0].float() for x in groups]
    wanted = [i < len(rows) for i in range(len(groups))]

    def call() -> Any:
        return OPS.gram_backward.default(OPS.gram.default(groups, shift, len(rows)), groups, shift, wanted)

    return call, 5 * inputs.bytes


@dataclass(frozen=True)
class Kernel:
    """A kernel to time."""

    name: str
    family: str
    workload: str
    build: Build
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rivals: tuple[tuple[str, Build], ...] = ()


MM = (("torch.mm", full_product),)
ALL = (
    Kernel("match, forward", "match", "gfmn", match_forward),
    Kernel("moments, backward", "moments", "gfmn", moments_backward),
    Kernel("moments, forward", "moments", "gfmn", moments_forward),
    Kernel("relu_moments, forward", "relu_moments", "vgg19", tap_forward),
    Kernel("relu_moments, backward", "relu_moments", "vgg19", tap_backward),
    Kernel("covariance loss, forward", "covariance", "d2048", covariance_forward, rivals=MM),
    Kernel("covariance loss, forward, bf16x3", "covariance", "d2048", covariance_forward_bf16x3, ("float32",), MM),
    Kernel("gram, forward + backward", "gram", "vgg19", gram_both),
    Kernel("covariance loss, forward", "covariance", "d8192", covariance_forward, ("bfloat16",), MM),
    Kernel("covariance loss, forward, bf16x3", "covariance", "d8192", covariance_forward_bf16x3, ("float32",), MM),
    Kernel("moments, backward, joined", "moments", "gfmn", moments_backward_joined),
)


def _inputs(device: Device, workload: Workload, dtype: str) -> Iterator[Inputs]:
    """As many as exceed the cache."""
    for seed in range(device.input_sets(workload.bytes(DTYPES[dtype]))):
        features = [x.detach() for x in make_features(workload, DTYPES[dtype], device.device, seed)]
        yield Inputs(features, make_vectors(workload, device.device, seed + 1))


def _calls(device: Device, build: Build, sets: list[Inputs], backend: str) -> tuple[list[Call], int]:
    with device.backend(backend):
        built = [build(inputs) for inputs in sets]

    def forced(call: Call) -> Call:
        def run() -> Any:
            with device.backend(backend):
                return call()

        return run

    return [forced(call) for call, _ in built], built[0][1]


def _time(device: Device, kernel: Kernel, backend: str, dtype: str) -> dict[str, Any]:
    if (kernel.family, backend, dtype) not in device.context.trusted:
        raise NotThere(f"{kernel.family} on {backend} in {dtype} was not seen to agree with float64")
    device.begin()
    device.prepare()
    workload = device.workload(kernel.workload)
    sets = list(_inputs(device, workload, dtype))
    ours, moved = _calls(device, kernel.build, sets, backend)
    copy = device.probes(0)["read_write"]
    calls = {kernel.name: ours, COPY: [copy.call]}
    for name, build in kernel.rivals:
        calls[name] = _calls(device, build, sets, "reference")[0]
    times = device.replayed(calls, SECONDS)
    facts: dict[str, Any] = {
        "clocks": device.clocks(),
        "kernel": kernel.name,
        "workload": kernel.workload,
        "dtype": dtype,
        "backend": backend,
    }
    facts |= {"times": times, "bytes": moved, "copy_gb_per_s": copy.bytes / times[COPY]["median_ms"] / 1e6}
    milliseconds = times[kernel.name]["median_ms"]
    facts["us"] = 1e3 * milliseconds
    facts["share_of_copy"] = moved / milliseconds / 1e6 / facts["copy_gb_per_s"]
    facts["factors"] = {name: times[name]["median_ms"] / milliseconds for name, _ in kernel.rivals}
    target = KERNELS.get((kernel.name, kernel.workload, dtype))
    return facts | ({"target": str(target)} if target else {})


def cases(context: Context) -> list[Case]:
    """The most important first; the reference moves more bytes than these count."""

    def made() -> Iterator[Case]:
        for kernel in ALL:
            for dtype in kernel.dtypes:
                for backend in BACKENDS[:-1]:

                    def run(device: Device, emit: Emit, given: Any = (kernel, backend, dtype)) -> dict[str, Any]:
                        return _time(device, *given)

                    tags = {"family": kernel.family, "backend": backend, "dtype": dtype}
                    title = f"{kernel.name}: {backend}, {kernel.workload}, {dtype}"
                    yield Case(title, run, 60.0, tags=tags)

    return list(made())
