"""Derivatives in two forms: for ordinary calls, and for those under the transforms of `torch.func`.

A transform wants a Function with a `setup_context`, for which torch binds a signature at every call: 20 us. Ordinary
calls take a form without, from which the other one is made. Under `vmap` the problems of a batch run one by one.

`torch.library.register_autograd` has no form for transforms (torch 2.13): an operator takes its own at the dispatch key
at which transforms take over.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.utils import _pytree as pytree

from moment_ops.ops.library import LIBRARY, no_forward_mode

_Function = type[torch.autograd.Function]

# Whether a transform of `torch.func` is at work.
is_transformed = torch._C._are_functorch_transforms_active


class _OneByOne(threading.local):
    """Whether this thread is running the problems of a batch one by one."""

    active = False


_one_by_one = _OneByOne()


def under_vmap() -> bool:
    """Whether the current call runs under `vmap`, for one problem of a batch or for all of them."""
    if _one_by_one.active:
        return True
    stack = torch._C._functorch.get_interpreter_stack() if is_transformed() else None
    return any(level.key() == TransformType.Vmap for level in stack or ())


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether one of these tensors may require a gradient. Within a transform this is unknown, and True."""
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return is_transformed() and any(x is not None and is_wrapped(x) for x in tensors)


def _run_one_by_one(function: _Function, size: int, dims: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The rule for `vmap`: the outputs of all problems, stacked, and the dimensions on which they are stacked."""
    if size == 0:
        raise RuntimeError(f"{function.__name__}: got an empty batch under vmap, expected at least one problem")
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
    # What is no tensor is the same for all problems.
    stacked = [torch.stack(same) if isinstance(same[0], Tensor) else same[0] for same in zip(*results, strict=True)]
    return tuple(stacked), tuple(0 if isinstance(x, Tensor) else None for x in stacked)


def _transformed(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> _Function:
    """A Function that supports all transforms except for forward mode."""

    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        return _run_one_by_one(function, info.batch_size, in_dims, inputs)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(no_forward_mode(name))

    rules = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})
    return function


class _Record:
    """The context of a node that runs below transforms. It is copied to the contexts of all levels."""

    def __init__(self) -> None:
        self._saved: tuple[Tensor | None, ...] = ()
        # Of what was saved, among inputs, outputs and what is kept for backward alone.
        self._places: list[int | None] = []
        self._materialize_grads = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._saved = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self._materialize_grads = value

    def close(self, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> list[Any]:
        """Drop the saved tensors, and return those that must be kept."""
        known: list[Any] = [*inputs, *outputs]
        for x in self._saved:
            place = None if x is None else next((i for i, y in enumerate(known) if y is x), len(known))
            if place == len(known):
                known.append(x)
            self._places.append(place)
        self._saved = ()
        return known[len(inputs) + len(outputs) :]

    def tell(self, ctx: Any, inputs: tuple[Any, ...], outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """Copy this record to the context of a level, with the tensors of that level."""
        for name, value in vars(self).items():
            if not name.startswith("_"):
                setattr(ctx, name, value)
        known = *inputs, *outputs, *kept
        ctx.save_for_backward(*[None if place is None else known[place] for place in self._places])
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(self._materialize_grads)


# Of the outputs of a node's form under transforms: before them are their number, whether they are a tuple, the record.
_FIRST = 3


class Node(torch.autograd.Function):
    """A Function with the context in `forward`, which also supports transforms if it is called by `call`.

    Attributes of its context must not be tensors. Saved tensors that are neither inputs nor outputs are constants.
    """

    _under_transforms: ClassVar[_Function]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def forward(*inputs: Any) -> tuple[Any, ...]:
            record = _Record()
            result = cls.forward(record, *inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            return len(outputs), isinstance(result, tuple), record, *outputs, *record.close(inputs, outputs)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            count, _, record, *tensors = output
            record.tell(ctx, inputs, tensors[:count], tensors[count:])
            ctx.last = _FIRST + count

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return cls.backward(ctx, *grads[_FIRST : ctx.last])

        cls._under_transforms = _transformed(cls.__name__, forward, setup_context, backward)

    @classmethod
    def call(cls, *inputs: Any) -> Any:
        """Apply the function."""
        if torch.compiler.is_compiling():
            # Some forwards are not traced within a Function whose inputs need no gradient.
            needed = torch.is_grad_enabled() and wants_grad(*(x for x in inputs if isinstance(x, Tensor)))
            return cls.apply(*inputs) if needed else cls.forward(_Record(), *inputs)
        if not is_transformed():
            return cls.apply(*inputs)
        count, several, _, *tensors = cls._under_transforms.apply(*inputs)
        return tuple(tensors[:count]) if several else tensors[0]


class _Below(Node):
    """Runs a function for its side effects."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., None], *tensors: Tensor) -> Tensor:
        function(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def below_transforms(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call a function that writes to its own tensors, with the values of tensors that transforms may wrap."""
    if torch.compiler.is_compiling() or not is_transformed():
        function(*tensors)
    else:
        _Below.call(function, *tensors)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def register_derivative(
    name: str, derivative: Callable[..., Any], setup_context: Callable[..., None] = _save_nothing
) -> None:
    """Register the derivative of an operator, as `torch.library.register_autograd` does, also for transforms."""
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
    """The arguments, with lists of tensors flattened."""
    return [x for item, size in zip(arguments, sizes, strict=True) for x in ([item] if size is None else item)]


def _nested(leaves: Sequence[Any], sizes: Sequence[int | None]) -> tuple[Any, ...]:
    """The inverse of `_flat`."""
    rest = iter(leaves)
    return tuple(next(rest) if size is None else [next(rest) for _ in range(size)] for size in sizes)
