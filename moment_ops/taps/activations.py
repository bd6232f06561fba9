"""Activations, as modules and as functions, and which of them are tapped by default."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Tapped by default.
FEATURES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Hardswish,
)  # fmt: skip
# These usually gate other features, or are the output of a network.
GATES: tuple[type[nn.Module], ...] = (
    nn.Hardtanh, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Softmax,
)  # fmt: skip
ALL = (*FEATURES, *GATES)
# By default the hidden units of a moment network, which has neither gates nor an activation after its last layer.
HIDDEN = (*FEATURES, nn.Hardtanh, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid)

# The modules that stand for calls of functions.
RELU = nn.ReLU()
_STAND_INS: dict[str, nn.Module] = {
    "relu": RELU, "leaky_relu": nn.LeakyReLU(), "prelu": nn.PReLU(), "rrelu": nn.RReLU(), "relu6": nn.ReLU6(),
    "elu": nn.ELU(), "selu": nn.SELU(), "celu": nn.CELU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "mish": nn.Mish(),
    "softplus": nn.Softplus(), "hardswish": nn.Hardswish(), "hardtanh": nn.Hardtanh(), "softsign": nn.Softsign(),
    "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "logsigmoid": nn.LogSigmoid(), "hardsigmoid": nn.Hardsigmoid(),
    "softmax": nn.Softmax(-1),
}  # fmt: skip


def _functions() -> dict[Any, tuple[str, nn.Module]]:
    """For every function its name, without the underscore of in-place functions, and the module that stands for it."""
    found = {}
    for name, module in _STAND_INS.items():
        for place in (functional, torch, torch.Tensor):
            for spelled in (name, f"{name}_"):
                function = getattr(place, spelled, None)
                if function is not None:
                    found[function] = name, module
    return found


FUNCTIONS = _functions()
RELU_FUNCTIONS = frozenset(function for function, (name, _) in FUNCTIONS.items() if name == "relu")
# `torch.nn.functional.relu_` is `torch.relu_`.
IN_PLACE_RELU_FUNCTIONS = frozenset({torch.relu_, torch.Tensor.relu_})

# The classes of timm, by name: they are not subclasses of PyTorch's activations.
_TIMM: dict[str, type[nn.Module]] = {
    "Swish": nn.SiLU, "SwishMe": nn.SiLU, "Mish": nn.Mish, "MishMe": nn.Mish, "HardMish": nn.Mish,
    "HardMishMe": nn.Mish, "HardSwish": nn.Hardswish, "HardSwishMe": nn.Hardswish, "GELU": nn.GELU,
    "GELUTanh": nn.GELU, "QuickGELU": nn.GELU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "HardSigmoid": nn.Hardsigmoid,
    "HardSigmoidMe": nn.Hardsigmoid,
}  # fmt: skip


def is_a(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether the module is of one of the types. An activation of timm counts as PyTorch's type of that activation."""
    if isinstance(module, types):
        return True
    cls = type(module)
    return cls.__module__.partition(".")[0] == "timm" and _TIMM.get(cls.__name__) in types


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation, so that a function that it calls is not another one."""
    return is_a(module, ALL)


def is_plain_relu(module: nn.Module) -> bool:
    """Whether calling the module only calls `torch.relu`: it has neither another forward nor hooks."""
    return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks besides its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def function_path(caller: str, function: str) -> str:
    """The path of an activation that is called as a function in the forward of the module `caller`."""
    return f"{caller}.{function}" if caller else function
