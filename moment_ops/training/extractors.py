"""Extractors of features to match: of a classifier that is trained on the data, or of pretrained networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import moment_ops as mo
from moment_ops.training import checkpoints, classifiers
from moment_ops.training.data import ImageData
from moment_ops.training.errors import TrainingError
from moment_ops.training.networks import Classifier, freeze
from moment_ops.training.pretrained import VGG19, EfficientNetLite, ResNet18, load_weights

CLASSIFIER = "classifier"
LITE = {f"efficientnet-lite{number}": number for number in range(3)}
CHOICES = (CLASSIFIER, "vgg19", "resnet18", "vgg19+resnet18", *LITE)
CLASSIFIER_ITERATIONS, CLASSIFIER_SECONDS = 640, 60.0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# dos Santos et al. 2019 match the first 16 of the 17 ReLUs of ResNet18.
MATCHED_RELUS = 16

_WITH_WEIGHTS: dict[str, Callable[..., nn.Module]] = {"vgg19": VGG19, "resnet18": ResNet18}
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
        return pretrained_extractor(features, files or [], data.size).to(data.device)
    if files and len(files) > 1:
        raise TrainingError(f"--extractor: got {len(files)} files, expected one for the classifier")
    path = files[0] if files else folder / f"extractor-{data.name}.pt"
    return mo.MomentExtractor(load_or_train_classifier(data, path, iterations=iterations, say=say))


def untrained_extractor(features: str, channels: int, size: int) -> mo.MomentExtractor:
    """The extractor for one of ``CHOICES`` with initial weights, for a state to be loaded."""
    if features == CLASSIFIER:
        return mo.MomentExtractor(Classifier(channels))
    return pretrained_extractor(features, None, size)


def pretrained_extractor(features: str, weights: Sequence[Path] | None, size: int = 32) -> mo.MomentExtractor:
    """The extractor for one of ``CHOICES`` other than the classifier.

    Args:
        features: names of networks, joined by "+".
        weights: files with their weights, in this order. None leaves the initial weights, for a state to be loaded.
        size: height and width of the images.

    Raises:
        TrainingError: too few or too many files, or files that do not hold these weights.
    """
    if features in LITE:
        if weights:
            raise TrainingError(f"--extractor: got {len(weights)} files, expected none: {features} has its weights")
        return mo.MomentExtractor(EfficientNetLite(LITE[features]), nn.ReLU6)
    names = features.split("+")
    if weights is not None and len(weights) != len(names):
        raise TrainingError(
            f"--extractor: got {len(weights)} files, expected {len(names)} with the weights of {features}"
        )
    networks = {name: _WITH_WEIGHTS[name](image_size=size) for name in names}
    for network, path in zip(networks.values(), weights or (), strict=False):
        load_weights(network, path)
    normalized = {name: _Normalized(network) for name, network in networks.items()}
    taps = mo.MomentExtractor(normalized).names
    assert taps is not None
    matched = [tap for name in names for tap in [t for t in taps if t.startswith(f"{name}/")][:MATCHED_RELUS]]
    return mo.MomentExtractor(normalized, matched)


def load_or_train_classifier(
    data: ImageData, path: Path, *, iterations: int = CLASSIFIER_ITERATIONS, say: Say = print
) -> Classifier:
    """The frozen classifier whose features are matched. If ``path`` does not exist, it is trained and saved there.

    It learns the labels of ``data``. Without labels it learns by which angle an image was rotated.
    """
    is_labelled = data.train_labels is not None and data.held_out_labels is not None
    train = classifiers.Task(data.train, data.train_labels if is_labelled else None, data.device)
    held_out = classifiers.Task(data.held_out, data.held_out_labels if is_labelled else None, data.device)
    classes = max(train.classes, held_out.classes)

    if path.exists():
        state = checkpoints.load(path, "feature extractor")
        if state["data"] == data.fingerprint:
            return restore_classifier(state["network"], data.device)
        say(f"the classifier in {path} was trained on other data, and is replaced")
    torch.manual_seed(0)
    classifier = Classifier(data.channels, classes).to(data.device)
    classifiers.train_classifier(
        classifier,
        train,
        iterations=iterations,
        strength=0.5,
        seconds=CLASSIFIER_SECONDS,
        description="extractor",
    )
    share = classifiers.accuracy(classifier, held_out)
    state = {"network": classifier.state_dict(), "data": data.fingerprint}
    checkpoints.save(path, "feature extractor", state)
    say(f"classifier: {share:.1%} of the held-out images are classified correctly; saved in {path}")
    return freeze(classifier)


def restore_classifier(state: dict[str, Tensor], device: torch.device) -> Classifier:
    """The frozen classifier with this state dict."""
    channels, classes = state["blocks.0.0.weight"].shape[1], state["head.weight"].shape[0]
    classifier = Classifier(channels, classes)
    classifier.load_state_dict(state)
    return freeze(classifier).to(device)
