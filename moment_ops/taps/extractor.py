"""`MomentExtractor`: the moments of the features of a frozen network, collected while it computes them."""

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
    """Moments of the features of one frozen network, or of several networks as one set of features.

    Every selected call gets a tap, in execution order. The tap of a ReLU replaces it: one pass computes the ReLU and
    the moments of its output. Every other tap reads the output of its call and returns it unchanged. A tap is one
    autograd node. Its backward adds the gradients of the next layer and of the moments in one pass.

    Args:
        nets: a module, or several in a sequence or a mapping. Each is called with the images only. The extractor copies
            the networks, so that they do not change. The copies are frozen, stay in evaluation mode also after
            `train()`, and end after the last tap. A BatchNorm that alone reads the output of a convolution is folded
            into the convolution if its weights are float32 or float64. To run a network in 16 bits, convert the
            extractor rather than the network.
        layers: which calls get taps. Either a module type or several, where `torch.nn.ReLU` includes calls of
            `torch.relu` and `torch.nn.functional.relu`, and `torch.nn.GELU` includes timm's class of that name; or
            names as in `names`, of one call ("layer1.0.relu:1") or of a module ("layer1.0.relu", which selects all its
            calls); or a predicate (name, module) -> bool, which gets `nn.ReLU()` for a call of a function. By default
            all activations are selected, except for those that usually gate other features or are the output of a
            network: Sigmoid, Hardsigmoid, Tanh, Hardtanh, Softsign, LogSigmoid and Softmax.

    Attributes:
        names: the names of the taps: module path and call index, "layer1.0.relu:1". With several networks they start
            with "index/" or "key/" of the network. None before the first call of a network that cannot be traced.

    Networks are traced with `torch.fx`. If a network cannot be traced, or if a selected call is within a module that
    torch.fx records as one call (`torch.nn.TransformerEncoder`), hooks are used instead. Then BatchNorm is not folded,
    `names` are known after the first call, and a later call that reaches other taps raises ValueError.

    Raises:
        TypeError, ValueError: wrong types; a network without a selected call; a name that does not exist. The message
            lists what can be selected. Networks that are not traced raise it in the first call.

    Cost: the tap of a ReLU reads and writes what the ReLU reads and writes, in forward and backward. It needs a few
    (F,) vectors of memory. Every other tap reads its features once more, and its backward adds gradients in a separate
    pass.

    Source: dos Santos et al. 2019, who match all ReLU outputs of VGG19 and ResNet18 together.
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
        """One name per tap; None if they are not known yet."""
        found = [net.names if isinstance(net, RecordedNetwork) else names for net, names in self._pairs()]
        return None if None in found else tuple(name for names in found if names for name in names)

    def forward(self, images: Tensor) -> Moments:
        """The moments of the features of all taps, with their names.

        Args:
            images: (N, ...) input of the networks.

        Returns:
            Moments with variances and correction 1, in float32 (float64 for float64 features). Differentiable with
            respect to the images, twice in eager mode. With several processes, images may have no rows, as for
            `moment_ops.moments`.
        """
        return self._packed(self._run(images, MOMENTS))

    def features(self, images: Tensor) -> list[Tensor]:
        """The features of all taps, one (N, ...) Tensor per tap, in the order of `names`."""
        return self._run(images, FEATURES)

    def moments_and_features(self, images: Tensor) -> tuple[Moments, list[Tensor]]:
        """The moments and the features of all taps, from one run of the networks."""
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
        """Does nothing: the extractor stays in evaluation mode."""
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
    # A container that defines `forward` is one network.
    if isinstance(nets, nn.Module) and type(nets).forward is not nn.Module.forward:
        return {"": nets}
    if isinstance(nets, (Mapping, nn.ModuleDict)):
        named = {f"{key}/": net for key, net in nets.items()}
    elif isinstance(nets, Iterable):
        named = {f"{i}/": net for i, net in enumerate(nets)}
    else:
        raise TypeError(f"nets: got {type(nets).__name__}, expected a Module, or a sequence or mapping of Modules")
    if not named:
        raise ValueError(f"nets: got an empty {type(nets).__name__}, expected at least one Module")
    for prefix, net in named.items():
        if not isinstance(net, nn.Module):
            raise TypeError(f"nets[{prefix.removesuffix('/')}]: got {type(net).__name__}, expected a Module")
        if isinstance(net, torch.jit.ScriptModule):
            raise _scripted(f"nets[{prefix.removesuffix('/')}]")
    return named


def _scripted(name: str) -> TypeError:
    return TypeError(f"{name}: got a ScriptModule, whose calls cannot be tapped; pass the Module it was made from")


def _own_copy(net: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, without gradients; a compiled module is unwrapped."""
    net = getattr(net, "_orig_mod", net)
    # The older weight_norm and spectral_norm keep a weight with its graph in an attribute, which deepcopy cannot copy.
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
