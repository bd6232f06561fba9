"""Call sites of a network: their names, and the selection of those to tap."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from moment_ops.taps.activations import is_a

Layers: TypeAlias = (
    type[nn.Module] | tuple[type[nn.Module], ...] | str | Sequence[str] | Callable[[str, nn.Module], bool]
)

# The largest number of characters of an error that lists call sites, about a screen.
_MOST_CHARACTERS = 1500


@dataclass(frozen=True)
class Site:
    """One call: of a module, or of an activation function within a module."""

    name: str
    module: nn.Module

    @property
    def path(self) -> str:
        return self.name.rpartition(":")[0]


class Sites:
    """The call sites of one network, in execution order, named by module path and call index."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self._calls: dict[str, int] = {}

    def add(self, path: str, module: nn.Module) -> Site:
        """The site of the next call of the module or function at `path`."""
        index = self._calls.get(path, 0)
        self._calls[path] = index + 1
        return Site(f"{self.prefix}{path}:{index}", module)


class Selection:
    """Which call sites are tapped.

    Args:
        layers: a module type or several; names, of modules ("layer1.0.relu", all its calls) or calls
            ("layer1.0.relu:1"); or a predicate (name, module) -> bool, which gets `nn.ReLU()` for `torch.relu`.
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
        self._described = ", ".join(t.__name__ for t in self._types) or repr(layers)

    def __call__(self, site: Site, prefix: str) -> bool:
        """Whether a call is selected. Remembers the names that have been found."""
        matching = self._matching(site, prefix)
        self._found |= matching
        return bool(matching) or self._chooses(site)

    def reaches_into(self, path: str, inner: Iterable[Site], prefix: str) -> bool:
        """Whether a call within the module at `path` may be selected: one of `inner`, or a later call of them."""
        if self._names:
            within = f"{path}." if path else ""
            names = [name.removeprefix(prefix) for name in self._names]
            return any(inner) and any(name.startswith(within) for name in names)
        return any(self._chooses(site) for site in inner)

    def _chooses(self, site: Site) -> bool:
        """Whether the type or the predicate selects a call."""
        if self._predicate is not None:
            return bool(self._predicate(site.name, site.module))
        return bool(self._types) and is_a(site.module, self._types)

    def _matching(self, site: Site, prefix: str) -> set[str]:
        full = {site.name, site.path}
        return (full | {name.removeprefix(prefix) for name in full}).intersection(self._names)

    def no_tap(self, where: str, available: Sequence[Site]) -> ValueError:
        """The error for a network without taps."""
        return ValueError(f"layers: nothing in {where} matches {self._described}; {_listed(available)}")

    def check_all_found(self, available: Sequence[Site]) -> None:
        """Raise ValueError for names without a call site."""
        missing = [name for name in self._names if name not in self._found]
        if missing:
            names = [name for site in available for name in (site.path, site.name)]
            similar = dict.fromkeys(close for name in missing for close in difflib.get_close_matches(name, names))
            hint = f" (similar: {', '.join(similar)})" if similar else ""
            raise ValueError(f"layers: there is no {', '.join(missing)}{hint}; {_listed(available)}")


def _listed(available: Iterable[Site]) -> str:
    """The available types with their numbers, and as many names as fit on a screen."""
    sites = list(available)
    counts = Counter(type(site.module).__name__ for site in sites)
    types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    names, room = [], _MOST_CHARACTERS - len(types)
    for site in sites:
        room -= len(site.name) + 2
        if room < 0:
            break
        names.append(site.name)
    more = f", and {len(sites) - len(names)} more" if len(names) < len(sites) else ""
    return f"available: {types or 'nothing'}; by name: {', '.join(names)}{more}"
