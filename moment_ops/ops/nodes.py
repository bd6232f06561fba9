"""Derivatives in two forms: for ordinary calls, and for those under the transforms of `torch.func`.

A transform wants a Function with a `setup_context`, for which torch binds a signature at every call: 20 us. Ordinary
calls take a form without; both are made from the same parts. Under `vmap` the problems of a batch run one by one.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.utils import _pytree as pytree

from moment_ops.ops.library import LIBRARY

_Function = type[torch.autograd.Function]
# The outputs of a node, and what it keeps for its backward alone, as constants.
Computed: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
# The number of outputs of a node that keeps nothing, where it differs between calls.
MANY = sys.maxsize


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


class _OneByOne(threading.local):
    """Whether this thread is at the problems of a batch."""

    active = False


_one_by_one = _OneByOne()


def under_vmap() -> bool:
    """Whether what runs now runs once per problem of a batch, or for all of them together."""
    if _one_by_one.active:
        return True
    stack = torch._C._functorch.get_interpreter_stack() if is_transformed() else None
    return any(level.key() == TransformType.Vmap for level in stack or ())


def wants_grad(x: Tensor) -> bool:
    """Whether x may want a gradient: of a tensor within a transform only the transform knows."""
    return x.requires_grad or (is_transformed() and torch._C._functorch.is_functorch_wrapped_tensor(x))


def _run_one_by_one(function: _Function, size: int, dims: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The rule for `vmap`: outputs of all problems, stacked, and where they are stacked."""
    if size == 0:
        raise RuntimeError(f"{function.__name__}: got a batch of no problems under vmap")
    leaves, spec = pytree.tree_flatten(inputs)
    places = pytree.tree_leaves(dims)
    outer, _one_by_one.active = _one_by_one.active, True
    try:
        results = []
        for i in range(size):
            chosen = [x if at is None else x.select(at, i) for x, at in zip(leaves, places, strict=True)]
            results.append(function.apply(*pytree.tree_unflatten(chosen, spec)))
    finally:
        _one_by_one.active = outer
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])


def _transformed(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> _Function:
    """A Function that every transform takes, but for those of forward mode."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{name}: forward-mode differentiation is not supported, use reverse mode")

    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _run_one_by_one(function, info.batch_size, in_dims, inputs)

    rules = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    function = type(name, (torch.autograd.Function,), {rule: staticmethod(rules[rule]) for rule in rules})
    return function


class Node:
    """A differentiable function.

    A subclass says what it computes, what backward needs of that, and how it goes backward, in static methods:

        compute(*inputs) -> Computed
        save(ctx, inputs, outputs, kept) -> None
        backward(ctx, *gradients of outputs) -> gradients of inputs
    """

    outputs: ClassVar[int] = 1
    compute: ClassVar[Callable[..., Computed]]
    backward: ClassVar[Callable[..., Any]]
    _direct: ClassVar[_Function]
    _under_transforms: ClassVar[_Function]

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> None:
        """By default backward needs nothing."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        count = cls.outputs

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                outputs, kept = cls.compute(*inputs)
                cls.save(ctx, inputs, outputs, kept)
                return outputs if count > 1 else outputs[0]

            backward = staticmethod(cls.backward)

        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            outputs, kept = cls.compute(*inputs)
            return *outputs, *kept

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            cls.save(ctx, inputs, output[:count], output[count:])
            ctx.mark_non_differentiable(*output[count:])

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return cls.backward(ctx, *grads[:count])

        Direct.__name__ = Direct.__qualname__ = cls.__name__
        cls._direct = Direct
        cls._under_transforms = _transformed(cls.__name__, forward, setup_context, backward)

    @classmethod
    def call(cls, *inputs: Any) -> Any:
        """The outputs: a tensor, or several in a tuple."""
        if torch.compiler.is_compiling() or not is_transformed():
            return cls._direct.apply(*inputs)
        results = cls._under_transforms.apply(*inputs)
        return results[: cls.outputs] if cls.outputs > 1 else results[0]


class _Below(Node):
    """Runs a function for what it does; it returns nothing."""

    @staticmethod
    def compute(function: Callable[..., None], *tensors: Tensor) -> Computed:
        function(*tensors)
        return (tensors[0].new_empty(0),), ()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def below_transforms(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call a function that writes into tensors of its own with the values of others, which transforms may wrap."""
    if is_transformed():
        _Below.call(function, *tensors)
    else:
        function(*tensors)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def register_derivative(
    name: str, derivative: Callable[..., Any], setup_context: Callable[..., None] = _save_nothing
) -> None:
    """Give an operator its derivative, as `torch.library.register_autograd` does, under transforms too."""
    torch.library.register_autograd(f"moment_ops::{name}", derivative, setup_context=setup_context, lib=LIBRARY)
    operator = getattr(torch.ops.moment_ops, name).default
    returns_list = isinstance(operator._schema.returns[0].type, torch.ListType)

    def forward(sizes: Sequence[int | None], *leaves: Any) -> Any:
        result = operator(*_nested(leaves, sizes))
        return tuple(result) if returns_list else result

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.sizes, *leaves = inputs
        setup_context(ctx, _nested(leaves, ctx.sizes), output)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = _nested(needed[1:], ctx.sizes)
        try:
            results = derivative(ctx, list(grads)) if returns_list else derivative(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        return None, *_flat(results if isinstance(results, tuple) else (results,), ctx.sizes)

    function = _transformed(name, forward, setup, backward)

    def under_transforms(*arguments: Any) -> Any:
        sizes = tuple(len(x) if _is_tensor_list(x) else None for x in arguments)
        result = function.apply(sizes, *_flat(arguments, sizes))
        return list(result) if returns_list else result

    LIBRARY.impl(name, under_transforms, "FuncTorchDynamicLayerFrontMode")


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(x, Tensor) for x in value)


def _flat(arguments: Sequence[Any], sizes: Sequence[int | None]) -> list[Any]:
    """Arguments, those of a list of tensors one by one."""
    return [x for item, size in zip(arguments, sizes, strict=True) for x in ([item] if size is None else item)]


def _nested(leaves: Sequence[Any], sizes: Sequence[int | None]) -> tuple[Any, ...]:
    """What `_flat` made flat."""
    rest = iter(leaves)
    return tuple(next(rest) if size is None else [next(rest) for _ in range(size)] for size in sizes)
