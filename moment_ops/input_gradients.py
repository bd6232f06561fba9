"""Autograd nodes around a function that computes gradients itself, and is differentiated by its input only."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moment_ops.ops.nodes import Node, is_transformed

# A function of the input and of whether the result needs a graph to it.
OfInput: TypeAlias = Callable[[Tensor, bool], Tensor]


def of_input_alone(function: OfInput, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """`function(x)`, differentiable with respect to x: twice, or once under transforms.

    The graph of parameter gradients leads to the parameters as well as to x. Without this node, `loss.backward()` would
    compute second derivatives of the parameters and accumulate them in their `grad`. With it, backward goes to x only.

    Args:
        parameters: what else the function reads. They must not change before the last backward.
    """
    if is_transformed():
        return _UnderTransforms.call(x, function, parameters)
    return _OfInput.apply(x, function, parameters)


def _versions(parameters: Sequence[Tensor]) -> list[int]:
    return [parameter._version for parameter in parameters]


def _check_versions(ctx: Any) -> None:
    if _versions(ctx.parameters) != ctx.versions:
        raise RuntimeError("f: the parameters were changed between moments() and a second backward through it")


def _with_graph(function: OfInput, x: Tensor) -> tuple[Tensor, Tensor]:
    """(value, input) of a new graph."""
    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        return function(inner, True), inner


class _OfInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: OfInput, parameters: Sequence[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.graph = _with_graph(function, x)
        ctx.function, ctx.parameters, ctx.versions = function, parameters, _versions(parameters)
        return ctx.graph[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        graph, ctx.graph = ctx.graph, None
        again = torch.is_grad_enabled()
        if again or graph is None:
            # The backward is itself differentiated, or runs a second time: compute the graph again from x.
            _check_versions(ctx)
            graph = (ctx.function(x, True), x) if again else _with_graph(ctx.function, x)
        (gradient,) = torch.autograd.grad(*graph, grad, create_graph=again)
        return gradient, None, None


class _UnderTransforms(Node):
    """Runs below the transforms, where the function's own gradients are computed. Backward builds the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: OfInput, parameters: Sequence[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.parameters, ctx.versions = function, parameters, _versions(parameters)
        return function(x.detach(), False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _check_versions(ctx)
        (x,) = ctx.saved_tensors
        return _Gradient.call(x, grad, ctx.function), None, None


class _Gradient(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, function: OfInput) -> Tensor:
        (gradient,) = torch.autograd.grad(*_with_graph(function, x), grad)
        return gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError("moments: differentiable once under the transforms of torch.func, not twice")
