"""Networks that are chosen by name: of this package, of timm and torchvision, and of the user's own modules."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moment_ops.training.errors import TrainingError, import_package
from moment_ops.training.pretrained import VGG19, EfficientNetLite, Encoder, ResNet18, load_weights

OWN: dict[str, Callable[..., nn.Module]] = {"vgg19": VGG19, "resnet18": ResNet18}
LITE = {f"efficientnet-lite{number}": number for number in range(3)}
AUTOENCODER = "autoencoder"
EXPECTED = f"{', '.join((AUTOENCODER, *OWN, *LITE))}, timm:NAME, torchvision:NAME or package.module:factory"
# In the place of a file of weights.
RANDOM = "random"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Named(NamedTuple):
    """A network, and what it takes.

    Args:
        mean, std: of the colour images that it was trained with, in [0, 1]. None if it takes images in [-1, 1], grey
            ones as well.
        size: the only height and width of images that it takes, or None.
        has_weights: whether it comes with its weights.
    """

    net: nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None
    has_weights: bool


class Prepared(nn.Module):
    """A network for grey or colour images ``(N, C, S, S)`` in [-1, 1], which are resized and normalized for it.

    Args:
        size: height and width that images are resized to; 0 for those that the network needs, or else their own.
    """

    def __init__(self, named: Named, size: int = 0) -> None:
        super().__init__()
        self.net, self.size = named.net, size or named.size
        self.is_normalized = named.mean is not None
        if named.mean is not None and named.std is not None:
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (named.mean, named.std))
            self.register_buffer("scale", 0.5 / std)
            self.register_buffer("shift", (0.5 - mean) / std)

    def forward(self, images: Tensor) -> Any:
        if self.size is not None:
            # Images of this size stay as they are: no branch on shapes, which could not be traced.
            images = functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net(images * self.scale + self.shift if self.is_normalized else images)


def architecture(name: str) -> str:
    """What two names of the same network have in common, whatever their package and weights."""
    own = name.rpartition(":")[2] if name.partition(":")[0] in ("timm", "torchvision") else name
    own = own.partition(".")[0].replace("-", "_").removeprefix("tf_")
    return "inception_v3" if own == "inception" else own


def is_path(name: str) -> bool:
    """Whether a name is like ``package.module:factory`` or ``timm:NAME``."""
    return all(name.partition(":"))


def check_name(name: str, option: str) -> None:
    """Raise ValueError for what cannot name a network."""
    if name not in (AUTOENCODER, *OWN, *LITE) and not is_path(name):
        raise ValueError(f"{option}: got {name!r}, expected {EXPECTED}")


def make(
    name: str, image_size: int = 32, feature_size: int = 0, *, channels: int = 3, latent_size: int = 64, **given: Any
) -> Named:
    """The network of a name, with its initial weights unless it comes with others.

    Args:
        image_size: height and width of the images.
        feature_size: those that they are resized to, or 0, for networks that are made for one size.
        channels, latent_size: channels of the images and length of the codes, for the autoencoder.
        given: further arguments of timm's ``create_model``.

    Raises:
        TrainingError: a package that is not installed, or that has no such network.
    """
    if name == AUTOENCODER:
        return Named(Encoder(channels, latent_size, image_size), None, None, None, False)
    if name in OWN:
        return Named(OWN[name](image_size=image_size), IMAGENET_MEAN, IMAGENET_STD, None, False)
    if name in LITE:
        return Named(EfficientNetLite(LITE[name]), None, None, None, True)
    package, _, rest = name.partition(":")
    if package == "timm":
        return _of_timm(rest, feature_size, given)
    if package == "torchvision":
        return _of_torchvision(rest, image_size)
    return Named(_of_factory(name), None, None, None, True)


def load(network: nn.Module, path: Path) -> None:
    """Load a file of weights. The word "random" in its place keeps the initial weights."""
    if str(path) == RANDOM:
        return
    if isinstance(network, Encoder):
        network.load(path)
    else:
        load_weights(network, path)


def _naming(name: str, errors: tuple[type[Exception], ...]) -> Callable[..., Any]:
    """Call a function whose errors are about a name."""

    def call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except errors as error:
            raise TrainingError(f"{name}: {' '.join(str(error).split())}") from error

    return call


def _of_timm(name: str, feature_size: int, given: dict[str, Any]) -> Named:
    timm = import_package("timm")
    create = _naming(f"timm:{name}", (RuntimeError, ValueError, TypeError))
    net = create(timm.create_model, name, **given)
    config = net.pretrained_cfg
    size = config["input_size"][-1] if config.get("fixed_input_size") else None
    if size and feature_size:
        net, size = create(timm.create_model, name, img_size=feature_size, **given), feature_size
    return Named(net, tuple(config["mean"]), tuple(config["std"]), size, False)


# With what released weights were trained.
_TORCHVISION: dict[str, dict[str, Any]] = {
    "inception_v3": {"transform_input": True, "aux_logits": True, "init_weights": False},
    "googlenet": {"transform_input": True, "aux_logits": True, "init_weights": False},
}


def _of_torchvision(name: str, image_size: int) -> Named:
    models = import_package("torchvision.models")
    named = _naming(f"torchvision:{name}", (ValueError, KeyError))
    net = named(models.get_model, name, weights=None, **_TORCHVISION.get(name, {}))
    weights = models.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    is_too_small = max(weights.meta["min_size"]) > image_size
    size = transform.crop_size[0] if is_too_small else None
    return Named(net, tuple(transform.mean), tuple(transform.std), size, False)


def _of_factory(path: str) -> nn.Module:
    made = imported(path)
    net = made if isinstance(made, nn.Module) else made()
    if not isinstance(net, nn.Module):
        raise TrainingError(f"{path}: got {type(net).__name__}, expected a torch.nn.Module or a function returning one")
    return net


def imported(path: str) -> Any:
    """What ``package.module:name`` is. The working directory is searched as well, as Python does."""
    module_name, _, attribute = path.partition(":")
    sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TrainingError(f"{path}: no module named {error.name!r}") from error
    finally:
        sys.path.pop()
    if not hasattr(module, attribute):
        raise TrainingError(f"{path}: the module {module_name} has no {attribute!r}")
    return getattr(module, attribute)
