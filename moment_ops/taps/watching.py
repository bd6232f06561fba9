"""What chosen calls of a network return, as the network is: no copy, its parameters with their graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moment_ops.taps.selection import Selection, Sites

# fmt: off
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
)
# Stand for the module where a function is called.
_RELU, _LEAKY_RELU, _RELU6, _ELU, _SELU, _CELU = nn.ReLU(), nn.LeakyReLU(), nn.ReLU6(), nn.ELU(), nn.SELU(), nn.CELU()
_PRELU, _TANH, _SIGMOID = nn.PReLU(), nn.Tanh(), nn.Sigmoid()
_FUNCTIONS: dict[Any, nn.Module] = {
    torch.relu: _RELU, torch.relu_: _RELU, torch.Tensor.relu: _RELU, torch.Tensor.relu_: _RELU, functional.relu: _RELU,
    functional.leaky_relu: _LEAKY_RELU, functional.leaky_relu_: _LEAKY_RELU, functional.relu6: _RELU6,
    functional.prelu: _PRELU, torch.prelu: _PRELU, functional.rrelu: nn.RReLU(), functional.gelu: nn.GELU(),
    functional.elu: _ELU, functional.elu_: _ELU, functional.selu: _SELU, torch.selu: _SELU, functional.celu: _CELU,
    torch.celu: _CELU, functional.silu: nn.SiLU(), functional.mish: nn.Mish(), functional.softplus: nn.Softplus(),
    functional.hardswish: nn.Hardswish(), functional.hardtanh: nn.Hardtanh(), functional.softsign: nn.Softsign(),
    torch.tanh: _TANH, torch.Tensor.tanh: _TANH, functional.tanh: _TANH, torch.sigmoid: _SIGMOID,
    torch.Tensor.sigmoid: _SIGMOID, functional.sigmoid: _SIGMOID, functional.logsigmoid: nn.LogSigmoid(),
}
# fmt: on


class Calls(TorchFunctionMode):
    """Watches one forward of a network: keeps what the chosen calls return.

    Hooks are there during the forward only, so that the network stays the user's own.
    """

    def __init__(self, f: nn.Module, selection: Selection, rows: int) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.names: list[str] = []
        self._versions: list[int] = []
        self._passed: list[str] = []
        self._paths = {module: path for path, module in f.named_modules()}
        self._f, self._selection, self._rows = f, selection, rows
        self._sites, self._callers = Sites(), [f]

    def __enter__(self) -> "Calls":
        self._handles = []
        for module in self._paths:
            self._handles.append(module.register_forward_pre_hook(self._begin))
            self._handles.append(module.register_forward_hook(self._end))
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*details)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # An activation module calls the function of the same name.
        if func in _FUNCTIONS and not isinstance(self._callers[-1], ACTIVATIONS):
            path = self._paths[self._callers[-1]]
            name = func.__name__.rstrip("_")
            self._visit(f"{path}.{name}" if path else name, _FUNCTIONS[func], output)
        return output

    def check(self) -> None:
        """After the forward: something was chosen, all names exist, and nothing was written into what was kept."""
        with errors_about("hidden"):
            self._selection.check_all_found(self._passed)
            if not self.names:
                raise self._selection.no_tap("f", self._passed)
        for name, feature, version in zip(self.names, self.features, self._versions, strict=True):
            if feature._version != version:
                raise ValueError(
                    f"hidden: the output of {name} is changed in place by a later operation of f; make that one out of"
                    " place (inplace=False)"
                )

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._callers.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._callers.pop()
        self._visit(self._paths[module] or type(module).__name__, module, output)

    def _visit(self, path: str, module: nn.Module, output: Any) -> None:
        site = self._sites.add(path, module)
        self._passed.append(site.name)
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
    """Errors about `layers` are about this argument."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("layers", argument, 1)) from None
