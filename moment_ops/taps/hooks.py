"""Following the calls of a running network: of modules by hooks, of activation functions by a `TorchFunctionMode`."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moment_ops.taps import functions
from moment_ops.taps.activations import (
    FUNCTIONS,
    IN_PLACE_RELU_FUNCTIONS,
    RELU_FUNCTIONS,
    function_path,
    is_activation,
    is_plain_relu,
)
from moment_ops.taps.selection import Selection, Site, Sites


class _Activations(TorchFunctionMode):
    """Passes calls of activation functions to a handler."""

    def __init__(self, handler: Callable[[Callable[..., Any], Any, Any], Any]) -> None:
        super().__init__()
        self._handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._handler(func, args, kwargs) if func in FUNCTIONS else func(*args, **kwargs)


class _Followed:
    """One network, and the module that is running."""

    def __init__(self, net: nn.Module, prefix: str = "") -> None:
        self.net, self._prefix = net, prefix
        self._paths = {module: path for path, module in net.named_modules()}
        self.begin()

    def begin(self) -> None:
        """Before a forward."""
        self._sites, self._callers = Sites(self._prefix), [self.net]
        self.passed: list[Site] = []

    def hook(self, returned: Callable[[nn.Module, Any], Any]) -> list[Any]:
        """Register hooks on all modules; returns their handles. `returned(module, output)` may replace the output."""
        # Not a closure, since extractors are pickled.
        leave = functools.partial(self._leave, returned)
        handles = []
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(leave))
        return handles

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._callers.append(module)

    def _leave(self, returned: Callable[[nn.Module, Any], Any], module: nn.Module, args: Any, output: Any) -> Any:
        self._callers.pop()
        return returned(module, output)

    @property
    def caller(self) -> nn.Module:
        return self._callers[-1]

    def module_site(self, module: nn.Module) -> Site:
        """The site of a call of the module."""
        return self._add(self._paths[module] or type(module).__name__, module)

    def function_site(self, function: Callable[..., Any]) -> Site | None:
        """The site of a call of a function; None if the running module is that activation."""
        if is_activation(self.caller):
            return None
        name, module = FUNCTIONS[function]
        return self._add(function_path(self._paths[self.caller], name), module)

    def _add(self, path: str, module: nn.Module) -> Site:
        site = self._sites.add(path, module)
        self.passed.append(site)
        return site


class _AllTapped(BaseException):
    """Ends a forward after its last tap."""


class RecordedNetwork(nn.Module):
    """A network that `torch.fx` cannot trace, or not into a selected module. Its calls are tapped while it runs.

    BatchNorm is not folded. An in-place ReLU stays in place and is followed by its tap. The outputs of other taps go on
    as copies. The taps are known after the first forward; a later forward with other taps raises ValueError.

    Args:
        net: in evaluation mode. It gets hooks, and the layers of a `nn.TransformerEncoder` run one by one.
        prefix: prefix of the names of its sites.
        where: what errors call the network.
    """

    def __init__(self, net: nn.Module, selection: Selection, prefix: str, where: str) -> None:
        super().__init__()
        self.net = net
        self.names: list[str] | None = None
        self._selection, self._prefix, self._where = selection, prefix, where
        _run_layer_by_layer(net)
        self._plain_relus = {module for module in net.modules() if is_plain_relu(module)}
        self._followed = _Followed(net, prefix)
        self._followed.hook(self._returned)

    @property
    def passed(self) -> list[Site]:
        """The calls of the last forward."""
        return self._followed.passed

    def forward(self, images: Tensor, wanted: str) -> list[Any]:
        """What is wanted of every tap."""
        self._followed.begin()
        self._wanted = wanted
        self._statistics: list[Any] = []
        self._tapped: list[str] = []
        try:
            with _Activations(self._called):
                self.net(images)
        except _AllTapped:
            pass
        if not self._tapped:
            raise self._selection.no_tap(self._where, self.passed)
        if self.names is None:
            self.names = self._tapped
        if self._tapped != self.names:
            raise ValueError(
                f"images: {self._where} was tapped at {self._tapped}, expected {self.names} as in the first call"
            )
        statistics, self._statistics = self._statistics, []
        return statistics

    def _returned(self, module: nn.Module, output: Any) -> Any:
        if module in self._plain_relus or not self._chooses(self._followed.module_site(module)):
            return None
        # A copy, since the network may write to the output.
        return self._keep(*functions.identity_tap(output, self._wanted, copied=True))

    def _called(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        caller = self._followed.caller
        plain = caller in self._plain_relus
        site = self._followed.module_site(caller) if plain else self._followed.function_site(function)
        if site is None or not self._chooses(site):
            return function(*args, **kwargs)
        if function not in RELU_FUNCTIONS:
            return self._keep(*functions.identity_tap(function(*args, **kwargs), self._wanted, copied=True))
        if function in IN_PLACE_RELU_FUNCTIONS or kwargs.get("inplace") or args[1:2] == (True,):
            y, statistic = functions.identity_tap(function(*args, **kwargs), self._wanted)
        else:
            y, statistic = functions.relu_tap(args[0] if args else kwargs["input"], None, self._wanted)
        # A copy, since the network may write to the output.
        if self._wanted == functions.FEATURES:
            statistic = statistic.clone()
        elif self._wanted == functions.BOTH:
            statistic = statistic._replace(features=y.clone())
        return self._keep(y, statistic)

    def _chooses(self, site: Site) -> bool:
        chosen = self._selection(site, self._prefix)
        if chosen:
            self._tapped.append(site.name)
        return chosen

    def _keep(self, value: Any, statistic: Any) -> Any:
        self._statistics.append(statistic)
        # A compiler removes what follows by itself, and cannot trace this exception everywhere.
        if self.names is not None and len(self._statistics) == len(self.names) and not torch.compiler.is_compiling():
            raise _AllTapped
        return value


def _run_layer_by_layer(net: nn.Module) -> None:
    """Disable PyTorch's fused kernel for encoder layers, which calls no modules."""
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


