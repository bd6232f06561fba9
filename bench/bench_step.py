"""`step`: a whole training step of GFMN or MoLM, from latent vectors to the optimizer."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

import moment_ops as mo
from bench import agreement, baselines
from bench.bench_moment_network import EagerMoments
from bench.bench_relu_moments import traffic_of_taps
from bench.harness import BOTH, COMPILED, FORWARD, OURS, Bench, Entry
from bench.machine import Traffic
from bench.results import EXTRACTOR, GENERATOR, NO_LOSS, OPTIMIZER
from bench.workloads import Workload
from moment_ops.taps.functions import FEATURES
from moment_ops.training import extractors, gfmn, molm, named_networks
from moment_ops.training.data import ImageData, scale
from moment_ops.training.finite import step_if_finite
from moment_ops.training.networks import Classifier, freeze
from moment_ops.training.pretrained import VGG19, ResNet18
from moment_ops.training.settings import MatchingSettings
from moment_ops.training.trainer import Trainer

PLAIN, EAGER, ORIGINAL = "moment_ops, default options", "eager, float32", "original, float32"
PARTS = (GENERATOR, EXTRACTOR, OPTIMIZER)
LR = 5e-5
# For every method, what its paper has. One step per round, of the moment network and of real images, is not timed.
GFMN = {
    "average_lr": baselines.LR,
    "average_reduction": "mean",
    "layer_scale": "equal",
    "generator": "gfmn-dcgan",
    "latent_size": 100,
}
WEIGHTS = ("hidden_weight", "gradient_weight", "input_weight")
MOLM = {
    "average": "none",
    "network": "conv",
    "width": 128,
    "generator": "molm-dcgan",
    "latent_size": 128,
    "first_moment_steps": 1,
    "generator_steps": 10**9,
} | dict.fromkeys(WEIGHTS, 1.0)


def features_of(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The activations of a network of the GFMN paper in plain PyTorch."""
    if isinstance(net, Classifier):
        return net.features(images)
    found = []
    x = images
    if isinstance(net, VGG19):
        for layer in net.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found
    assert isinstance(net, ResNet18)
    x = functional.relu(net.bn1(net.conv1(x)))
    found.append(x)
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in layer:
            y = functional.relu(block.bn1(block.conv1(x)))
            x = functional.relu(block.bn2(block.conv2(y)) + block.shortcut(x))
            found += [y, x]
    return found[: extractors.MATCHED_RELUS]


class PlainStep:
    """A step in plain PyTorch with the networks of a trainer. Subclasses say what the loss is.

    Args:
        original: the loop of the published code: the weights of the extractor get gradients as well, which are not
            used, and values for the log are read in every step.
    """

    def __init__(self, trainer: Trainer, original: bool) -> None:
        self.generator = copy.deepcopy(trainer.generator).train()
        self.settings, self.original = trainer.settings, original
        self.noise = torch.Generator().manual_seed(self.settings.seed)
        self.parameters = list(self.generator.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, betas=self.settings.betas)
        self.logged = 0.0

    def latent(self) -> Tensor:
        shape = (self.settings.batch_size, self.settings.latent_size)
        return torch.randn(shape, generator=self.noise).to(self.parameters[0])

    def loss(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, images: Tensor) -> Tensor:
        """Of the loss, to images that are a leaf; other gradients as in a step."""
        images.grad = None
        self.loss(images).backward()
        assert images.grad is not None
        return images.grad

    def forward(self) -> Tensor:
        return self.loss(self.generator(self.latent()))

    def advance(self) -> None:
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        if self.original:
            self.logged += loss.item()
        self.optimizer.step()


class GfmnStep(PlainStep):
    """The networks are in evaluation mode for both, so that results can be compared.

    The published code leaves BatchNorm of the extractor in training mode unless an option is set, which takes longer.
    """

    def __init__(self, trainer: Trainer, nets: Sequence[nn.Module], prepare: Callable, original: bool) -> None:
        super().__init__(trainer, original)
        self.nets, self.prepare = [net.eval().requires_grad_(original) for net in nets], prepare
        loss = trainer.matching.moment_loss
        targets = loss.target_mean.clone(), loss.target_var.clone()
        self.matching: nn.Module
        if original:
            self.matching = baselines.Original(*targets)
        else:
            self.matching = baselines.PackedLoss(baselines.per_layer, *targets)

    def features(self, images: Tensor) -> list[Tensor]:
        images = self.prepare(images)
        return [x for net in self.nets for x in features_of(net, images)]

    def loss(self, images: Tensor) -> Tensor:
        for net in self.nets if self.original else ():
            net.zero_grad()
        return self.matching(self.features(images))


