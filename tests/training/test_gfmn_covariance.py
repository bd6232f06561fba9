"""GFMN with full covariances of some layers beside means and variances."""

import signal

import pytest
import torch
from comparison import assert_same
from test_gfmn import send_signal_after, trained_state
from torch.nn import functional

import moment_ops as mo
from moment_ops.training import data, extractors, gfmn
from moment_ops.training.errors import TrainingError
from moment_ops.training.interruption import Interrupted


@pytest.fixture
def extractor(pictures, extractor_path):
    classifier = extractors.load_or_train_classifier(data.load(str(pictures)), extractor_path, iterations=2)
    return mo.MomentExtractor(classifier)


def pooled_features(extractor, images, layers, size):
    maps = dict(zip(extractor.names, extractor.features(images), strict=True))
    chosen = [maps[name] for name in layers]
    return [(functional.adaptive_avg_pool2d(x, size) if size else x).flatten(1) for x in chosen]


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("named", [False, True])
def test_the_loss_is_that_of_the_moments_and_of_the_covariances(pictures, extractor, named, size):
    images = data.load(str(pictures))
    names = list(extractor.names[-2:])
    choice = ",".join(names) if named else "2"
    settings = gfmn.Settings(average="none", covariance=choice, covariance_pool=size, covariance_weight=0.3)
    target = gfmn.target_moments(images, extractor)
    covariances = gfmn.target_covariances(images.train, extractor, settings)
    matching = gfmn.Matching(extractor, target, settings, covariances)
    generated = data.scale(images.held_out)[:6].requires_grad_()
    expected = mo.moment_loss(extractor(generated), target, reduction="sum")
    real = pooled_features(extractor, data.scale(images.train), names, size)
    for x, y in zip(pooled_features(extractor, generated, names, size), real, strict=True):
        expected = expected + 0.3 * (torch.cov(x.mT) - torch.cov(y.mT)).square().sum()
    loss = matching(generated)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, generated)[0] for value in (loss, expected))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("average", ["adam", "moving"])
def test_a_stopped_and_continued_run_equals_an_uninterrupted_one(train, average):
    given = {"average": average, "covariance": "2"}
    whole = train("whole", **given)
    assert (whole / "target-covariances.npz").exists()
    with pytest.raises(Interrupted):
        train("stopped", **given, say=send_signal_after(10, signal.SIGINT))
    assert_same(trained_state(train("stopped", resume=True)), trained_state(whole))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("7", "--covariance: got 7, expected 1 to 6 layers"),
        ("0", "--covariance: got 0, expected 1 to 6 layers"),
        ("nothing", "--covariance: got 'nothing', expected names of blocks"),
    ],
)
def test_layers_that_there_are_not_are_errors(train, choice, message):
    with pytest.raises(TrainingError, match=message):
        train("run", covariance=choice)
