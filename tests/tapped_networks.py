"""Networks whose ReLUs are found in different ways, and their features by plain means."""

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moment_ops.taps.hooks import RecordedNetwork

IMAGE = (3, 8, 8)
RELUS = (torch.relu, torch.relu_, functional.relu, torch.Tensor.relu, torch.Tensor.relu_)


class Chain(nn.Sequential):
    """In-place ReLU modules after BatchNorms, as in VGG."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6, affine=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 3, bias=True),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 3),
        )


class Block(nn.Module):
    """A residual block that calls functions and adds in place."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return functional.relu(y)


class Residual(nn.Module):
    """ReLUs as functions and as a tensor's method."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(self.layer1(x).mean((2, 3)).relu())


class Shared(nn.Module):
    """One in-place ReLU module for all."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for _ in range(2):
            x = self.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


class UsedLater(nn.Module):
    """The input of an in-place ReLU is used afterwards, when it is the output."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.conv1(x)
        before = h * 2
        y = self.act(h)
        z = self.conv2(y) + h + before
        functional.relu(z, inplace=True)
        return (z - 0.1).relu_()


class Viewed(nn.Module):
    """What an in-place ReLU writes into a view is used through the whole."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        h = self.conv(x)
        rows = h.flatten(1)
        torch.relu_(rows)
        return torch.relu(h - 0.1)


class AddedTo(nn.Module):
    """A sum in place is seen under its other name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        h = self.conv(x)
        other = h
        h += 1
        return torch.relu(other * 2 - h)


class Flow(nn.Module):
    """Control flow by values, which cannot be traced; a loop by shapes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        if x.sum() > -1:
            x = functional.relu(x - 0.5)
        for _ in range(int(x.shape[2]) // 4):
            x = self.relu(x - 0.1)
        return self.head(x.mean((2, 3)))


class ShapeFlow(Flow):
    """Control flow by shapes: not traceable by fx, but without a break for torch.compile."""

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        if x.shape[1] == 4:
            x = functional.relu(x - 0.5)
        return self.head(self.relu(x - 0.1).mean((2, 3)))


NAMES = {
    Chain: ("2:0", "5:0", "8:0"),
    Residual: ("relu:0", "layer1.0.relu:0", "layer1.0.relu:1", "layer1.1.relu:0", "layer1.1.relu:1", "relu:1"),
    Shared: ("relu:0", "relu:1", "relu:2"),
    UsedLater: ("act:0", "relu:0", "relu:1"),
    Viewed: ("relu:0", "relu:1"),
    AddedTo: ("relu:0",),
    Flow: ("act:0", "relu:0", "relu:1", "relu:2"),
    ShapeFlow: ("act:0", "relu:0", "relu:1"),
}
NETWORKS = tuple(NAMES)
UNTRACEABLE = (Flow, ShapeFlow)


def make_network(kind, dtype=torch.float64, seed=0):
    """A network in training mode, whose BatchNorms have seen data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = kind().double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        for _ in range(3):
            net(torch.randn(16, *IMAGE, dtype=torch.float64) + 0.3)
    return net.to(dtype)


def make_images(rows=6, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *IMAGE, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


class _Recording(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.outputs = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in RELUS:
            self.outputs.append(result.clone())
        return result


def plain_features(net, images):
    """The outputs of all ReLUs of a network in evaluation mode, which stays in the mode that it is in."""
    training = net.training
    with _Recording() as recording:
        net.eval()(images)
    net.train(training)
    return recording.outputs


def is_watched(extractor):
    return [isinstance(net, RecordedNetwork) for net in extractor.nets]
