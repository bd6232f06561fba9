"""Taps in a network that cannot be traced: its calls are watched while they happen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moment_ops.taps import functions
from moment_ops.taps.selection import (
    IN_PLACE_RELU_FUNCTIONS,
    RELU,
    RELU_FUNCTIONS,
    Selection,
    Sites,
    function_path,
    is_plain_relu,
)


class _AllTapped(BaseException):
    """Ends a forward whose last tap has been reached."""


class RecordedNetwork(nn.Module):
    """A network whose calls are tapped by hooks, ReLU functions by a `TorchFunctionMode`.

    Nothing is folded; an in-place ReLU stays in place, with the tap after it; what other modules return goes on as a
    copy. Which calls there are is known after the first forward; a later one that takes another path raises.

    Args:
        net: in evaluation mode; it gets hooks.
        prefix: of the sites' names.
    """

    def __init__(self, net: nn.Module, selection: Selection, prefix: str, where: str) -> None:
        super().__init__()
        self.net = net
        self.names: list[str] | None = None
        self._selection, self._prefix, self._where = selection, prefix, where
        self._paths = {module: path for path, module in net.named_modules()}
        self._plain_relus = {module for module in self._paths if is_plain_relu(module)}
        for module in self._paths:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def forward(self, images: Tensor, wanted: str) -> list[Any]:
        """The statistics of the taps."""
        self._sites, self._callers, self._wanted = Sites(self._prefix), [self.net], wanted
        self._statistics: list[Any] = []
        self._tapped: list[str] = []
        self.passed: list[str] = []
        try:
            with _ReluMode(self._call_relu):
                self.net(images)
        except _AllTapped:
            pass
        if not self._tapped:
            raise self._selection.no_tap(self._where, self.passed)
        if self.names is None:
            self.names = self._tapped
        if self._tapped != self.names:
            raise ValueError(f"images: {self._where} was tapped at {self._tapped}, the first time at {self.names}")
        statistics, self._statistics = self._statistics, []
        return statistics

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._callers.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._callers.pop()
        if module in self._plain_relus or not self._chooses(self._paths[module] or type(module).__name__, module):
            return None
        # Whether the network will write to its output cannot be known.
        return self._keep(*functions.identity_tap(output, self._wanted, copied=True))

    def _call_relu(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        caller = self._callers[-1]
        path, module = self._paths[caller], caller
        if caller not in self._plain_relus:
            path, module = function_path(path), RELU
        elif caller is self.net:
            path = type(caller).__name__
        if not self._chooses(path, module):
            return function(*args, **kwargs)
        if function in IN_PLACE_RELU_FUNCTIONS or kwargs.get("inplace") or args[1:2] == (True,):
            y, statistic = functions.identity_tap(function(*args, **kwargs), self._wanted)
        else:
            y, statistic = functions.relu_tap(args[0] if args else kwargs["input"], None, self._wanted)
        # The network may write to what it got.
        if self._wanted == functions.FEATURES:
            statistic = statistic.clone()
        elif self._wanted == functions.BOTH:
            statistic = statistic._replace(features=y.clone())
        return self._keep(y, statistic)

    def _chooses(self, path: str, module: nn.Module) -> bool:
        site = self._sites.add(path, module)
        self.passed.append(site.name)
        chosen = self._selection(site, self._prefix)
        if chosen:
            self._tapped.append(site.name)
        return chosen

    def _keep(self, value: Any, statistic: Any) -> Any:
        self._statistics.append(statistic)
        # A compiler drops what follows by itself, and does not follow an exception through everything.
        if self.names is not None and len(self._statistics) == len(self.names) and not torch.compiler.is_compiling():
            raise _AllTapped
        return value


class _ReluMode(TorchFunctionMode):
    """Gives calls of ReLU functions to a handler."""

    def __init__(self, handler: Callable[[Callable[..., Any], Any, Any], Any]) -> None:
        super().__init__()
        self._handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._handler(func, args, kwargs) if func in RELU_FUNCTIONS else func(*args, **kwargs)
