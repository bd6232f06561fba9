"""In-place operations in a graph, and the values that share the memory that they write."""

import operator
from typing import Any

import torch
from torch import fx, nn

from moment_ops.taps.folding import argument

_IN_PLACE_OPERATORS = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem})
# fmt: off
# Functions and methods whose result may share the memory of their first argument.
_VIEWS = frozenset(
    {
        "as_strided", "chunk", "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "float",
        "getitem", "movedim", "narrow", "permute", "positive", "real", "reshape", "reshape_as", "select",
        "split", "squeeze", "t", "tensor_split", "to", "transpose", "unbind", "unflatten", "unfold",
        "unsqueeze", "view", "view_as", "dropout", "dropout2d", "alpha_dropout", "feature_dropout",
    }
)
# fmt: on
# The position of the argument `inplace`. If it is given by name, it is found for every function.
_INPLACE_POSITION = {
    "relu": 1,
    "relu6": 1,
    "silu": 1,
    "hardswish": 1,
    "mish": 1,
    "leaky_relu": 2,
    "elu": 2,
    "hardtanh": 3,
}
_VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "data")
_VIEW_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def is_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a call writes to its first argument."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) and not isinstance(module, _VIEW_MODULES)
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    if node.target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return True
    return argument(node, _INPLACE_POSITION.get(name, len(node.args)), "inplace") is True


def users_after(graph: fx.Graph, value: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The users of a value that run after a node."""
    nodes = list(graph.nodes)
    later = set(nodes[nodes.index(node) + 1 :])
    return [user for user in value.users if user in later]


def is_seen_by_others(root: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Whether the result of an in-place call is read later through another view of the same memory."""
    if not is_in_place(root, node):
        return False
    written = argument(node, 0, "input")
    views = _views(root, written) - {written, node}
    return any(user is not node for view in views for user in users_after(graph, view, node))


def protect(root: nn.Module, graph: fx.Graph, tapped: fx.Node) -> None:
    """Let in-place calls on a tapped value write to a copy: the value is a feature, which backward needs."""
    for user in list(tapped.users):
        if is_in_place(root, user) and argument(user, 0, "input") is tapped:
            with graph.inserting_before(user):
                clone = graph.call_function(torch.clone, (tapped,))
            for later in [user, *users_after(graph, tapped, user)]:
                later.replace_input_with(tapped, clone)
            return


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_view(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _VIEW_MODULES)
    if node.target is getattr:
        return node.args[1] in _VIEW_ATTRIBUTES
    return node.op in ("call_function", "call_method") and (_name(node) in _VIEWS or is_in_place(root, node))


def _views(root: nn.Module, value: fx.Node) -> set[fx.Node]:
    """All values that may share memory with `value`."""
    while _is_view(root, value) and isinstance(argument(value, 0, "input"), fx.Node):
        value = argument(value, 0, "input")
    found, waiting = {value}, [value]
    while waiting:
        for user in waiting.pop().users:
            if user not in found and _is_view(root, user):
                found.add(user)
                waiting.append(user)
    return found
