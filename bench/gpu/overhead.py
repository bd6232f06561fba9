"""What a call costs on the host: many calls on tiny tensors, which the device finishes before the next one comes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import moment_ops as mo
from bench.gpu.cases import Case, Context, Emit
from bench.gpu.device import BACKENDS, Device
from bench.machine import Call
from moment_ops.ops.relu_moments import relu_moments

CALLS, ROUNDS = 200, 5
ROWS = 8
EAGER = "eager"


def _layers(device: Device, count: int) -> list[Tensor]:
    return [torch.randn(ROWS, 4, 4, 4, device=device.device, requires_grad=True) for _ in range(count)]


def _loss(device: Device, count: int) -> tuple[list[Tensor], mo.MomentLoss]:
    columns = 64 * count
    target = mo.Moments(torch.zeros(columns), torch.ones(columns), shapes=((4, 4, 4),) * count)
    return _layers(device, count), mo.MomentLoss(target, mo.AdamMovingAverage(), process_group=False).to(device.device)


def _moments(device: Device, count: int) -> Call:
    features = [x.detach() for x in _layers(device, count)]
    return lambda: mo.moments(features)


def _forward(device: Device, count: int) -> Call:
    features, loss = _loss(device, count)
    return lambda: loss(features)


def _both(device: Device, count: int) -> Call:
    features, loss = _loss(device, count)
    return lambda: torch.autograd.grad(loss(features), features)


def _tap(device: Device, count: int) -> Call:
    (x,) = _layers(device, 1)
    return lambda: relu_moments(x)


def _covariance(device: Device, count: int) -> Call:
    x = torch.randn(64, 32, device=device.device)
    return lambda: mo.covariance(x)


def _eager(device: Device, count: int) -> Call:
    features = [x.detach() for x in _layers(device, count)]
    return lambda: [(x.mean(0), x.var(0)) for x in features]


CALLED: dict[str, tuple[Callable[[Device, int], Call], int]] = {
    "moments, 1 layer": (_moments, 1),
    "moments, 32 layers": (_moments, 32),
    "MomentLoss, 32 layers": (_forward, 32),
    "MomentLoss and its gradients, 32 layers": (_both, 32),
    "relu_moments": (_tap, 1),
    "covariance, 32 columns": (_covariance, 1),
}
EAGERLY = {"mean and var, 1 layer": (_eager, 1), "mean and var, 32 layers": (_eager, 32)}


def _time(device: Device, call: Call) -> dict[str, Any]:
    """Microseconds per call until the host has them all queued, and until the device has done them."""
    calls = max(round(device.patience * CALLS), 2)
    for _ in range(calls // 2):
        call()
    queued, done = [], []
    for _ in range(ROUNDS):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        queued.append(time.perf_counter() - start)
        device.synchronize()
        done.append(time.perf_counter() - start)
    facts = {"host_us": 1e6 * sorted(queued)[ROUNDS // 2] / calls, "done_us": 1e6 * sorted(done)[ROUNDS // 2] / calls}
    return facts | {"launches": device.launches(call)}


def cases(context: Context) -> list[Case]:
    def made() -> Iterator[Case]:
        for name, (build, count) in (CALLED | EAGERLY).items():
            for backend in [EAGER] if name in EAGERLY else BACKENDS:

                def run(device: Device, emit: Emit, given: Any = (build, count, backend)) -> dict[str, Any]:
                    build, count, backend = given
                    if backend == EAGER:
                        return _time(device, build(device, count))
                    with device.backend(backend):
                        return _time(device, build(device, count))

                yield Case(f"{name}: {backend}", run, 40.0, tags={"backend": backend})

    return list(made())
