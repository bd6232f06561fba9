"""`moment_network`: the generator's step of MoLM, from images through a moment network to their gradients."""

import copy
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

import moment_ops as mo
from bench import agreement, baselines
from bench.harness import BOTH, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.workloads import Workload
from moment_ops.moment_network import _means_of
from moment_ops.training.moment_networks import ConvMomentNetwork, SmallMomentNetwork

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "molm": (ConvMomentNetwork, (3, 32, 32)),
    "digits": (SmallMomentNetwork, (1, 32, 32)),
    "tiny": (lambda: SmallMomentNetwork(1, 8, 2), (1, 8, 8)),
}
EAGER = "eager"
# In the order of a step.
PARTS = (
    "network, forward",
    "hidden means",
    "parameter gradients",
    "packing",
    "loss and average",
    "double backward",
)
# Steps of the average before gradients are compared.
STEPS = 3


class EagerMoments:
    """The same in plain PyTorch, for the ready networks."""

    def __init__(self, f: nn.Module) -> None:
        self.f, self.parameters = f, list(f.parameters())

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden units and the mean of f."""
        hidden, x = [], images
        for layer in self.f.layers:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                hidden.append(x)
        return hidden, self.f.value(x).mean()

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, self.parameters, create_graph=True)

    @staticmethod
    def means(features: list[Tensor]) -> list[Tensor]:
        return [x.mean(0).flatten() for x in features]

    @staticmethod
    def pack(means: list[Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([*means[:-1], *(g.flatten() for g in gradients), means[-1]])

    def __call__(self, images: Tensor) -> Tensor:
        hidden, value = self.forward(images)
        return self.pack(self.means([*hidden, images]), self.gradients(value)).to(torch.float32)


class EagerLoss(nn.Module):
    """The ADAM moving average on packed means."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.average = baselines.PackedAdamMovingAverage(len(target), target.device)

    def forward(self, mean: Tensor) -> Tensor:
        difference = self.target - mean
        return torch.dot(self.average(difference.detach()), difference)


class MomentNetworkBench(Bench):
    """From images to the loss; backward to the images. Then the parts of it, one by one.

    The bytes are those of the hidden units and the packed vectors; the time is that of the network's convolutions, most
    of it in the double backward. There is no contestant from torch.compile: it has no double backward.
    """

    operator = "moment_network"
    # The plain backward goes to the parameters of the network as well.
    contestants = (OURS, f"{EAGER}: torch.autograd.grad to the images", f"{EAGER}: loss.backward()")
    default_cases = (("molm", "float32"),)
    workloads = tuple(NETWORKS)

    def __init__(self, workload: Workload, dtype: str, device: str = "cpu") -> None:
        super().__init__(workload, dtype, device)
        make_network, self.image_shape = NETWORKS[workload.name]
        torch.manual_seed(0)
        self.f = make_network().to(device, self.dtype)
        self.net = mo.MomentNetwork(self.f)
        with torch.no_grad():
            # As in a training; as PyTorch initialises such networks, gradients of deep ones lie far apart in size.
            self.net.rescale(self.images.detach())
            self.target = self.net.moments(self.images.flip(0) * 0.5)
        batch = min(workload.batch, len(self.images))
        self.workload = Workload(workload.name, workload.title, batch, self.target.shapes)

    @cached_property
    def images(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        images = torch.randn((self.workload.batch, *self.image_shape), generator=generator, device=self.device)
        return images.to(self.dtype).requires_grad_()

    @cached_property
    def exact_gradient(self) -> Tensor:
        """Gradient of the images in the call number STEPS."""
        images = self.images.detach().double().requires_grad_()
        mean = mo.MomentNetwork(copy.deepcopy(self.f).double()).moments(images).mean
        (average,) = agreement.exact_averages([self.target.mean.double() - mean.detach()], STEPS)
        return torch.autograd.grad(-torch.dot(average, mean), images)[0]

    @property
    def tolerance(self) -> float:
        """Every layer rounds some times more."""
        return 100 * agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        units = sum(
            torch.Size(shape).numel()
            for name, shape in zip(self.target.names, self.target.shapes, strict=True)
            if name.startswith("hidden")
        )
        hidden, vector = self.workload.batch * units * self.dtype.itemsize, 4 * self.workload.columns
        forward = Traffic(hidden + vector, 8 * vector)
        both = Traffic(forward.read + vector, forward.read_write + hidden)
        return {FORWARD: forward, BOTH: both} | dict.fromkeys(PARTS, Traffic(0))

    def _loss(self, contestant: str) -> nn.Module:
        if contestant == OURS:
            average = mo.AdamMovingAverage(baselines.LR, baselines.BETAS, baselines.EPS)
            return mo.MomentLoss(self.target, average, process_group=False)
        return EagerLoss(self.target.mean)

    def _parts_of(self, contestant: str) -> list[Callable[[], object]]:
        """PARTS: the steps of a contestant, each on its own, on the results of those before."""
        images, eager, loss = self.images, EagerMoments(self.f), self._loss(contestant)
        hidden, value = eager.forward(images)
        features = [*hidden, images]
        reduce = _means_of if contestant == OURS else eager.means
        means, gradients = reduce(features), eager.gradients(value)
        packed = eager.pack(means, gradients)
        gradient = torch.randn_like(packed)
        mean = packed.detach().float().requires_grad_()
        given = mo.Moments(mean, shapes=self.target.shapes, names=self.target.names) if contestant == OURS else mean
        return [
            lambda: eager.forward(images),
            lambda: reduce(features),
            lambda: eager.gradients(value),
            lambda: eager.pack(means, gradients),
            lambda: torch.autograd.grad(loss(given), mean),
            lambda: torch.autograd.grad(packed, images, gradient, retain_graph=True),
        ]

    def entry(self, contestant: str) -> Entry:
        loss, eager, images = self._loss(contestant), EagerMoments(self.f), self.images
        plain = contestant.endswith("backward()")

        def forward() -> Tensor:
            return loss(self.net.moments(images) if contestant == OURS else eager(images))

        def both() -> Tensor:
            if not plain:
                return torch.autograd.grad(forward(), images)[0]
            for tensor in (images, *eager.parameters):
                tensor.grad = None
            forward().backward()
            return images.grad

        def error() -> float:
            with torch.no_grad():
                mean = self.net.moments(images)
            for _ in range(STEPS - 1):
                loss(mean if contestant == OURS else mean.mean)
            return agreement.relative_error([both()], [self.exact_gradient])

        parts = {} if plain else dict(zip(PARTS, self._parts_of(contestant), strict=True))
        return Entry({FORWARD: forward, BOTH: both} | parts, error)


def test_moment_network(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("moment_network",))
