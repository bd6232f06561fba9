"""The generator and the two classifiers, for images in [-1, 1]."""

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

Network = TypeVar("Network", bound=nn.Module)


class Generator(nn.Module):
    """A generator like DCGAN's: latent vectors ``(N, latent_size)`` -> images ``(N, channels, S, S)`` in [-1, 1].

    Args:
        width: channels of the last feature map. Every map before has twice as many, at half the size, from 4 x 4 on.
        image_size: S, a power of two from 8 on.
    """

    def __init__(self, channels: int = 1, latent_size: int = 64, width: int = 32, image_size: int = 32) -> None:
        super().__init__()
        doublings = image_size.bit_length() - 4
        if image_size < 8 or image_size != 8 << doublings:
            raise ValueError(f"image_size: got {image_size}, expected a power of two from 8 on")
        self.channels, self.latent_size = channels, latent_size
        inputs = width << doublings
        self.project = nn.Linear(latent_size, inputs * 4 * 4, bias=False)
        layers: list[nn.Module] = [nn.Unflatten(1, (inputs, 4, 4)), nn.BatchNorm2d(inputs), nn.ReLU()]
        for _ in range(doublings):
            layers.append(nn.ConvTranspose2d(inputs, inputs // 2, 4, stride=2, padding=1, bias=False))
            inputs //= 2
            layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
        layers += [nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(self.project(latent))


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Classifier(nn.Module):
    """A classifier whose features are matched: the outputs of six convolutions, each with BatchNorm and ReLU."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                convolution(channels, 16),
                convolution(16, 32, stride=2),
                convolution(32, 32),
                convolution(32, 64, stride=2),
                convolution(64, 64),
                convolution(64, 128, stride=2),
            ]
        )
        self.head = nn.Linear(128, classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """Six feature maps, from ``(N, 16, 32, 32)`` to ``(N, 128, 4, 4)``: 43,008 features per image."""
        maps = []
        for block in self.blocks:
            images = block(images)
            maps.append(images)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        return self.head(self.features(images)[-1].mean((2, 3)))


class EvaluationClassifier(nn.Module):
    """A digit classifier of another architecture. The 64 features of its last hidden layer evaluate samples."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(1, 24),
            nn.MaxPool2d(2),
            convolution(24, 48),
            convolution(48, 48),
            nn.MaxPool2d(2),
            convolution(48, 96),
            convolution(96, 96),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        """Images ``(N, C, S, S)``, of which the channels are averaged, and pixels to 32 x 32 -> ``(N, 64)``."""
        grey = images.mean(1, keepdim=True)
        return self.layers(grey if grey.shape[2] == 32 else functional.adaptive_avg_pool2d(grey, 32))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        return self.head(self.features(images))


def freeze(network: Network) -> Network:
    """Put a network into evaluation mode, with parameters that do not require grad."""
    network.eval().requires_grad_(False)
    return network
