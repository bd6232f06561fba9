"""Networks with one value per image, whose moments MoLM matches."""

from torch import Tensor, nn

SLOPE = 0.2


class ConvMomentNetwork(nn.Module):
    """Six convolutions with LeakyReLU, of which every second halves the size, and a linear layer. No BatchNorm.

    Images ``(N, channels, image_size, image_size)`` -> values ``(N,)``. The convolutions have ``width``, ``2 width``
    and ``4 width`` channels, two of each. Hidden units, parameters and input are 4.87 million moments for width 128 and
    images of 32 x 32, and 42 million for width 384.

    Args:
        channels: channels of the images.
        image_size: height and width of the images, a multiple of 8.
        width: channels of the first two convolutions.
        last_bias: whether the linear layer has a bias. Its gradient is 1 for all images, so that a generator learns
            nothing from it, and the squared norm of the gradient is at least 1.

    Source: the discriminator of Miyato et al. 2018 without normalisation, as in published code for MoLM.
    """

    def __init__(self, channels: int = 3, image_size: int = 32, width: int = 128, *, last_bias: bool = False) -> None:
        super().__init__()
        if image_size % 8 or image_size < 8:
            raise ValueError(f"image_size: got {image_size}, expected a multiple of 8")
        layers: list[nn.Module] = []
        inputs = channels
        for outputs in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(SLOPE)]
            layers += [nn.Conv2d(outputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            inputs = outputs
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.value = nn.Linear(inputs * (image_size // 8) ** 2, 1, bias=last_bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.value(self.layers(images)).squeeze(1)


class SmallMomentNetwork(nn.Module):
    """Three convolutions of 4 x 4 with stride 2, each with LeakyReLU, and a linear layer without bias. No BatchNorm.

    Images ``(N, channels, image_size, image_size)`` -> values ``(N,)``. Hidden units, parameters and input are 181,984
    moments for width 32 and grey images of 32 x 32.

    Args:
        channels: channels of the images.
        image_size: height and width of the images, a multiple of 8.
        width: channels of the first convolution. The others have twice and four times as many.
    """

    def __init__(self, channels: int = 1, image_size: int = 32, width: int = 32) -> None:
        super().__init__()
        if image_size % 8 or image_size < 8:
            raise ValueError(f"image_size: got {image_size}, expected a multiple of 8")
        layers: list[nn.Module] = []
        inputs = channels
        for outputs in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            inputs = outputs
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.value = nn.Linear(inputs * (image_size // 8) ** 2, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.value(self.layers(images)).squeeze(1)
