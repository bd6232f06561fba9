"""Networks with weights of their own, as features of GFMN."""

import math
from pathlib import Path

import pytest
import torch
from comparison import assert_same
from torch import nn

import moment_ops as mo
from moment_ops.training import data, extractors, gfmn, named_networks, runs
from moment_ops.training.errors import TrainingError
from moment_ops.training.extractors import Choice
from moment_ops.training.pretrained import VGG19, ResNet18

TINY = {"steps": 4, "seconds": math.inf, "batch_size": 2, "latent_size": 8, "evaluate_every": 100, "judge": "digits"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of weights that nothing was trained for."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    torch.manual_seed(0)
    for name, network in {"vgg19": VGG19, "resnet18": ResNet18}.items():
        files[name] = folder / f"{name}.pt"
        torch.save(network().state_dict(), files[name])
    return files


@pytest.fixture
def small_vgg19(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of VGG19: two ReLUs over strided convolutions, whose scales differ by orders of magnitude."""

    def make(image_size: int = 32) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 2, 3, 4), nn.ReLU(), nn.Conv2d(2, 2, 3, 4), nn.ReLU())
        net[2].weight.data *= 100
        return net

    monkeypatch.setitem(named_networks.OWN, "vgg19", make)


def test_both_networks_of_the_paper_give_its_features(weights):
    extractor = extractors.pretrained_extractor(Choice("vgg19+resnet18"), list(weights.values()))
    assert len(extractor.names) == 32
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    m = extractor(grey)
    assert m.mean.numel() == 851_968
    # Grey images are colour images, normalized as the networks of ImageNet want it.
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    network = VGG19()
    network.load_state_dict(torch.load(weights["vgg19"]))
    first = mo.MomentExtractor(network)(((grey + 1) / 2 - mean) / std).layers()[0][0]
    torch.testing.assert_close(m.layers()[0][0], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "files", "message"),
    [
        ("vgg19", [], "--extractor: got 0 files, expected 1 with the weights of vgg19"),
        ("vgg19+resnet18", ["a.pt"], r"--extractor: got 1 files, expected 2 with the weights of vgg19\+resnet18"),
        ("efficientnet-lite0", ["a.pt"], "--extractor: got 1 files, expected none: efficientnet-lite0 has its weights"),
    ],
)
def test_missing_and_superfluous_files_are_errors(features, files, message):
    with pytest.raises(TrainingError, match=message):
        extractors.pretrained_extractor(Choice(features), [Path(file) for file in files])


@pytest.mark.usefixtures("small_vgg19")
def test_a_run_with_pretrained_features_continues_without_their_files(tmp_path, pictures):
    file = tmp_path / "weights.pt"
    torch.manual_seed(0)
    torch.save(named_networks.OWN["vgg19"]().state_dict(), file)
    given = {"data": str(pictures), "features": "vgg19", **TINY}
    for name, steps in (("whole", 4), ("half", 2)):
        gfmn.train(tmp_path / name, {**given, "steps": steps}, extractor_files=[file], say=lambda line: None)
    file.unlink()
    # The first half of the schedule is the same for every number of steps.
    gfmn.train(tmp_path / "half", {"steps": 4}, resume=True, say=lambda line: None)
    ours, whole = (runs.load_checkpoint(tmp_path / name)["trainer"] for name in ("half", "whole"))
    assert_same(ours["matching"], whole["matching"])


@pytest.mark.usefixtures("small_vgg19")
def test_layers_count_by_their_features_over_their_standard_deviation(pictures):
    images = data.load(str(pictures))
    extractor = extractors.pretrained_extractor(Choice("vgg19"), None)
    target = gfmn.target_moments(images, extractor)
    settings = gfmn.Settings(features="vgg19", mean_weight=2.0)
    mean_weight, var_weight = gfmn.layer_weights(target, settings)
    for (_, var), mean_scale, var_scale in zip(target.layers(), mean_weight, var_weight, strict=True):
        assert mean_scale == pytest.approx(2 / var.mean().item(), rel=1e-5)
        assert var_scale == pytest.approx(1 / var.mean().item() ** 2, rel=1e-5)
    assert gfmn.layer_weights(target, gfmn.Settings()) == (1.0, 1.0)
