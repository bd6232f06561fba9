"""Whose features GFMN matches: a classifier trained on the data itself, or networks with weights of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import moment_ops as mo
from moment_ops.training import checkpoints, classifiers
from moment_ops.training.data import ImageData
from moment_ops.training.errors import TrainingError
from moment_ops.training.extractors import VGG19, EfficientNetLite0, ResNet18, load_weights
from moment_ops.training.networks import Classifier, freeze

CLASSIFIER = "classifier"
CHOICES = (CLASSIFIER, "vgg19", "resnet18", "vgg19+resnet18", "efficientnet-lite0")
CLASSIFIER_ITERATIONS, CLASSIFIER_SECONDS = 640, 60.0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of ResNet18's 17 ReLUs the paper matches the first 16.
MATCHED_RELUS = 16

_WITH_WEIGHTS: dict[str, Callable[[], nn.Module]] = {"vgg19": VGG19, "resnet18": ResNet18}
Say = Callable[[str], None]


class _Normalized(nn.Module):
    """A network of normalized colour images, for grey or colour images in [-1, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * self.scale + self.shift)


def pretrained_extractor(features: str, weights: Sequence[Path] | None) -> mo.MomentExtractor:
    """The taps of one of ``CHOICES`` but the classifier.

    Args:
        features: networks joined by "+".
        weights: files of their weights, in that order; None leaves them as they are made, for a state to be loaded.

    Raises ``TrainingError`` where files are missing or too many, or hold something else.
    """
    if features == "efficientnet-lite0":
        if weights:
            raise TrainingError("efficientnet-lite0 brings its weights; --extractor is for the other networks")
        return mo.MomentExtractor(EfficientNetLite0(), nn.ReLU6)
    names = features.split("+")
    if weights is not None and len(weights) != len(names):
        raise TrainingError(f"{features} needs {len(names)} files of weights after --extractor, got {len(weights)}")
    networks = {name: _WITH_WEIGHTS[name]() for name in names}
    for network, path in zip(networks.values(), weights or (), strict=False):
        load_weights(network, path)
    normalized = {name: _Normalized(network) for name, network in networks.items()}
    taps = mo.MomentExtractor(normalized).names
    assert taps is not None
    matched = [tap for name in names for tap in [t for t in taps if t.startswith(f"{name}/")][:MATCHED_RELUS]]
    return mo.MomentExtractor(normalized, matched)


def fingerprint(data: ImageData) -> str:
    """Tells data sets apart, so that a classifier is not reused for another one of the same name."""
    digest = hashlib.sha256(data.train.cpu().numpy().tobytes())
    if data.train_labels is not None:
        digest.update(data.train_labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_or_train_classifier(
    data: ImageData, path: Path, *, iterations: int = CLASSIFIER_ITERATIONS, say: Say = print
) -> Classifier:
    """The frozen classifier whose features are matched; trained at first use and kept at ``path``.

    It learns the labels of ``data``, or, where there are none, to tell how an image was turned.
    """
    images, labels = data.train, data.train_labels
    held_out, held_out_labels = data.held_out, data.held_out_labels
    if labels is None or held_out_labels is None:
        images, labels = classifiers.rotation_task(images)
        held_out, held_out_labels = classifiers.rotation_task(held_out)
    classes = int(torch.cat([labels, held_out_labels]).max()) + 1
    data_fingerprint = fingerprint(data)

    if path.exists():
        state = checkpoints.load(path, "feature extractor")
        if state["data"] == data_fingerprint:
            return restore_classifier(state["network"], data.train.device)
        say(f"{path} was trained on other data")
    torch.manual_seed(0)
    classifier = Classifier(data.channels, classes).to(data.train.device)
    classifiers.train_classifier(
        classifier,
        images,
        labels,
        iterations=iterations,
        strength=0.5,
        seconds=CLASSIFIER_SECONDS,
        description="extractor",
    )
    share = classifiers.accuracy(classifier, held_out, held_out_labels)
    state = {"network": classifier.state_dict(), "data": data_fingerprint}
    checkpoints.save(path, "feature extractor", state)
    say(f"extractor: {share:.1%} of the held-out images right; kept in {path}")
    return freeze(classifier)


def restore_classifier(state: dict[str, Tensor], device: torch.device) -> Classifier:
    """The frozen classifier that a state dict came from."""
    channels, classes = state["blocks.0.0.weight"].shape[1], state["head.weight"].shape[0]
    classifier = Classifier(channels, classes)
    classifier.load_state_dict(state)
    return freeze(classifier).to(device)