class Calls:
    """Keeps the outputs of selected calls during one forward of a network, with their graph.

    The hooks are removed after the forward, so that the network does not change.
    """

    def __init__(self, f: nn.Module, selection: Selection, rows: int) -> None:
        self.features: list[Tensor] = []
        self.names: list[str] = []
        self._versions: list[int] = []
        self._selection, self._rows = selection, rows
        self._followed = _Followed(f)
        self._mode = _Activations(self._called)

    def __enter__(self) -> "Calls":
        self._handles = self._followed.hook(self._returned)
        self._mode.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._mode.__exit__(*details)

    def check(self) -> None:
        """Check after the forward: calls were selected, all names exist, and no kept output was changed in place."""
        with errors_about("hidden"):
            self._selection.check_all_found(self._followed.passed)
            if not self.names:
                raise self._selection.no_tap("f", self._followed.passed)
        for name, feature, version in zip(self.names, self.features, self._versions, strict=True):
            if feature._version != version:
                raise ValueError(
                    f"hidden: the output of {name} is changed in place by a later operation of f; use an operation that"
                    " is not in place (inplace=False)"
                )

    def _called(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        site = self._followed.function_site(function)
        if site is not None:
            self._visit(site, output)
        return output

    def _returned(self, module: nn.Module, output: Any) -> None:
        self._visit(self._followed.module_site(module), output)

    def _visit(self, site: Site, output: Any) -> None:
        if not self._selection(site, ""):
            return
        if not isinstance(output, Tensor):
            raise TypeError(f"hidden: {site.name} returned {type(output).__name__}, expected a Tensor")
        if output.dim() == 0 or output.shape[0] != self._rows:
            raise ValueError(
                f"hidden: {site.name} returned shape {tuple(output.shape)}, expected {self._rows} samples on dimension"
                " 0"
            )
        self.features.append(output)
        self.names.append(site.name)
        self._versions.append(output._version)


@contextmanager
def errors_about(argument: str) -> Iterator[None]:
    """Rename the argument `layers` in errors."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("layers", argument, 1)) from None
