"""GFMN: a generator is trained so that features of its images have the moments that features of the data have."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import moment_ops as mo
from moment_ops.losses.weights import Weight, weight_number
from moment_ops.training import cache, extractors, named_networks
from moment_ops.training.data import ImageData, scale
from moment_ops.training.errors import TrainingError
from moment_ops.training.evaluator import Quality
from moment_ops.training.extractors import CLASSIFIER, Say
from moment_ops.training.generators import Factory
from moment_ops.training.loop import run_method
from moment_ops.training.settings import MatchingSettings, option
from moment_ops.training.trainer import Trainer

LAYER_SCALES = ("auto", "equal", "variance")
TARGET, TARGET_COVARIANCES = "target.npz", "target-covariances.npz"


@dataclass(frozen=True)
class Settings(MatchingSettings):
    """The settings of GFMN."""

    method: ClassVar[str] = "gfmn"

    mean_weight: float = option(1.0, "weight of the means in the loss")
    var_weight: float = option(1.0, "weight of the variances in the loss")
    covariance: str = option(
        "",
        "layers whose full covariance is matched as well: a number N for the last N, or names separated by commas",
        metavar="LAYERS",
    )
    covariance_pool: int = option(
        2, "average pooling of the feature maps of these layers to N x N before their covariance; 0 for no pooling"
    )
    covariance_weight: float = option(0.1, "weight of the covariances in the loss")
    features: str = option(
        CLASSIFIER,
        "networks whose features are matched, joined by +: classifier, which is trained on the data,"
        f" {named_networks.EXPECTED}",
        metavar="NETWORKS",
    )
    feature_layers: str = option(
        "",
        "layers of these networks, if not all activations: types such as GELU, or patterns of names such as"
        " 'layer[12].*', separated by commas",
        metavar="LAYERS",
    )
    feature_size: int = option(
        0, "height and width that images are resized to for these networks; 0 for what they need, or else their own"
    )
    layer_scale: str = option(
        "auto",
        "scale of the layers in the loss: equal leaves features as they are; variance divides the features of a layer"
        " by their standard deviation; auto is equal for the classifier, and variance for the others, whose layers"
        " differ by orders of magnitude",
        choices=LAYER_SCALES,
    )
    micro_batches: int = option(
        1,
        "parts in which the features of a batch are computed, twice each: the same result with the memory of one part."
        " The generator takes the whole batch, as its BatchNorm needs",
    )
    extractor_iterations: int = option(
        extractors.CLASSIFIER_ITERATIONS, "training steps of the classifier, if its file does not exist"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor_iterations < 1:
            raise ValueError(f"extractor_iterations: got {self.extractor_iterations}, expected at least 1")
        if not 1 <= self.micro_batches <= self.batch_size:
            raise ValueError(
                f"micro_batches: got {self.micro_batches}, expected 1 to {self.batch_size}, the images of a batch"
            )
        if self.micro_batches > 1 and self.amp == "float16":
            raise ValueError(
                "micro_batches: got float16 autocast, whose loss is scaled for the whole batch; use bfloat16"
            )
        if self.covariance_pool < 0:
            raise ValueError(f"covariance_pool: got {self.covariance_pool}, expected a non-negative number")
        for name in ("mean_weight", "var_weight", "covariance_weight"):
            weight_number(getattr(self, name), name)
        self.choice.check()
        if self.layer_scale not in LAYER_SCALES:
            raise ValueError(f"layer_scale: got {self.layer_scale!r}, expected one of {', '.join(LAYER_SCALES)}")

    @property
    def choice(self) -> extractors.Choice:
        """The features that are matched."""
        return extractors.Choice(self.features, self.feature_layers, self.feature_size, self.latent_size)


class Matching(nn.Module):
    """The matching loss of generated images: a ``MomentLoss`` on the moments of a frozen extractor's features, and
    optionally a ``CovarianceLoss`` on some of these features."""

    def __init__(
        self,
        extractor: mo.MomentExtractor,
        target: mo.Moments,
        settings: Settings,
        covariance_target: mo.Moments | None = None,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        if settings.compile:
            extractor.compile()
        mean_weight, var_weight = layer_weights(target, settings)
        self.moment_loss = mo.MomentLoss(
            target,
            settings.make_average(),
            mean_weight=mean_weight,
            var_weight=var_weight,
            # With "mean", gradients would be as small as eps of the generator's optimizer.
            reduction="sum",
        )
        self.micro_batches = settings.micro_batches
        self.covariance_loss = None
        if covariance_target is not None:
            self.pooled = PooledFeatures(extractor, settings)
            self.covariance_loss = mo.CovarianceLoss(
                covariance_target, average=settings.make_average(), cov_weight=settings.covariance_weight
            )

    def forward(self, images: Tensor) -> Tensor:
        if self.micro_batches == 1:
            return self.loss(self.statistics(images))
        own = images.detach().requires_grad_()
        parts = own.split(max(1, math.ceil(len(own) / self.micro_batches)))
        loss = mo.backward_in_parts(self.statistics, parts, self.loss)
        # The value of the loss, with the gradient that is known already.
        return loss + ((images - own.detach()) * own.grad).sum()

    def statistics(self, images: Tensor) -> tuple[mo.Moments, list[Tensor]]:
        """What is matched: the moments of the features, and the features whose covariances are matched."""
        if self.covariance_loss is None:
            return self.extractor(images), []
        moments, features = self.extractor.moments_and_features(images)
        return moments, self.pooled(features)

    def loss(self, statistics: tuple[mo.Moments, list[Tensor]]) -> Tensor:
        moments, pooled = statistics
        loss = self.moment_loss(moments)
        return loss if self.covariance_loss is None else loss + self.covariance_loss(pooled)


class PooledFeatures:
    """The pooled features of the taps whose covariance is matched, (N, D) each."""

    def __init__(self, extractor: mo.MomentExtractor, settings: Settings) -> None:
        names = extractor.names
        assert names is not None
        self.extractor, self.size = extractor, settings.covariance_pool
        self.indices = [names.index(tap) for tap in chosen_taps(settings.covariance, names)]

    def __call__(self, features: Sequence[Tensor]) -> list[Tensor]:
        chosen = [features[i] for i in self.indices]
        if self.size:
            chosen = [functional.adaptive_avg_pool2d(x, self.size) if x.dim() == 4 else x for x in chosen]
        return [x.flatten(1) for x in chosen]

    def of_images(self, images: Tensor) -> list[Tensor]:
        return self(self.extractor.features(images))


def chosen_taps(choice: str, names: Sequence[str]) -> list[str]:
    """The names of the taps that ``--covariance`` selects."""
    if choice.isdecimal():
        if not 1 <= int(choice) <= len(names):
            raise TrainingError(f"--covariance: got {choice}, expected 1 to {len(names)} layers")
        return list(names[-int(choice) :])
    chosen = choice.split(",")
    for name in chosen:
        if name not in names:
            raise TrainingError(f"--covariance: got {name!r}, expected names of {', '.join(names)}")
    return chosen


def layer_weights(target: mo.Moments, settings: Settings) -> tuple[Weight, Weight]:
    """The weights of means and variances: a number, or one per layer."""
    scaled = settings.layer_scale == "variance"
    if settings.layer_scale == "auto":
        scaled = settings.features != CLASSIFIER
    if not scaled:
        return settings.mean_weight, settings.var_weight
    scales = [1 / max(float(var.mean()), 1e-12) for _, var in target.layers() if var is not None]
    return [settings.mean_weight * scale for scale in scales], [settings.var_weight * scale**2 for scale in scales]


def target_moments(data: ImageData, extractor: mo.MomentExtractor, *, batch_size: int = 250) -> mo.Moments:
    """Moments of the extractor's features over all training images, which are kept in the cache."""

    def moments(images: Tensor) -> mo.Moments:
        return extractor(scale(images, data.device))

    def compute() -> mo.Moments:
        return mo.dataset_moments(moments, data.train.split(batch_size), progress=sys.stderr.isatty())

    return cache.moments([*cache_key(data, extractor), str(batch_size)], compute)


