"""Extractors of features to match: of a classifier that is trained on the data, or of pretrained networks."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import moment_ops as mo
from moment_ops.training import checkpoints, classifiers, named_networks
from moment_ops.training.data import ImageData
from moment_ops.training.errors import TrainingError
from moment_ops.training.named_networks import AUTOENCODER, RANDOM, Prepared
from moment_ops.training.networks import Classifier, freeze

CLASSIFIER = "classifier"
CLASSIFIER_ITERATIONS, CLASSIFIER_SECONDS = 640, 60.0
# dos Santos et al. 2019 match the first 16 of the 17 ReLUs of ResNet18.
MATCHED_RELUS = 16

Say = Callable[[str], None]


class Choice(NamedTuple):
    """Which features are matched.

    Args:
        networks: "classifier", or names of networks joined by "+".
        layers: names of activations' types, or patterns of taps' names, separated by commas; "" for all activations.
        size: height and width that images are resized to; 0 for those that a network needs, or else their own.
        latent_size: length of the codes of the autoencoder.
    """

    networks: str = CLASSIFIER
    layers: str = ""
    size: int = 0
    latent_size: int = 64

    def check(self) -> None:
        """Raise ValueError for what cannot be chosen."""
        if self.networks == CLASSIFIER:
            for name, value in (("feature_layers", self.layers), ("feature_size", self.size)):
                if value:
                    raise ValueError(f"{name}: got {value}, expected none with the features of the classifier")
            return
        names = self.networks.split("+")
        for name in names:
            if name == CLASSIFIER or names.count(name) > 1:
                raise ValueError(f"features: got {self.networks!r}, expected each network once, and classifier alone")
            named_networks.check_name(name, "features")
        if self.size < 0:
            raise ValueError(f"feature_size: got {self.size}, expected a positive number, or 0")
        if self.size and AUTOENCODER in names:
            raise ValueError(f"feature_size: got {self.size}, expected none with the features of the autoencoder")


def make_extractor(
    data: ImageData,
    choice: Choice,
    files: Sequence[Path] | None,
    folder: Path,
    *,
    iterations: int = CLASSIFIER_ITERATIONS,
    say: Say = print,
) -> mo.MomentExtractor:
    """The extractor of the chosen features, on the device of the data.

    Args:
        files: the weights of its networks; by default those of a classifier in ``folder``, which is trained with
            ``iterations`` if it does not exist.

    Raises:
        TrainingError: too few or too many files, or files that do not hold these weights.
    """
    if choice.networks != CLASSIFIER:
        if RANDOM in map(str, files or ()):
            say("features of a network with random weights are matched")
        return pretrained_extractor(choice, files or [], data.size, data.channels).to(data.device)
    if files and len(files) > 1:
        raise TrainingError(f"--extractor: got {len(files)} files, expected one for the classifier")
    path = files[0] if files else folder / f"extractor-{data.name}.pt"
    return mo.MomentExtractor(load_or_train_classifier(data, path, iterations=iterations, say=say))


def untrained_extractor(choice: Choice, channels: int, size: int) -> mo.MomentExtractor:
    """The extractor of the chosen features with initial weights, for a state to be loaded."""
    if choice.networks == CLASSIFIER:
        return mo.MomentExtractor(Classifier(channels))
    return pretrained_extractor(choice, None, size, channels)


def pretrained_extractor(
    choice: Choice, weights: Sequence[Path] | None, size: int = 32, channels: int = 3
) -> mo.MomentExtractor:
    """The extractor of networks other than the classifier.

    Args:
        weights: files for the networks that come without weights, in their order, or "random" in the place of a file.
            None leaves the initial weights, for a state to be loaded.
        size, channels: height, width and channels of the images.

    Raises:
        TrainingError: too few or too many files, files that do not hold these weights, or layers that are not there.
    """
    torch.manual_seed(0)
    of_data = {"channels": channels, "latent_size": choice.latent_size}
    named = {name: named_networks.make(name, size, choice.size, **of_data) for name in choice.networks.split("+")}
    without = [name for name, network in named.items() if not network.has_weights]
    if weights is not None and len(weights) != len(without):
        expected = f"{len(without)} with the weights of {'+'.join(without)}" if without else "none"
        reason = "" if without else f": {choice.networks} has its weights"
        raise TrainingError(f"--extractor: got {len(weights)} files, expected {expected}{reason}")
    for name, path in zip(without, weights or (), strict=False):
        named_networks.load(named[name].net, path)
    prepared = {name: Prepared(network, choice.size) for name, network in named.items()}
    try:
        if choice.layers:
            return mo.MomentExtractor(prepared, _Selection(choice.layers))
        extractor = mo.MomentExtractor(prepared)
    except ValueError as error:
        raise TrainingError(f"--feature-layers: {error}") from error
    if not set(named) & {AUTOENCODER, *named_networks.OWN} or extractor.names is None:
        return extractor
    matched = []
    for name in named:
        taps = [tap for tap in extractor.names if tap.startswith(f"{name}/")]
        matched += taps[:MATCHED_RELUS] if name in named_networks.OWN else taps
        if name == AUTOENCODER:
            # Its activation is tanh, which is no feature of other networks.
            matched.append(f"{name}/net.code")
    return mo.MomentExtractor(prepared, matched)


class _Selection:
    """Whether a call is of one of some types, or its name has one of some patterns."""

    def __init__(self, layers: str) -> None:
        self.layers = layers

    def __call__(self, name: str, module: nn.Module) -> bool:
        own = name.rpartition("/")[2]
        names = (name, own, own.rpartition(":")[0], type(module).__name__)
        return any(fnmatch.fnmatchcase(text, pattern) for pattern in self.layers.split(",") for text in names)

    def __repr__(self) -> str:
        return self.layers


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
