"""Taps in a traced network: call sites are found and replaced in its graph."""

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from moment_ops.taps import aliasing, functions
from moment_ops.taps.activations import (
    FUNCTIONS,
    RELU,
    function_path,
    has_hooks,
    is_activation,
    is_plain_relu,
)
from moment_ops.taps.folding import CONVOLUTION_MODULES, CONVOLUTIONS, argument, fold_batch_norms, set_argument
from moment_ops.taps.selection import Selection, Site, Sites


class Untraceable(Exception):
    """`torch.fx` cannot trace the network, for example because its forward depends on values; or a selected call is
    within a module that it records as one call."""


class _Root(nn.Module):
    """Calls a network with its input only. The network becomes a submodule with a name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


def _path(target: str) -> str:
    """The path within the network of a module of the root."""
    return target.removeprefix("net").removeprefix(".")


class _Proxy(fx.Proxy):
    """Records `x += y` as an in-place operation. `torch.fx` records `x = x + y`, which does not change views of x."""

    def _in_place(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _Tracer(fx.Tracer):
    """Records the call sites of a `_Root`, and the node that each returns."""

    def __init__(self, sites: Sites | None = None) -> None:
        # Unpickling a graph module traces its code again, with a tracer made by default arguments.
        super().__init__(autowrap_functions=functions.ALL)
        self.found: list[tuple[Site, fx.Node]] = []
        self._sites = sites or Sites()
        self._callers: list[str] = [""]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_activation(m):
            return True
        if isinstance(m, CONVOLUTION_MODULES) and not has_hooks(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = _path(self.path_of_module(m))
        self._callers.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self._callers.pop()
        self._record(path or type(m).__name__, m, result)
        return result

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        activation = _activation(proxy.node)
        if activation is not None:
            name, module = activation
            self._record(function_path(self._callers[-1], name), module, proxy)
        return proxy

    def _record(self, path: str, module: nn.Module, result: Any) -> None:
        values = result if isinstance(result, (tuple, list)) else (result,)
        proxy = next((value for value in values if isinstance(value, fx.Proxy)), None)
        site = self._sites.add(path, module)
        if proxy is not None:
            self.found.append((site, proxy.node))


def _activation(node: fx.Node) -> tuple[str, nn.Module] | None:
    """The name of the activation that is called as a function, and the module that stands for it."""
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return FUNCTIONS.get(getattr(Tensor, str(node.target), None))
    return None


def _inner_sites(path: str, module: nn.Module, prefix: str) -> Iterator[Site]:
    """The calls within a module that is recorded as one call, as far as they are known: the first call of each."""
    for inner, called in module.named_modules():
        at = f"{path}.{inner}" if path and inner else path or inner
        if inner:
            yield Site(f"{prefix}{at}:0", called)
        # The activation of a transformer layer may be a function.
        if isinstance(called, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            name, stand_in = FUNCTIONS.get(called.activation, (None, None))
            if name and stand_in:
                yield Site(f"{prefix}{function_path(at, name)}:0", stand_in)


def _check_within(root: _Root, graph: fx.Graph, selection: Selection, prefix: str) -> None:
    """Raise Untraceable if a call within a module that is recorded as one call may be selected."""
    for node in graph.nodes:
        if node.op == "call_module":
            module, path = root.get_submodule(str(node.target)), _path(str(node.target))
            if selection.reaches_into(path, _inner_sites(path, module, prefix), prefix):
                raise Untraceable(f"calls within {path or 'the network'}")


def trace(net: nn.Module, selection: Selection, prefix: str) -> tuple[fx.GraphModule, list[str], list[Site]]:
    """A network as a graph that maps (images, wanted) to what is wanted of its taps.

    Args:
        net: in evaluation mode. The parameters of its convolutions may be replaced.
        prefix: prefix of the names of its sites.

    Returns:
        (graph module, names of the taps, all call sites).

    Raises:
        Untraceable: `torch.fx` cannot trace the network.
    """
    root = _Root(net)
    tracer = _Tracer(Sites(prefix))
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise Untraceable(str(error)) from error
    _check_within(root, graph, selection, prefix)
    available = [site for site, _ in tracer.found]
    chosen = [(site, node) for site, node in tracer.found if selection(site, prefix)]
    if not chosen:
        return fx.GraphModule(root, graph), [], available
    folded = fold_batch_norms(root, graph, {node for _, node in chosen})
    statistics = _Rewriter(root, graph).tap([folded.get(node, node) for _, node in chosen])
    _return(graph, statistics)
    graph.lint()
    return fx.GraphModule(root, graph), [site.name for site, _ in chosen], available


class _Rewriter:
    """Puts taps into a graph."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        images = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(images):
            self.wanted = graph.placeholder("wanted")

    def tap(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Tap the values of the nodes, and return the nodes of what is wanted of them."""
        replaced: dict[fx.Node, fx.Node] = {}
        statistics = []
        for node in nodes:
            value = replaced.get(node, node)
            plain = self._is_relu(value) and not aliasing.is_seen_by_others(self.root, self.graph, value)
            y, statistic = self._tap_relu(value) if plain else self._tap_identity(value)
            replaced[node] = y
            statistics.append(statistic)
        return statistics

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return is_plain_relu(self.root.get_submodule(str(node.target)))
        activation = _activation(node)
        return activation is not None and activation[1] is RELU

    def _tap_relu(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        x = argument(node, 0, "input")
        in_place = aliasing.is_in_place(self.root, node)
        # After an in-place ReLU, later uses of its input read its output.
        later = aliasing.users_after(self.graph, x, node) if in_place else []
        bias = self._move_bias(node, x)
        y, statistic = self._insert(node, functions.relu_tap, (x, bias, self.wanted))
        for user in later:
            user.replace_input_with(x, y)
        node.replace_all_uses_with(y)
        self.graph.erase_node(node)
        aliasing.protect(self.root, self.graph, y)
        return y, statistic

    def _tap_identity(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        users = set(node.users)
        y, statistic = self._insert(node, functions.identity_tap, (node, self.wanted))
        node.replace_all_uses_with(y, delete_user_cb=lambda user: user in users)
        aliasing.protect(self.root, self.graph, y)
        return y, statistic

    def _insert(self, node: fx.Node, function: Any, args: tuple[Any, ...]) -> tuple[fx.Node, fx.Node]:
        with self.graph.inserting_after(node):
            tap = self.graph.call_function(function, args)
        with self.graph.inserting_after(tap):
            y = self.graph.call_function(operator.getitem, (tap, 0))
        with self.graph.inserting_after(y):
            statistic = self.graph.call_function(operator.getitem, (tap, 1))
        return y, statistic

    def _move_bias(self, relu: fx.Node, x: fx.Node) -> fx.Node | None:
        """Move the bias of a convolution into the tap, if only the ReLU reads the convolution."""
        if x.op != "call_function" or x.target not in CONVOLUTIONS or set(x.users) != {relu}:
            return None
        bias = argument(x, 2, "bias")
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return None
        with self.graph.inserting_before(x):
            in_convolution = self.graph.call_function(functions.bias_in_convolution, (bias,))
            in_tap = self.graph.call_function(functions.bias_in_tap, (bias,))
        set_argument(x, 2, "bias", in_convolution)
        return in_tap


def _return(graph: fx.Graph, statistics: list[fx.Node]) -> None:
    """Return the statistics, and remove what runs after the last of them."""
    nodes = list(graph.nodes)
    last = max(nodes.index(statistic) for statistic in statistics)
    for node in reversed(nodes[last + 1 :]):
        graph.erase_node(node)
    with graph.inserting_after(nodes[last]):
        graph.output(statistics)
