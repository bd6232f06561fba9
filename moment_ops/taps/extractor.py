"""`MomentExtractor`: the moments of a frozen network's features, collected while the features are made."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moment_ops.ops.moments import new_count
from moment_ops.statistics import Moments
from moment_ops.taps import activations
from moment_ops.taps.functions import BOTH, FEATURES, MOMENTS, Collected
from moment_ops.taps.hooks import RecordedNetwork
from moment_ops.taps.selection import Layers, Selection, Site
from moment_ops.taps.tracing import Untraceable, trace


class MomentExtractor(nn.Module):
    """Moments of the features of one frozen network, or of several as one feature set.

    A tap stands at every selected call, in execution order. The tap of a ReLU replaces it: one pass computes the ReLU
    and the moments of its output. Every other tap reads the output of its call and passes it on. A tap is one autograd
    node, where the gradients of the next layer and of the moments are added in one pass.

    Args:
        nets: a module, or several in a sequence or a mapping, each called with the images only. They are not changed:
            the extractor copies them, freezes the copies, keeps them in evaluation mode whatever `train()` is called
            with, and drops what follows the last tap. A BatchNorm that is the only reader of a convolution is folded
            into it, in float32 and float64: for a network in 16 bits, convert the extractor, not the network.
        layers: what to tap. A module type or several, where `torch.nn.ReLU` includes calls of `torch.relu` and
            `torch.nn.functional.relu`, and `torch.nn.GELU` includes timm's class of that name; names from `names`, of
            one call ("layer1.0.relu:1") or of a module, which selects all its calls; or a predicate
            (name, module) -> bool, which gets `nn.ReLU()` for a function. By default all activations except those that
            gate other features or end a network: Sigmoid, Hardsigmoid, Tanh, Hardtanh, Softsign, LogSigmoid, Softmax.

    Attributes:
        names: one per tap, module path and call index, after "index/" or "key/" of the network where there are several.
            None before the first call of a network that cannot be traced, see below.

    Networks are traced with `torch.fx`. A network that cannot be traced, or that has selected calls within a module
    which torch.fx records as one call (`torch.nn.TransformerEncoder`), is tapped by hooks instead. Then nothing is
    folded, `names` are known after the first call, and a call that takes another path raises ValueError.

    Raises:
        TypeError, ValueError: wrong types; a network without a selected call, or a name that does not exist: the error
            lists what can be selected. For networks that are not traced, on the first call.

    Cost: the tap of a ReLU reads and writes what the ReLU does, forward and backward; memory beyond the network's is a
    few (F,) vectors. Every other tap reads its features once more, and its backward adds its gradients in a pass of its
    own.

    Source: dos Santos et al. 2019, whose features are all ReLU outputs of VGG19 and ResNet18 together.
    """

    def __init__(
        self, nets: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module], layers: Layers = activations.FEATURES
    ):
        super().__init__()
        self.nets = nn.ModuleList()
        self._selection = Selection(layers)
        self._names: list[list[str] | None] = []
        self._checked = False
        self._available: list[Site] = []
        for prefix, net in _by_prefix(nets).items():
            self._add(net, prefix)
        super().train(False)
        self._check_names()

    @property
    def names(self) -> tuple[str, ...] | None:
        """One name per tap."""
        found = [net.names if isinstance(net, RecordedNetwork) else names for net, names in self._pairs()]
        return None if None in found else tuple(name for names in found if names for name in names)

    def forward(self, images: Tensor) -> Moments:
        """Moments over all taps of all networks, with their names; differentiable to images, twice in eager mode.

        Args:
            images: what the networks take.

        Returns:
            Moments with correction 1 and variances, float32 (float64 for float64 features).
        """
        return self._packed(self._run(images, MOMENTS))

    def features(self, images: Tensor) -> list[Tensor]:
        """The features of all taps, one (N, ...) Tensor each, in the order of the moments."""
        return self._run(images, FEATURES)

    def moments_and_features(self, images: Tensor) -> tuple[Moments, list[Tensor]]:
        """Both, of one run of the networks: moments by the taps, and features for what needs more than moments."""
        taps: list[Collected] = self._run(images, BOTH)
        return self._packed(taps), [tap.features for tap in taps if tap.features is not None]

    def _packed(self, taps: list[Collected]) -> Moments:
        return Moments(
            torch.cat([tap.mean for tap in taps]),
            torch.cat([tap.var for tap in taps]),
            count=new_count([tap.rows for tap in taps], taps[0].mean),
            shapes=tuple(tap.shape for tap in taps),
            names=self.names,
            validate=False,
        )

    def train(self, mode: bool = True) -> "MomentExtractor":
        """Stays in evaluation mode."""
        return self

    def extra_repr(self) -> str:
        names = self.names
        return "taps not known yet" if names is None else f"taps={len(names)}"

    def _pairs(self) -> Iterable[tuple[nn.Module, list[str] | None]]:
        return zip(self.nets, self._names, strict=True)

    def _run(self, images: Tensor, wanted: str) -> list[Any]:
        statistics = [statistic for net in self.nets for statistic in net(images, wanted)]
        if not self._checked:
            self._check_names()
        return statistics

    def _add(self, net: nn.Module, prefix: str) -> None:
        where = f"network {prefix.removesuffix('/')}" if prefix else "the network"
        try:
            traced, names, available = trace(_own_copy(net), self._selection, prefix)
        except Untraceable:
            self.nets.append(RecordedNetwork(_own_copy(net), self._selection, prefix, where))
            self._names.append(None)
            return
        if not names:
            raise self._selection.no_tap(where, available)
        self.nets.append(traced)
        self._names.append(names)
        self._available += available

    def _check_names(self) -> None:
        watched = [net for net in self.nets if isinstance(net, RecordedNetwork)]
        if all(net.names is not None for net in watched):
            passed = [site for net in watched for site in net.passed]
            self._selection.check_all_found([*self._available, *passed])
            self._checked = True


def _by_prefix(nets: Any) -> dict[str, nn.Module]:
    """Networks by the prefix of their names."""
    if isinstance(nets, torch.jit.ScriptModule):
        raise _scripted("nets")
    # A container that has a forward of its own is one network.
    if isinstance(nets, nn.Module) and type(nets).forward is not nn.Module.forward:
        return {"": nets}
    if isinstance(nets, (Mapping, nn.ModuleDict)):
        named = {f"{key}/": net for key, net in nets.items()}
    elif isinstance(nets, Iterable):
        named = {f"{i}/": net for i, net in enumerate(nets)}
    else:
        raise TypeError(f"nets: got {type(nets).__name__}, expected a Module or several")
    if not named:
        raise ValueError("nets: got none, expected at least one Module")
    for prefix, net in named.items():
        if not isinstance(net, nn.Module):
            raise TypeError(f"nets[{prefix.removesuffix('/')}]: got {type(net).__name__}, expected a Module")
        if isinstance(net, torch.jit.ScriptModule):
            raise _scripted(f"nets[{prefix.removesuffix('/')}]")
    return named


def _scripted(name: str) -> TypeError:
    return TypeError(f"{name}: got a ScriptModule, whose calls cannot be seen; pass the Module that it was made from")


def _own_copy(net: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, without gradients; a compiled module is unwrapped."""
    net = getattr(net, "_orig_mod", net)
    # The older weight_norm and spectral_norm keep a weight with its graph in an attribute, which deepcopy refuses.
    computed = [
        value
        for module in net.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    own = copy.deepcopy(net, {id(value): value.detach().clone() for value in computed}).eval().requires_grad_(False)
    for parameter in own.parameters():
        parameter.grad = None
    return own
