"""What a call costs before any kernel runs: `python -m bench.bench_overhead`.

Tensors are tiny, one thread runs, and CPU time of that thread is counted. Machines differ by factors, so the unit is
one call of `torch.relu` without gradient, timed in turns with each case; a backward is compared with a bare
`autograd.Function` that calls the same kernels on the same tensors.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import moment_ops as mo
from bench import environment
from bench.machine import pytorch_calls
from moment_ops.ops.relu_moments import identity_moments, relu_moments

Call = Callable[[], object]

LAYERS, SHAPE, ROWS = 32, (4, 1, 2), 4
COLUMNS = LAYERS * 8
ROUNDS, SAMPLE_SECONDS = 25, 2e-3
NATIVE = torch.ops.moment_ops


@dataclass(frozen=True)
class Case:
    """A call, how many taps it makes, and what it may cost: in units, or as a multiple of another call."""

    name: str
    call: Call
    limit: float
    taps: int = 1
    against: Call | None = None


@dataclass(frozen=True)
class Result:
    """Median cost of a case per tap, in units or as a multiple of the bare calls, and what it enters PyTorch for."""

    name: str
    microseconds: float
    cost: float
    limit: float
    unit: str
    operators: float


def _per_call(call: Call, repeat: int) -> float:
    start = time.thread_time()
    for _ in range(repeat):
        call()
    return (time.thread_time() - start) / repeat


def _repeat(call: Call) -> int:
    """Calls that fill a sample."""
    for _ in range(10):
        call()
    return max(1, round(SAMPLE_SECONDS / max(_per_call(call, 5), 1e-7)))


def measure(case: Case, unit: Call) -> Result:
    """A case and what it is compared with, in turns."""
    other = case.against or unit
    repeats = _repeat(case.call), _repeat(other)
    pairs = [(_per_call(case.call, repeats[0]), _per_call(other, repeats[1])) for _ in range(ROUNDS)]
    taps = 1 if case.against else case.taps
    return Result(
        case.name,
        1e6 * statistics.median(ours for ours, _ in pairs) / case.taps,
        statistics.median(ours / theirs for ours, theirs in pairs) / taps,
        case.limit,
        "bare calls" if case.against else "relu",
        pytorch_calls(case.call) / case.taps,
    )


class _BareMoments(torch.autograd.Function):
    """What nobody can do with less: the kernels, their outputs, and a node."""

    @staticmethod
    def forward(ctx, *input):
        mean, var = torch.empty(COLUMNS), torch.empty(COLUMNS)
        NATIVE.moments.native(input, 0, 1, mean, var)
        ctx.save_for_backward(mean, *input)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        mean, *input = ctx.saved_tensors
        count = torch.full((LAYERS,), ROWS, dtype=torch.int64)
        out = [torch.empty_like(x) for x in input]
        NATIVE.moments_backward.native([], grad_mean, grad_var, input, mean, count, 0, 1, None, out)
        return tuple(out)


class _BareLoss(torch.autograd.Function):
    """Likewise, of the loss with ADAM's average."""

    @staticmethod
    def forward(ctx, arguments, *input):
        target_mean, target_var, options, state = arguments
        loss, mean = torch.empty(()), torch.empty(COLUMNS)
        grad_mean, grad_var = torch.empty(COLUMNS), torch.empty(COLUMNS)
        NATIVE.match_.native(
            None, None, input, 1, target_mean, target_var, 1.0, 1.0, None, None, 1 / COLUMNS, 2, options, state, True,
            loss, mean, grad_mean, grad_var,
        )  # fmt: skip
        ctx.save_for_backward(mean, grad_mean, grad_var, *input)
        return loss

    @staticmethod
    def backward(ctx, grad):
        mean, grad_mean, grad_var, *input = ctx.saved_tensors
        count = torch.full((LAYERS,), ROWS, dtype=torch.int64)
        out = [torch.empty_like(x) for x in input]
        NATIVE.moments_backward.native([], grad_mean, grad_var, input, mean, count, 0, 1, grad, out)
        return None, *out


