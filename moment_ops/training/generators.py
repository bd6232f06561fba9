"""Generators by name: those of this package and of the papers, and those of the user."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moment_ops.training.errors import TrainingError
from moment_ops.training.named_networks import imported, is_path
from moment_ops.training.networks import Generator

# (channels, latent_size, image_size) -> latent vectors (N, latent_size) to images (N, channels, S, S) in [-1, 1].
Factory = Callable[[int, int, int], nn.Module]
EXPECTED = "dcgan, gfmn-dcgan, gfmn-resnet, molm-dcgan or package.module:factory"
_given: dict[str, Factory] = {}


class _Layers(nn.Module):
    """Layers that start with latent vectors as maps of 1 x 1."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent[:, :, None, None])


class GfmnDcgan(_Layers):
    """The DCGAN-like generator of GFMN: 1.14 million weights for 32 pixels and 100 latent values, 3.65 for 64.

    Source: dos Santos et al. 2019 and their code: transposed convolutions, of which two more convolutions keep the
    size; no biases; weights of N(0, 0.02).
    """

    def __init__(self, channels: int, latent_size: int, image_size: int, width: int = 64) -> None:
        doublings = _doublings(image_size) - 1
        inputs = width << doublings
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_size, inputs, 4, bias=False)]
        for _ in range(doublings):
            layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
            layers.append(nn.ConvTranspose2d(inputs, inputs // 2, 4, stride=2, padding=1, bias=False))
            inputs //= 2
        for _ in range(2):
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, inputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
        layers += [nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1, bias=False), nn.Tanh()]
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0, 0.02)


class MolmDcgan(nn.Module):
    """The generator of MoLM as a third party has it: ReLU before BatchNorm, weights of N(0, 0.02).

    Source: the code of a third party, since that of Ravuri et al. 2018 is not published.
    """

    def __init__(self, channels: int, latent_size: int, image_size: int, width: int = 128) -> None:
        super().__init__()
        doublings = _doublings(image_size) - 1
        inputs = width << doublings
        layers: list[nn.Module] = [nn.Linear(latent_size, inputs * 16, bias=False), nn.Unflatten(1, (inputs, 4, 4))]
        for _ in range(doublings):
            layers += [nn.ReLU(), nn.BatchNorm2d(inputs), nn.ConvTranspose2d(inputs, inputs // 2, 4, 2, 1, bias=False)]
            inputs //= 2
        layers += [nn.ReLU(), nn.BatchNorm2d(inputs), nn.ConvTranspose2d(inputs, channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class _Upsampled(nn.Module):
    """A residual block that doubles height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bypass = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.interpolate(functional.relu(self.norm1(x)), scale_factor=2))
        y = self.conv2(functional.relu(self.norm2(y)))
        # A convolution of 1 x 1 before the map is enlarged takes a quarter of the products.
        return y + functional.interpolate(self.bypass(x), scale_factor=2)


class GfmnResnet(_Layers):
    """The ResNet generator of GFMN: 3.3 million weights for 32 pixels and 100 latent values, 11.7 for 64.

    Source: dos Santos et al. 2019 and their code; weights as Glorot & Bengio 2010, uniform.
    """

    def __init__(self, channels: int, latent_size: int, image_size: int, width: int = 64) -> None:
        doublings = _doublings(image_size)
        inputs = width << doublings
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_size, inputs, 4)]
        for _ in range(doublings):
            layers.append(_Upsampled(inputs, inputs // 2))
            inputs //= 2
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, channels, 3, padding=1), nn.Tanh()]
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)


def _doublings(image_size: int) -> int:
    """How often a map of 4 x 4 is doubled."""
    return image_size.bit_length() - 3


_OWN: dict[str, Factory] = {
    "dcgan": lambda channels, latent_size, size: Generator(channels, latent_size, image_size=size),
    "gfmn-dcgan": GfmnDcgan,
    "gfmn-resnet": GfmnResnet,
    "molm-dcgan": MolmDcgan,
}


def check_name(name: str) -> None:
    """Raise ValueError for what cannot name a generator."""
    if name not in _OWN and not is_path(name):
        raise ValueError(f"generator: got {name!r}, expected {EXPECTED}")


def name_of(factory: Factory) -> str:
    """The name of a function of the user, by which this process, and others that can import it, make its generator."""
    name = f"{factory.__module__}:{factory.__qualname__}"
    _given[name] = factory
    return name


def make(name: str, channels: int, latent_size: int, image_size: int) -> nn.Module:
    """The generator of a name, with initial weights.

    Raises:
        TrainingError: a function of the user cannot be imported, or what it returns does not make such images.
    """
    factory = _OWN.get(name) or _given.get(name) or imported(name)
    generator = factory(channels, latent_size, image_size)
    if not isinstance(generator, nn.Module):
        raise TrainingError(f"--generator: got {type(generator).__name__} from {name}, expected a torch.nn.Module")
    was_training = generator.training
    with torch.no_grad():
        made = generator.eval()(torch.zeros(2, latent_size))
    generator.train(was_training)
    expected = (2, channels, image_size, image_size)
    if not isinstance(made, Tensor) or made.shape != expected:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise TrainingError(f"--generator: {name} makes {got} of 2 latent vectors, expected {expected}")
    # What a checkpoint and samples need to know.
    generator.channels, generator.latent_size = channels, latent_size  # type: ignore[assignment]
    return generator
