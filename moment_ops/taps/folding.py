"""Folding of BatchNorm, in evaluation mode, into the convolution before it.

This saves a pass over the features, and the memory of the input that BatchNorm saves for backward even when frozen.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from moment_ops.taps.activations import has_hooks

# Traced as functions, so that their weights can be replaced if no other call uses them.
CONVOLUTION_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTIONS: frozenset[Callable[..., Any]] = frozenset(
    {functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of a call that is given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def fold_batch_norms(root: nn.Module, graph: fx.Graph, kept: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Fold every BatchNorm that is the only user of a convolution with float32 or float64 weights of its own.

    Weights in 16 bits are not folded, since rounding the folded weights would lose accuracy.

    Args:
        root: the traced module, in evaluation mode. The parameters of its convolutions are replaced.
        kept: nodes whose values must not change.

    Returns:
        A mapping from the nodes of folded BatchNorms to those of their convolutions.
    """
    uses: Counter[Any] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr":
            uses[node.target] += len(node.users)
        elif node.op == "call_module":
            uses[node.target] += 1
    folded = {}
    for node in list(graph.nodes):
        norm: Any = root.get_submodule(node.target) if node.op == "call_module" else None
        if type(norm) not in _BATCH_NORMS or norm.running_mean is None or has_hooks(norm) or uses[node.target] > 1:
            continue
        convolution = node.args[0] if node.args else None
        if not isinstance(convolution, fx.Node) or convolution in kept or set(convolution.users) != {node}:
            continue
        if convolution.op != "call_function" or convolution.target not in CONVOLUTIONS:
            continue
        if _fold(root, graph, convolution, norm, uses):
            node.replace_all_uses_with(convolution)
            graph.erase_node(node)
            folded[node] = convolution
    return folded


def _fold(root: nn.Module, graph: fx.Graph, convolution: fx.Node, norm: Any, uses: Counter[Any]) -> bool:
    weight_node, bias_node = argument(convolution, 1, "weight"), argument(convolution, 2, "bias")
    for node in (weight_node, bias_node):
        if node is not None and (node.op != "get_attr" or uses[node.target] > 1):
            return False
    owner_path, _, weight_name = weight_node.target.rpartition(".")
    owner = root.get_submodule(owner_path)
    if getattr(owner, weight_name).dtype not in (torch.float32, torch.float64):
        return False
    bias_name = "bias" if bias_node is None else bias_node.target.rpartition(".")[2]
    if bias_node is None and getattr(owner, bias_name, None) is not None:
        return False
    old_bias = None if bias_node is None else root.get_parameter(bias_node.target)
    weight, bias = _folded(getattr(owner, weight_name), old_bias, norm)
    if bias_node is None:
        with graph.inserting_before(convolution):
            bias_node = graph.get_attr(f"{owner_path}.{bias_name}")
        set_argument(convolution, 2, "bias", bias_node)
    else:
        owner = root.get_submodule(bias_node.target.rpartition(".")[0])
    root.get_submodule(owner_path)._parameters[weight_name] = nn.Parameter(weight, requires_grad=False)
    owner._parameters[bias_name] = nn.Parameter(bias, requires_grad=False)
    return True


def _folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with the normalization, computed in float64."""
    scale = (_wide(norm.running_var) + norm.eps).rsqrt()
    shift = -_wide(norm.running_mean) if bias is None else _wide(bias) - _wide(norm.running_mean)
    if norm.weight is not None:
        scale = scale * _wide(norm.weight)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + _wide(norm.bias)
    new_weight = _wide(weight) * scale.view(-1, *[1] * (weight.dim() - 1))
    return new_weight.to(weight), shift.to(weight)


def _wide(x: Tensor) -> Tensor:
    return x.detach().cpu().double()
