"""Extractors of features to match: of a classifier that is trained on the data, or of pretrained networks."""

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
from moment_ops.training.networks import Classifier, freeze
from moment_ops.training.pretrained import VGG19, EfficientNetLite0, ResNet18, load_weights

CLASSIFIER = "classifier"
CHOICES = (CLASSIFIER, "vgg19", "resnet18", "vgg19+resnet18", "efficientnet-lite0")
CLASSIFIER_ITERATIONS, CLASSIFIER_SECONDS = 640, 60.0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# dos Santos et al. 2019 match the first 16 of the 17 ReLUs of ResNet18.
MATCHED_RELUS = 16

_WITH_WEIGHTS: dict[str, Callable[[], nn.Module]] = {"vgg19": VGG19, "resnet18": ResNet18}
Say = Callable[[str], None]


class _Normalized(nn.Module):
    """A network that takes normalized colour images, for grey or colour images in [-1, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * self.scale + self.shift)


def make_extractor(
    data: ImageData,
    features: str,
    files: Sequence[Path] | None,
    folder: Path,
    *,
    iterations: int = CLASSIFIER_ITERATIONS,
    say: Say = print,
) -> mo.MomentExtractor:
    """The extractor for one of ``CHOICES``, on the device of the data.

    Args:
        files: the weights of its networks; by default those of a classifier in ``folder``, which is trained with
            ``iterations`` if it does not exist.

    Raises:
        TrainingError: too few or too many files, or files that do not hold these weights.
    """
    if features != CLASSIFIER:
        return pretrained_extractor(features, files or []).to(data.train.device)
    if files and len(files) > 1:
        raise TrainingError(f"--extractor: got {len(files)} files, expected one for the classifier")
    path = files[0] if files else folder / f"extractor-{data.name}.pt"
    return mo.MomentExtractor(load_or_train_classifier(data, path, iterations=iterations, say=say))


def untrained_extractor(features: str, channels: int) -> mo.MomentExtractor:
    """The extractor for one of ``CHOICES`` with initial weights, for a state to be loaded."""
    if features == CLASSIFIER:
        return mo.MomentExtractor(Classifier(channels))
    return pretrained_extractor(features, None)


def pretrained_extractor(features: str, weights: Sequence[Path] | None) -> mo.MomentExtractor:
    """The extractor for one of ``CHOICES`` other than the classifier.

    Args:
        features: names of networks, joined by "+".
        weights: files with their weights, in this order. None leaves the initial weights, for a state to be loaded.

    Raises:
        TrainingError: too few or too many files, or files that do not hold these weights.
    """
    if features == "efficientnet-lite0":
        if weights:
            raise TrainingError(
                f"--extractor: got {len(weights)} files, expected none: efficientnet-lite0 has its weights"
            )
        return mo.MomentExtractor(EfficientNetLite0(), nn.ReLU6)
    names = features.split("+")
    if weights is not None and len(weights) != len(names):
        raise TrainingError(
            f"--extractor: got {len(weights)} files, expected {len(names)} with the weights of {features}"
        )
    networks = {name: _WITH_WEIGHTS[name]() for name in names}
    for network, path in zip(networks.values(), weights or (), strict=False):
        load_weights(network, path)
    normalized = {name: _Normalized(network) for name, network in networks.items()}
    taps = mo.MomentExtractor(normalized).names
    assert taps is not None
    matched = [tap for name in names for tap in [t for t in taps if t.startswith(f"{name}/")][:MATCHED_RELUS]]
    return mo.MomentExtractor(normalized, matched)


def fingerprint(data: ImageData) -> str:
    """A hash of the training data, so that a classifier is not reused for other data of the same name."""
    digest = hashlib.sha256(data.train.cpu().numpy().tobytes())
    if data.train_labels is not None:
        digest.update(data.train_labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_or_train_classifier(
    data: ImageData, path: Path, *, iterations: int = CLASSIFIER_ITERATIONS, say: Say = print
) -> Classifier:
    """The frozen classifier whose features are matched. If ``path`` does not exist, it is trained and saved there.

    It learns the labels of ``data``. Without labels it learns by which angle an image was rotated.
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
        say(f"the classifier in {path} was trained on other data, and is replaced")
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
    say(f"classifier: {share:.1%} of the held-out images are classified correctly; saved in {path}")
    return freeze(classifier)


def restore_classifier(state: dict[str, Tensor], device: torch.device) -> Classifier:
    """The frozen classifier with this state dict."""
    channels, classes = state["blocks.0.0.weight"].shape[1], state["head.weight"].shape[0]
    classifier = Classifier(channels, classes)
    classifier.load_state_dict(state)
    return freeze(classifier).to(device)
