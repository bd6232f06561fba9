"""The processes of a training: one alone, or those that torchrun started. The first writes all files.

Every process draws the latent vectors and the data of the whole batch, and takes its own rows, so that results do not
depend on the number of processes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import moment_ops as mo
from moment_ops.distributed import merge_ranks
from moment_ops.training.devices import choose_device
from moment_ops.training.errors import TrainingError

Result = TypeVar("Result")


class OnOneProcess(TrainingError):
    """An error that only this process has. The others wait for it in vain, and end as well."""


class OnAnotherProcess(TrainingError):
    """The end of a process whose error another one reports."""


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and messages."""
    return size() == 1 or dist.get_rank() == 0


def started() -> int:
    """How many processes torchrun started; 1 for a process alone."""
    return int(os.environ.get("WORLD_SIZE", 1))


def started_as() -> int:
    """The rank that torchrun gave to this process, before the processes know each other; 0 for a process alone."""
    return int(os.environ.get("RANK", 0)) if started() > 1 else 0


@contextmanager
def joined(device_name: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and yield the device of this one.

    Raises:
        TrainingError: the device cannot be used, or the processes do not find each other.
    """
    if started() == 1:
        yield choose_device(device_name)
        return
    try:
        device = own_device(device_name)
        # CPU tensors, such as the time and the signals, go through gloo on a GPU too.
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise OnOneProcess(str(error).splitlines()[0]) from error
    try:
        yield device
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device of this process: with CUDA, the one of its number on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:"):
        raise TrainingError(f"--device: got {name}, expected cuda: each process takes the GPU of its number")
    if name != "cuda":
        return choose_device(name)
    number, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= found:
        raise TrainingError(f"device cuda: got process {number + 1} on this machine, which has {found} GPUs")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def own_rows(rows: int) -> slice:
    """The rows of this process out of those of the whole batch. The first processes may have one more."""
    if size() == 1:
        return slice(0, rows)
    share, more = divmod(rows, size())
    rank = dist.get_rank()
    start = rank * share + min(rank, more)
    return slice(start, start + share + (rank < more))


def agree(seconds: float, signal_number: int | None) -> tuple[float, int | None]:
    """The time of the first process, and the signal that any process received: the same on all of them.

    The schedule of the learning rate follows the time, so that processes need the same. One small collective on the
    CPU, which does not wait for a GPU.
    """
    if size() == 1:
        return seconds, signal_number
    told = torch.tensor([seconds if is_first() else 0.0, signal_number or 0], dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told[0].item(), int(told[1]) or None


def from_first(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns on the first process, on all of them, with tensors on the CPU on the others.

    It is called on the first alone. It returns tensors and plain containers, as a checkpoint.
    """
    if size() == 1:
        return make()
    device, told = torch.device("cpu"), [b""]
    if not is_first():
        dist.broadcast_object_list(told, device=device)
        if not told[0]:
            raise OnAnotherProcess("the first process ended with an error")
        return torch.load(io.BytesIO(told[0]), map_location=device, weights_only=True)
    try:
        result, buffer = make(), io.BytesIO()
        torch.save(result, buffer)
        told = [buffer.getvalue()]
        return result
    finally:
        # After an error too, so that the others do not wait.
        dist.broadcast_object_list(told, device=device)


def first_then_others(make: Callable[[], Result]) -> Result:
    """What ``make`` returns, called on every process, on the first before the others."""
    if size() == 1:
        return make()
    result: list[Result] = []

    def first() -> dict[str, Any]:
        result.append(make())
        return {}

    from_first(first)
    if is_first():
        return result[0]
    try:
        return make()
    except TrainingError as error:
        raise OnOneProcess(str(error)) from error


@contextmanager
def lost_processes(describe: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a collective, which the end of another process causes, into an error of one line."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if size() == 1 or isinstance(error, TrainingError) or not is_lost_connection(error):
            raise
        raise TrainingError(f"another process of the training ended; {describe()}") from error


def is_lost_connection(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection"))


def merged(moments: mo.Moments) -> mo.Moments:
    """The moments of the rows of all processes together. Those of a process without rows are NaN, and do not count."""
    if size() == 1:
        return moments
    assert moments.count is not None
    mean, var, count = merge_ranks(
        moments.mean,
        moments.var,
        moments.count,
        moments.correction,
        sizes=moments.sizes,
        pivot=torch.zeros_like(moments.mean),
        new_correction=moments.correction,
        process_group=None,
    )
    return mo.Moments(mean, var, None, count, moments.correction, moments.shapes, moments.names)


def average_gradients(parameters: Iterator[Tensor]) -> None:
    """Average the gradients over the processes, as DistributedDataParallel does, with one collective."""
    if size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    packed = torch.cat([gradient.reshape(-1) for gradient in gradients]) / size()
    dist.all_reduce(packed)
    for gradient, mean in zip(gradients, packed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