def cache_key(data: ImageData, extractor: mo.MomentExtractor) -> list[str]:
    """What the moments of features depend on."""
    assert extractor.names is not None
    return [data.fingerprint, cache.fingerprint(extractor), *extractor.names, str(torch.get_default_dtype())]


def target_covariances(
    images: Tensor,
    extractor: mo.MomentExtractor,
    settings: Settings,
    *,
    device: torch.device | None = None,
    batch_size: int = 250,
) -> mo.Moments | None:
    """Covariances of the pooled features over uint8 images; None if they are not matched."""
    if not settings.covariance:
        return None
    pooled = PooledFeatures(extractor, settings)

    def features(images: Tensor) -> list[Tensor]:
        return pooled.of_images(scale(images, device))

    return mo.dataset_moments(features, images.split(batch_size), cov=True, progress=sys.stderr.isatty())


def new_trainer(
    data: ImageData,
    extractor: mo.MomentExtractor,
    target: mo.Moments,
    settings: Settings,
    covariance_target: mo.Moments | None = None,
) -> Trainer:
    torch.manual_seed(settings.seed)
    device = data.device
    generator = settings.make_generator(data.channels).to(device)
    return Trainer(generator, Matching(extractor, target, settings, covariance_target).to(device), settings)


def resumed_trainer(state: dict[str, Any], data: ImageData, settings: Settings) -> Trainer:
    """The trainer of a checkpoint, which holds extractor and targets as well."""
    extractor = extractors.untrained_extractor(settings.choice, data.channels, data.size).to(data.device)
    with torch.no_grad():
        shapes = extractor(scale(data.train[:2], data.device))
    saved = state["trainer"]["matching"]
    target = replace(shapes, mean=saved["moment_loss.target_mean"], var=saved["moment_loss.target_var"])
    # The target of a few images has the right shapes; its values are in the state.
    covariances = target_covariances(data.train[:2], extractor, settings, device=data.device)
    trainer = new_trainer(data, extractor, target, settings, covariances)
    trainer.load_state_dict(state["trainer"])
    return trainer


def train(
    run: Path | str,
    given: dict[str, Any],
    *,
    data: Any = None,
    generator: Factory | None = None,
    resume: bool = False,
    extractor_files: Sequence[Path] | None = None,
    device: torch.device | str = "cpu",
    say: Say = print,
) -> Quality | None:
    """Train in the folder ``run``. Arguments and results are those of ``run_method``.

    Args:
        extractor_files: the weights of the networks whose features are matched.
    """
    folder = Path(run)

    def new(data: ImageData, settings: Settings) -> Trainer:
        extractor = extractors.make_extractor(
            data,
            settings.choice,
            extractor_files,
            folder.parent,
            iterations=settings.extractor_iterations,
            say=say,
        )
        target = target_moments(data, extractor)
        target.save(folder / TARGET)
        covariances = target_covariances(data.train, extractor, settings, device=data.device)
        if covariances is not None:
            covariances.save(folder / TARGET_COVARIANCES)
        return new_trainer(data, extractor, target, settings, covariances)

    return run_method(
        folder,
        Settings,
        given,
        resume=resume,
        device=device,
        say=say,
        new=new,
        resumed=resumed_trainer,
        data=data,
        generator=generator,
    )