class _Chain(nn.Module):
    """A network of ReLUs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.relus = nn.Sequential(*(nn.ReLU() for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.relus(x)


def _chain(tap: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], x: Tensor) -> Call:
    """Forward and backward through taps in a row, each with gradients of its moments."""

    def call() -> object:
        y, statistics = x, []
        for _ in range(LAYERS):
            y, mean, var = tap(y)
            statistics += [mean, var]
        return torch.autograd.grad(torch.cat(statistics).sum() + y.sum(), x)

    return call


def cases() -> list[Case]:
    """The calls of a training step, and their limits."""
    inputs = [torch.randn(ROWS, *SHAPE) for _ in range(LAYERS)]
    wanted = [x.clone().requires_grad_() for x in inputs]
    x, x_wanted, bias = inputs[0], wanted[0], torch.randn(SHAPE[0])
    grads = torch.ones(COLUMNS), torch.ones(COLUMNS)
    target = mo.Moments(torch.zeros(COLUMNS), torch.ones(COLUMNS), shapes=(SHAPE,) * LAYERS)
    average = mo.AdamMovingAverage()
    loss = mo.MomentLoss(target, average, process_group=False)
    state = [torch.zeros(COLUMNS) for _ in range(6)] + [torch.zeros((), dtype=torch.int64)]
    arguments = target.mean, target.var, average.options(COLUMNS), state
    extractor = mo.MomentExtractor(_Chain())

    def moments_both() -> object:
        m = mo.moments(wanted)
        return torch.autograd.grad((m.mean, m.var), wanted, grads)

    def extractor_both() -> object:
        m = extractor(x_wanted)
        return torch.autograd.grad((m.mean, m.var), x_wanted, grads)

    return [
        Case("tap", lambda: relu_moments(x), 8),
        Case("tap with a bias", lambda: relu_moments(x, bias), 8),
        Case("identity tap", lambda: identity_moments(x), 8),
        Case("tap of an extractor", lambda: extractor(x), 12, LAYERS),
        Case("tap, forward + backward", _chain(lambda y: relu_moments(y, bias), x_wanted), 45, LAYERS),
        Case("identity tap, forward + backward", _chain(identity_moments, x_wanted), 45, LAYERS),
        Case("tap of an extractor, forward + backward", extractor_both, 45, LAYERS),
        Case("moments of 32 layers", lambda: mo.moments(inputs), 60),
        Case("moment_loss of 32 layers", lambda: mo.moment_loss(inputs, target), 60),
        Case("MomentLoss of 32 layers, ADAM", lambda: loss(inputs), 60),
        Case(
            "moments, forward + backward",
            moments_both,
            1.5,
            against=lambda: torch.autograd.grad(_BareMoments.apply(*wanted), wanted, grads),
        ),
        Case(
            "MomentLoss, forward + backward",
            lambda: torch.autograd.grad(loss(wanted), wanted),
            1.5,
            against=lambda: torch.autograd.grad(_BareLoss.apply(arguments, *wanted), wanted),
        ),
    ]


def table(results: list[Result]) -> str:
    lines = ["| call | us | cost | limit | operators |", "|---|---:|---:|---:|---:|"]
    for r in results:
        late = "" if r.cost <= r.limit else " (not met)"
        lines.append(
            f"| {r.name} | {r.microseconds:.1f} | {r.cost:.2f} {r.unit} | {r.limit:g}{late} | {r.operators:.1f} |"
        )
    return "\n".join(lines)


def triton_table(unit: Call) -> str:
    """Look-ups and launches of Triton's kernels; empty where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return ""
    from bench import triton_launches

    lines = [f"| Triton call, {LAYERS} layers or one tap | us | relu | launches |", "|---|---:|---:|---:|"]
    for name, call in triton_launches.look_ups([torch.randn(ROWS, *SHAPE) for _ in range(LAYERS)]).items():
        r = measure(Case(name, call, 0.0), unit)
        lines.append(f"| {name} | {r.microseconds:.1f} | {r.cost:.1f} | {triton_launches.launches(call)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_overhead", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(ROWS, *SHAPE)
    results = [measure(case, lambda: torch.relu(x)) for case in cases() if options.only in case.name]
    described = environment.describe()
    print(table(results))
    if not options.only:
        print(triton_table(lambda: torch.relu(x)))
    print(environment.line(described))
    if options.output:
        found = {"environment": described, "results": [asdict(r) for r in results]}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
