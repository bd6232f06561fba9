"""`relu_moments` in a network: matching the moments of all ReLUs, over the network without it."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

import moment_ops as mo
from bench import agreement, baselines
from bench.harness import BOTH, COMPILED, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.results import NO_LOSS
from bench.workloads import Workload, make_vectors
from moment_ops.taps.functions import FEATURES
from moment_ops.training.networks import Classifier
from moment_ops.training.pretrained import VGG19, ResNet18

NETWORKS: dict[str, Callable[[], Sequence[nn.Module]]] = {
    "gfmn": lambda: (VGG19(), ResNet18()),
    "vgg19": lambda: (VGG19(),),
    "digits": lambda: (Classifier(),),
}
GROUPED = "grouped moments of the features"
EAGER = "eager: mean, var"


def _squared_distance(moments: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    return sum(((value - wanted) ** 2).mean() for value, wanted in zip(moments, target, strict=True))


def traffic_of_taps(workload: Workload, dtype: torch.dtype) -> dict[str, Traffic]:
    """What taps of all features, and the loss of their moments, move."""
    features, vector = workload.bytes(dtype), 4 * workload.columns
    return {FORWARD: Traffic(2 * vector, 2 * features + 2 * vector), BOTH: Traffic(5 * vector, 5 * features)}


class ReluMomentsBench(Bench):
    """From images to the loss; backward to the images. BatchNorm is folded for all contestants.

    The bytes are those that the ReLUs move; the time is that of the whole network.
    """

    operator = "relu_moments"
    contestants = (OURS, NO_LOSS, GROUPED, EAGER, COMPILED + "mean, var", "original: concatenated")
    slow_to_prepare = (COMPILED + "mean, var",)
    default_cases = (("vgg19", "float32"), ("digits", "float32"))

    @cached_property
    def extractor(self) -> mo.MomentExtractor:
        torch.manual_seed(0)
        networks = [net.to(self.device) for net in NETWORKS[self.workload.name]()]
        taps = mo.MomentExtractor(networks).names[: len(self.workload.shapes)]
        return mo.MomentExtractor(networks, taps).to(self.dtype)

    @cached_property
    def images(self) -> Tensor:
        channels = 1 if self.workload.name == "digits" else 3
        generator = torch.Generator(self.device).manual_seed(0)
        images = torch.randn((self.workload.batch, channels, 32, 32), generator=generator, device=self.device)
        return images.to(self.dtype).requires_grad_()

    @cached_property
    def target(self) -> tuple[Tensor, Tensor]:
        return make_vectors(self.workload, self.device)

    @cached_property
    def exact_gradient(self) -> Tensor:
        images = self.images.detach().double().requires_grad_()
        features = self.extractor.double().features(images)
        # Both functions work in place on what is float64 already.
        copies = [x.detach().float() for x in features]
        moments = agreement.exact_moments(copies)
        slopes = [2 * (m - wanted) / len(m) for m, wanted in zip(moments, self.target, strict=True)]
        grads = agreement.exact_gradients(copies, moments[0], *slopes)
        (gradient,) = torch.autograd.grad(features, images, [grad.double() for grad in grads])
        self.extractor.to(self.dtype)
        return gradient

    @property
    def tolerance(self) -> float:
        """Every layer rounds once more."""
        return 100 * agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        return traffic_of_taps(self.workload, self.dtype)

    def _loss(self, contestant: str) -> Callable[[Tensor], Tensor]:
        ours = mo.MomentLoss(mo.Moments(*self.target, shapes=self.workload.shapes), process_group=False)
        if contestant == OURS:
            return lambda images: ours(self.extractor(images))
        if contestant == NO_LOSS:
            return lambda images: sum(last.float().sum() for last in self._last(images))
        if contestant == GROUPED:
            return lambda images: ours(self.extractor.features(images))
        reduction = baselines.concatenated if contestant.startswith("original") else baselines.per_layer

        def distance(images: Tensor) -> Tensor:
            return _squared_distance(reduction(self.extractor.features(images)), self.target)

        return torch.compile(distance) if contestant.startswith(COMPILED) else distance

    def _last(self, images: Tensor) -> list[Tensor]:
        return [net(images, FEATURES)[-1] for net in self.extractor.nets]

    def entry(self, contestant: str) -> Entry:
        loss = self._loss(contestant)

        def forward() -> Tensor:
            return loss(self.images)

        def both() -> Tensor:
            return torch.autograd.grad(forward(), self.images)[0]

        def error() -> float:
            # What the others are compared with has nothing to compare.
            return 0.0 if contestant == NO_LOSS else agreement.relative_error([both()], [self.exact_gradient])

        return Entry({FORWARD: forward, BOTH: both}, error)


def test_relu_moments(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("relu_moments",))
