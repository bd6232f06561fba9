"""A kernel with a test that the compiler breaks: of a product, `value - value` is contracted, and not zero."""

import torch
import triton
import triton.language as tl

from moment_ops.kernels._launch import Launch


@triton.jit
def is_finite_by_difference(value):
    return value - value == 0


@triton.jit
def update_where_finite(m2, factor, state, SIZE: tl.constexpr):
    """As a state is updated: with a variance, where it is finite."""
    lane = tl.arange(0, SIZE)
    value = tl.load(m2 + lane) * tl.load(factor)
    tl.store(state + lane, tl.where(is_finite_by_difference(value), value, tl.load(state + lane)))


SIZE = 128


def arguments() -> dict[str, object]:
    """Products that have more digits than float32, and one that is infinite."""
    m2 = torch.arange(1, SIZE + 1, dtype=torch.float32) / 3
    m2[5] = float("inf")
    return {"m2": m2, "factor": torch.tensor(0.1), "state": torch.full((SIZE,), -1.0), "SIZE": SIZE}


def launch(values: dict[str, object]) -> Launch:
    return Launch(update_where_finite, 1, values, 4)


if __name__ == "__main__":
    # In the interpreter, where nothing is contracted.
    given = arguments()
    update_where_finite[(1,)](**given)
    print(given["state"].tolist())
