"""Call sites of a network: their names, and which of them are tapped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

Layers: TypeAlias = (
    type[nn.Module] | tuple[type[nn.Module], ...] | str | Sequence[str] | Callable[[str, nn.Module], bool]
)

# What `nn.ReLU` is without a module. `torch.nn.functional.relu_` is `torch.relu_`.
IN_PLACE_RELU_FUNCTIONS = frozenset({torch.relu_, torch.Tensor.relu_})
RELU_FUNCTIONS = frozenset({torch.relu, functional.relu, torch.Tensor.relu}) | IN_PLACE_RELU_FUNCTIONS
# Stands for the module where a function is called.
RELU = nn.ReLU()


def is_plain_relu(module: nn.Module) -> bool:
    """Whether calling the module is calling `torch.relu`: no other forward, no hooks."""
    return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def function_path(caller: str) -> str:
    """The path of a ReLU that is called as a function, in the forward of the module `caller`."""
    return f"{caller}.relu" if caller else "relu"


@dataclass(frozen=True)
class Site:
    """One call: of a module, or of a ReLU function within a module."""

    name: str
    module: nn.Module


class Sites:
    """The call sites of one network, in execution order, named by module path and call index."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self._calls: dict[str, int] = {}

    def add(self, path: str, module: nn.Module) -> Site:
        """The site of the next call of what is at `path`."""
        index = self._calls.get(path, 0)
        self._calls[path] = index + 1
        return Site(f"{self.prefix}{path}:{index}", module)


class Selection:
    """Which call sites are tapped.

    Args:
        layers: a module type or several; names, of modules ("layer1.0.relu", all its calls) or calls
            ("layer1.0.relu:1"); or a predicate (name, module) -> bool, given `nn.ReLU()` for a function.
    """

    def __init__(self, layers: Any) -> None:
        self._types: tuple[type[nn.Module], ...] = ()
        self._names: tuple[str, ...] = ()
        self._predicate: Callable[[str, nn.Module], bool] | None = None
        self._found: set[str] = set()
        items = layers if isinstance(layers, (list, tuple)) else [layers]
        if items and all(isinstance(item, type) and issubclass(item, nn.Module) for item in items):
            self._types = tuple(items)
        elif items and all(isinstance(item, str) for item in items):
            self._names = tuple(items)
        elif callable(layers) and not isinstance(layers, type):
            self._predicate = layers
        else:
            raise TypeError(f"layers: got {layers!r}, expected module types, names, or a predicate (name, module)")
        self._layers = layers

    def __call__(self, site: Site, prefix: str) -> bool:
        if self._predicate is not None:
            return bool(self._predicate(site.name, site.module))
        if self._types:
            return isinstance(site.module, self._types)
        path = site.name.rpartition(":")[0]
        full = {site.name, path}
        matching = (full | {name.removeprefix(prefix) for name in full}).intersection(self._names)
        self._found |= matching
        return bool(matching)

    def no_tap(self, where: str, available: Sequence[str]) -> ValueError:
        """The error for a network without taps."""
        return ValueError(f"layers: nothing in {where} matches {self._layers!r}; available: {', '.join(available)}")

    def check_all_found(self, available: Sequence[str]) -> None:
        """Raise ValueError for names that no call site has."""
        missing = [name for name in self._names if name not in self._found]
        if missing:
            raise ValueError(f"layers: there is no {', '.join(missing)}; available: {', '.join(available)}")