class MolmStep(PlainStep):
    """The original is the algorithm of a third party, whose double backward is mended here."""

    def __init__(self, trainer: Trainer, original: bool) -> None:
        super().__init__(trainer, original)
        self.f = copy.deepcopy(trainer.matching.net.f).requires_grad_()
        self.target = trainer.matching.moment_loss.target_mean.clone()

    def mean(self, images: Tensor) -> Tensor:
        eager = EagerMoments(self.f)
        hidden, value = eager.forward(images)
        return eager.pack(eager.means([*hidden, images]), eager.gradients(value))

    def loss(self, images: Tensor) -> Tensor:
        self.f.zero_grad()
        return (self.mean(images) - self.target).square().sum()

    def gradient(self, images: Tensor) -> Tensor:
        return super().gradient(images) if self.original else torch.autograd.grad(self.loss(images), images)[0]

    def advance(self) -> None:
        if self.original:
            return super().advance()
        # The moment network's weights need no gradient of this loss.
        gradients = torch.autograd.grad(self.forward(), self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()


class StepBench(Bench):
    """Whole steps: "forward" is from latent vectors to the loss, "forward + backward" is all of `Trainer.advance`.

    The dtype is that of ours, by autocast; it has channels last as well. The eager step and the original's loop are
    in float32. The error is that of the generator's gradients in the first step. Without matching, only the networks
    run, as ours does: what a step takes beyond that is outside the networks.
    """

    operator = "step"
    contestants = (OURS, NO_LOSS, PLAIN, EAGER, ORIGINAL, COMPILED + OURS)
    slow_to_prepare = (COMPILED + OURS,)
    default_cases = (("gfmn", "bfloat16"), ("gfmn", "float32"), ("molm", "bfloat16"), ("molm", "float32"))
    workloads = ("gfmn", "molm", "digits")

    def __init__(self, workload: Workload, dtype: str, device: str = "cpu") -> None:
        super().__init__(workload, dtype, device)
        self.is_molm = workload.name == "molm"
        self.channels = 1 if workload.name == "digits" else 3
        torch.manual_seed(0)
        images = torch.randint(256, (4 * workload.batch, self.channels, 32, 32), dtype=torch.uint8)
        self.data = ImageData("random", images, images[:4]).to(torch.device(device))

    def settings(self, contestant: str) -> MatchingSettings:
        fast = contestant != PLAIN
        amp = self.dtype_name if fast and self.dtype_name != "float32" else "none"
        given = {
            "batch_size": self.workload.batch,
            "lr": LR,
            "steps": 10**9,
            "seconds": 1e9,
            "channels_last": fast,
            "amp": amp,
            "compile": contestant.startswith(COMPILED),
        }
        if self.is_molm:
            return molm.Settings(**given, **MOLM, real_images=len(self.data.train))
        features = "classifier" if self.workload.name == "digits" else "vgg19+resnet18"
        return gfmn.Settings(**given, **GFMN, features=features)

    @cached_property
    def extractor(self) -> mo.MomentExtractor:
        if self.workload.name == "digits":
            return mo.MomentExtractor(freeze(self.nets()[0]))
        choice = extractors.Choice("vgg19+resnet18")
        return extractors.pretrained_extractor(choice, None).to(self.device)

    def nets(self) -> list[nn.Module]:
        torch.manual_seed(0)
        nets = (Classifier(),) if self.workload.name == "digits" else (VGG19(), ResNet18())
        return [net.eval().to(self.device) for net in nets]

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the networks expect them."""
        if self.workload.name == "digits":
            return images
        # The buffers may have another dtype than the images.
        net = self.prepared
        return images * net.scale.to(images) + net.shift.to(images)

    @cached_property
    def prepared(self) -> nn.Module:
        return named_networks.Prepared(named_networks.make("vgg19")).to(self.device)

    @cached_property
    def target(self) -> mo.Moments:
        with torch.no_grad():
            return self.extractor(scale(self.data.train[: self.workload.batch], self.data.device))

    def trainer(self, contestant: str) -> Trainer:
        """The trainer of a new run; with the same weights and random numbers every time."""
        settings = self.settings(contestant)
        if self.is_molm:
            trainer: Trainer = molm.new_trainer(self.data, settings)
            trainer.matching.begin_round()
            trainer.matching.steps = 1
            return trainer
        return gfmn.new_trainer(self.data, copy.deepcopy(self.extractor), self.target, settings)

    def plain(self, original: bool) -> PlainStep:
        trainer = self.trainer(PLAIN)
        return MolmStep(trainer, original) if self.is_molm else GfmnStep(trainer, self.nets(), self.prepare, original)

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """Those of the generator in the first step, in float64."""
        step = self.plain(False)
        step.generator.double()
        images = step.generator(step.latent())
        if isinstance(step, MolmStep):
            step.f.double()
            loss = (step.mean(images) - step.target.double()).square().sum()
            return list(torch.autograd.grad(loss, step.parameters))
        assert isinstance(step, GfmnStep)
        for net in step.nets:
            net.double()
        wide = [x.flatten(1) for x in step.features(images)]
        moments = torch.cat([x.mean(0) for x in wide]), torch.cat([x.var(0) for x in wide])
        targets = step.matching.target_mean, step.matching.target_var
        differences = [target.double() - moment.detach() for target, moment in zip(targets, moments, strict=True)]
        averages = agreement.exact_averages(differences, 1)
        loss = -sum(torch.dot(v, moment) for v, moment in zip(averages, moments, strict=True))
        return list(torch.autograd.grad(loss, step.parameters))

    @property
    def tolerance(self) -> float:
        """Every layer rounds some times more, of the extractor and of the generator."""
        return 100 * agreement.tolerance(self.dtype)

    @property
    def traffic(self) -> dict[str, Traffic]:
        return traffic_of_taps(self.workload, self.dtype) | dict.fromkeys(PARTS, Traffic(0))

    def entry(self, contestant: str) -> Entry:
        if contestant in (EAGER, ORIGINAL):
            return self._plain_entry(self.plain(contestant == ORIGINAL))
        return self._own_entry(contestant, self.trainer(contestant))

    def _parts(
        self,
        generate: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        latent: Tensor,
        gradient: Callable[[Tensor], Tensor],
        optimizer: Callable[[], object],
    ) -> dict[str, Callable[[], object]]:
        images = generate(latent).detach().requires_grad_()
        slope = torch.randn_like(images)
        calls = (
            lambda: torch.autograd.grad(generate(latent), parameters, slope),
            lambda: gradient(images),
            optimizer,
        )
        return dict(zip(PARTS, calls, strict=True))

    def _plain_entry(self, step: PlainStep) -> Entry:
        def error() -> float:
            step.advance()
            return agreement.relative_error([p.grad for p in step.parameters], self.exact_gradients)

        latent = torch.randn(self.workload.batch, step.settings.latent_size, device=self.device)
        parts = self._parts(step.generator, step.parameters, latent, step.gradient, step.optimizer.step)
        return Entry({FORWARD: step.forward, BOTH: step.advance} | parts, error)

    def _own_entry(self, contestant: str, trainer: Trainer) -> Entry:
        parameters = list(trainer.generator.parameters())
        trainer.generator.train()
        latent = torch.randn(self.workload.batch, trainer.settings.latent_size, device=self.device)
        autocast = torch.autocast(self.device, trainer.autocast, enabled=trainer.autocast is not None)
        matching = self._networks(trainer) if contestant == NO_LOSS else trainer.matching

        def forward() -> Tensor:
            with autocast:
                return matching(trainer.generator(latent))

        def gradient(images: Tensor) -> Tensor:
            with autocast:
                loss = matching(images)
            return torch.autograd.grad(loss, images)[0]

        def without_matching() -> object:
            return torch.autograd.grad(forward(), parameters)

        def error() -> float:
            if contestant == NO_LOSS:
                # What the others are compared with has nothing to compare.
                without_matching()
                return 0.0
            trainer.advance()
            return agreement.relative_error([p.grad for p in parameters], self.exact_gradients)

        def optimizer() -> object:
            return step_if_finite(trainer.optimizer)

        def generate(latent: Tensor) -> Tensor:
            with autocast:
                return trainer.generator(latent)

        parts = self._parts(generate, parameters, latent, gradient, optimizer)
        if contestant == NO_LOSS:
            del parts[OPTIMIZER]
            return Entry({FORWARD: forward, BOTH: without_matching} | parts, error)
        return Entry({FORWARD: forward, BOTH: trainer.advance} | parts, error)

    def _networks(self, trainer: Trainer) -> Callable[[Tensor], Tensor]:
        """The extractor without moments; of MoLM the moment network with its double backward."""
        if self.is_molm:
            eager = EagerMoments(trainer.matching.net.f)

            def value(images: Tensor) -> Tensor:
                _, mean = eager.forward(images)
                return sum(gradient.sum() for gradient in eager.gradients(mean))

            return value
        nets = trainer.matching.extractor.nets
        return lambda images: sum(net(images, FEATURES)[-1].float().sum() for net in nets)


def test_step(benchmark, call) -> None:
    benchmark(call)


if __name__ == "__main__":
    from bench.command_line import main

    main(operators=("step",))
