"""The networks in whose features samples are judged, which are never those that are matched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moment_ops.training.errors import TrainingError
from moment_ops.training.evaluator_weights import WEIGHTS
from moment_ops.training.extractors import LITE
from moment_ops.training.networks import EvaluationClassifier, freeze
from moment_ops.training.pretrained import EfficientNetLite

AUTO, DIGITS = "auto", "digits"
CHOICES = (AUTO, DIGITS, *LITE)
# Smaller than in their training (224 to 260), for a fraction of the time.
LITE_PIXELS = 128


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
    if judge in matched:
        raise TrainingError(f"--judge: got {judge}, whose features are matched; expected another network")
    return judge


def make(name: str) -> nn.Module:
    """The frozen network: images ``(N, C, S, S)`` in [-1, 1] -> features ``(N, D)``.

    Raises:
        TrainingError: a package with its weights is missing.
    """
    if name == DIGITS:
        return Digits()
    try:
        return freeze(LiteFeatures(LITE[name]))
    except TrainingError as error:
        raise TrainingError(f"the judge {name} of this data: {error}, or choose another --judge") from error


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
