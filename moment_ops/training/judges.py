"""The networks in whose features samples are judged, which are never those that are matched."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moment_ops.training import named_networks
from moment_ops.training.errors import TrainingError, import_package
from moment_ops.training.evaluator_weights import WEIGHTS
from moment_ops.training.named_networks import LITE, Named, Prepared, architecture, is_path
from moment_ops.training.networks import EvaluationClassifier, freeze
from moment_ops.training.pretrained import EfficientNetLite, load_weights, state_of_file

AUTO, DIGITS, INCEPTION = "auto", "digits", "inception"
CHOICES = (AUTO, DIGITS, INCEPTION, *LITE)
EXPECTED = f"{', '.join(CHOICES)}, timm:NAME or package.module:factory"
# Smaller than in their training (224 to 260), for a fraction of the time.
LITE_PIXELS = 128


def check_name(judge: str) -> None:
    """Raise ValueError for what cannot name a judge."""
    if judge not in CHOICES and (not is_path(judge) or judge.startswith("torchvision:")):
        raise ValueError(f"judge: got {judge!r}, expected {EXPECTED}")


def choose(judge: str, data: str, features: str = "") -> str:
    """The name of the judge: for ``"auto"`` one that fits the data, and that is not matched.

    Args:
        data: name of the data set.
        features: the names of the networks that are matched, joined by "+".

    Raises:
        TrainingError: the judge is matched.
    """
    matched = features.split("+")
    if judge == AUTO:
        return DIGITS if data == "mnist" else next(name for name in reversed(LITE) if name not in matched)
    if architecture(judge) in map(architecture, matched):
        raise TrainingError(f"--judge: got {judge}, whose features are matched; expected another network")
    return judge


def make(name: str, weights: str = "") -> nn.Module:
    """The frozen network: images ``(N, C, S, S)`` in [-1, 1] -> features ``(N, D)``.

    Args:
        weights: a file, for "inception" and "timm:NAME".

    Raises:
        TrainingError: a package or file with its weights is missing, or a file too many.
    """
    takes_file = name == INCEPTION or name.startswith("timm:")
    if bool(weights) != takes_file:
        expected = f"a file with the weights of {name}" if takes_file else f"none, as {name} has its weights"
        raise TrainingError(f"--judge-weights: got {weights or 'none'}, expected {expected}")
    if name == DIGITS:
        return Digits()
    try:
        if name in LITE:
            return freeze(LiteFeatures(LITE[name]))
        if name == INCEPTION:
            return freeze(Inception(weights))
        named = named_networks.make(name, **({"num_classes": 0} if takes_file else {}))
        if takes_file:
            load_weights(named.net, weights, without=("head.", "fc.", "classifier."))
        return freeze(Features(name, named))
    except TrainingError as error:
        raise TrainingError(f"the judge {name}: {error}, or choose another --judge") from error


class Features(nn.Module):
    """The output of a network, which are features ``(N, D)``."""

    def __init__(self, name: str, named: Named) -> None:
        super().__init__()
        self.prepared = Prepared(named)
        self.description = name if self.prepared.size is None else f"{name}, {self.prepared.size} pixels"

    def forward(self, images: Tensor) -> Tensor:
        features = self.prepared(images)
        if not isinstance(features, Tensor) or features.dim() != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise TrainingError(f"--judge: got features {got}, expected (N, D)")
        return features


class Inception(nn.Module):
    """The 2,048 features of torch-fidelity's InceptionV3, which the published Frechet distances are of.

    Args:
        weights: torch-fidelity's file ``weights-inception-2015-12-05-6726825d.pth``.
    """

    description = "InceptionV3 of torch-fidelity, 2,048 features"

    def __init__(self, weights: str) -> None:
        super().__init__()
        module = import_package("torch_fidelity.feature_extractor_inceptionv3")
        # torch-fidelity would unpickle anything: it gets a copy of the tensors of the file.
        copy = io.BytesIO()
        torch.save(state_of_file(weights), copy)
        copy.seek(0)
        try:
            self.net = module.FeatureExtractorInceptionV3("inception", ["2048"], copy)
        except (RuntimeError, KeyError) as error:
            raise TrainingError(f"{weights} holds no weights of it: {str(error).splitlines()[0]}") from error

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        (features,) = self.net(pixels.expand(-1, 3, -1, -1))
        return features


class Digits(nn.Module):
    """The 64 features of the digit classifier that is part of the package. ``make_evaluator`` trains it."""

    description = "digit classifier, 64 features"

    def __init__(self) -> None:
        super().__init__()
        self.classifier = EvaluationClassifier()
        with np.load(WEIGHTS) as arrays:
            state = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
        self.classifier.load_state_dict({**self.classifier.state_dict(), **state})
        freeze(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


class LiteFeatures(nn.Module):
    """The 1,280 features of EfficientNet-Lite before its linear layer, of images that are resized to 128 pixels."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.net = EfficientNetLite(number)
        self.description = f"EfficientNet-Lite{number}, 1,280 features, {LITE_PIXELS} pixels"

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] != LITE_PIXELS:
            size = (LITE_PIXELS, LITE_PIXELS)
            images = functional.interpolate(images, size, mode="bilinear", antialias=images.shape[2] > LITE_PIXELS)
        return self.net.pooled(images)
