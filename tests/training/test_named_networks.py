"""Networks by name, as features and as judges: of timm and torchvision, of users, and with files of weights."""

import math
import re
import sys

import pytest
import torch
from torch import nn

import moment_ops as mo
from moment_ops.training import extractors, gfmn, judges, named_networks, runs
from moment_ops.training.command_line import main
from moment_ops.training.errors import TrainingError
from moment_ops.training.extractors import Choice

TINY = {"steps": 2, "seconds": math.inf, "batch_size": 2, "latent_size": 4, "evaluate_every": 100, "judge": "digits"}


@pytest.fixture(scope="module")
def torchvision():
    """Beside this torch it is imported only if these operators are there."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("torchvision", exc_type=ImportError)


@pytest.fixture
def timm(torchvision):
    return pytest.importorskip("timm")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user in the working directory."""
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def features():\n    return nn.Sequential(nn.Conv2d(1, 3, 3, 4), nn.GELU(), nn.Flatten())\n"
        "layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.GELU())\n"
        "number = lambda: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "my_networks"
    sys.modules.pop("my_networks", None)


def images(channels=3):
    return torch.rand(3, channels, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normalized(x, mean, std):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return ((x.expand(-1, 3, -1, -1) + 1) / 2 - mean) / std


@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_timm_are_those_of_its_network(timm, tmp_path, channels):
    torch.manual_seed(7)
    net = timm.create_model("test_resnet").eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    extractor = extractors.pretrained_extractor(Choice("timm:test_resnet"), [tmp_path / "weights.pth"])
    x = images(channels)
    expected = mo.MomentExtractor(net)(normalized(x, net.pretrained_cfg["mean"], net.pretrained_cfg["std"]))
    torch.testing.assert_close(extractor(x).mean, expected.mean, rtol=1e-4, atol=1e-5)


def test_features_of_torchvision_are_those_of_its_network(torchvision, tmp_path):
    torch.manual_seed(7)
    net = torchvision.models.squeezenet1_1(weights=None).eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "weights.pth")
    extractor = extractors.pretrained_extractor(Choice("torchvision:squeezenet1_1"), [tmp_path / "weights.pth"])
    expected = mo.MomentExtractor(net)(normalized(images(), named_networks.IMAGENET_MEAN, named_networks.IMAGENET_STD))
    torch.testing.assert_close(extractor(images()).mean, expected.mean, rtol=1e-4, atol=1e-5)


def test_a_network_with_one_size_gets_images_of_this_size(timm):
    extractor = extractors.pretrained_extractor(Choice("timm:test_vit"), [named_networks.RANDOM])
    assert extractor(images()).mean.isfinite().all()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("GELU", "3"),
        ("ReLU,GELU", "13"),
        ("Conv2d", "02"),
        ("net.[02]", "02"),
        ("net.1,Conv*", "012"),
    ],
)
def test_layers_are_chosen_by_type_and_by_pattern(own_module, layers, expected):
    choice = Choice(f"{own_module}:layers", layers)
    names = extractors.pretrained_extractor(choice, []).names
    assert names == tuple(f"{own_module}:layers/net.{index}:0" for index in expected)


def test_a_run_with_features_of_resized_images_is_trained(own_module, pictures, tmp_path):
    given = {"data": str(pictures), "features": f"{own_module}:features", "feature_size": 16, **TINY}
    gfmn.train(tmp_path / "run", given, say=lambda line: None)
    names = extractors.pretrained_extractor(Choice(given["features"], size=16), []).names
    assert names is not None


def test_images_of_torchvision_are_large_enough_for_its_network(torchvision):
    named = named_networks.make("torchvision:vit_b_16", 32)
    assert named.size == 224
    assert named_networks.make("torchvision:squeezenet1_1", 32).size is None


def test_a_network_of_timm_is_made_for_the_size_of_the_features(timm):
    assert named_networks.make("timm:test_vit", 32, 96).size == 96


@pytest.mark.parametrize(
    ("judge", "features"),
    [
        ("timm:resnet18.a1_in1k", "timm:resnet18"),
        ("timm:tf_efficientnet_lite0", "efficientnet-lite0"),
        ("timm:resnet18", "vgg19+torchvision:resnet18"),
        ("inception", "torchvision:inception_v3"),
    ],
)
def test_a_network_under_another_name_does_not_judge_itself(judge, features):
    with pytest.raises(TrainingError, match=r"--judge: got .*, whose features are matched"):
        judges.choose(judge, "photographs", features)


def test_weights_of_inception_are_not_unpickled(torchvision, tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"weight": print}, tmp_path / "inception.pth")
    with pytest.raises(TrainingError, match="is not a file of weights"):
        judges.make("inception", str(tmp_path / "inception.pth"))


def test_layers_that_are_not_there_are_an_error(own_module):
    with pytest.raises(TrainingError, match=r"--feature-layers: .*Sigmoid"):
        extractors.pretrained_extractor(Choice(f"{own_module}:layers", "Sigmoid"), [])


def test_images_are_resized_on_request(own_module):
    choice = Choice(f"{own_module}:features", size=16)
    assert extractors.pretrained_extractor(choice, [])(images(1)).shapes == ((3, 4, 4),)
    assert extractors.pretrained_extractor(choice._replace(size=0), [])(images(1)).shapes == ((3, 8, 8),)


def test_a_run_with_a_network_of_the_user_is_trained_continued_and_judged_by_another(own_module, pictures, tmp_path):
    given = {"data": str(pictures), "features": f"{own_module}:features", **TINY}
    gfmn.train(tmp_path / "run", given, say=lambda line: None)
    gfmn.train(tmp_path / "run", {"steps": 3}, resume=True, say=lambda line: None)
    assert runs.load_checkpoint(tmp_path / "run")["trainer"]["step"] == 3
    with pytest.raises(TrainingError, match=f"--judge: got {own_module}:features, whose features are matched"):
        judges.choose(given["features"], "photographs", given["features"])
    judge = judges.make(given["features"])
    assert judge(images(1)).shape == (3, 192)


def test_a_judge_of_timm_gives_its_pooled_features(timm, tmp_path):
    net = timm.create_model("test_resnet").eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    judge = judges.make("timm:test_resnet", str(tmp_path / "weights.pth"))
    x = normalized(images(), net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
    torch.testing.assert_close(judge(images()), net.forward_head(net.forward_features(x), pre_logits=True))
    assert judge.description.startswith("timm:test_resnet")


def test_inception_of_torch_fidelity_judges(torchvision, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    # Its weights are not to be had here: those that it starts with take their place.
    inception, file, states = module.FeatureExtractorInceptionV3, tmp_path / "inception.pth", []
    torch.save({}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict", lambda self, state: states.append(self.state_dict()))
        judge = judges.make("inception", str(file))
    torch.save(states[0], file)
    again = judges.make("inception", str(file))
    assert torch.equal(judge(images(1)), again(images(1)))
    assert judge(images(1)).shape == (3, 2048)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: named_networks.make("timm:nothing_like_it"), "timm:nothing_like_it: "),
        (lambda: named_networks.make("torchvision:nothing"), "torchvision:nothing: "),
        (lambda: named_networks.make("no_such_module:net"), "no_such_module:net: no module named 'no_such_module'"),
        (lambda: named_networks.make("math:net"), "math:net: the module math has no 'net'"),
        (lambda: named_networks.make("my_networks:number"), "my_networks:number: got int, expected a torch.nn.Module"),
        (lambda: judges.make("timm:test_resnet"), "--judge-weights: got none, expected a file with the weights of"),
        (lambda: judges.make("digits", "a.pt"), "--judge-weights: got a.pt, expected none, as digits has its weights"),
        (lambda: judges.make("inception", "a.pt"), "could not read a.pt: No such file"),
    ],
)
def test_what_does_not_exist_is_named(timm, own_module, call, message):
    with pytest.raises(TrainingError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": "vgg"}, "features: got 'vgg', expected autoencoder, vgg19, resnet18, "),
        ({"features": "vgg19+classifier"}, "features: got 'vgg19+classifier', expected each network once"),
        ({"features": "vgg19+vgg19"}, "expected each network once"),
        ({"feature_layers": "ReLU"}, "feature_layers: got ReLU, expected none with the features of the classifier"),
        (
            {"features": "autoencoder", "feature_size": 64},
            "feature_size: got 64, expected none with the features of the",
        ),
        ({"features": "vgg19", "feature_size": -1}, "feature_size: got -1, expected a positive number, or 0"),
        ({"judge": "vgg"}, "judge: got 'vgg', expected auto, digits, inception, "),
        ({"micro_batches": 0}, "micro_batches: got 0, expected 1 to 32, the images of a batch"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gfmn.Settings(**given)


def test_a_package_that_is_missing_is_named(monkeypatch, capsys, pictures, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    arguments = [f"--data={pictures}", f"--run-dir={tmp_path / 'run'}", "--judge=digits", "--device=cpu"]
    assert main(["train", "gfmn", "--features=timm:resnet18", "--extractor", "random", *arguments]) == 1
    assert capsys.readouterr().err == "moment-ops: timm is not installed; run `pip install timm`\n"


def test_safetensors_are_read(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    net = nn.Linear(2, 3)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    other = named_networks.load_weights(nn.Linear(2, 3), tmp_path / "weights.safetensors")
    assert torch.equal(net.weight, other.weight)


def test_the_published_tools_give_the_same_frechet_distance(torchvision):
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    torchmetrics = pytest.importorskip("torchmetrics.image.fid")
    torch_fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    for columns, rows in ((64, 500), (256, 200)):
        spread = (torch.arange(columns) + 1.0) ** -0.7
        x, y = torch.randn(rows, columns) * spread + 0.1, torch.randn(rows + 100, columns) * spread * 1.1
        (mean, cov), (other_mean, other_cov) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (x, y))
        theirs = [
            pytorch_fid.calculate_frechet_distance(*(v.numpy() for v in (mean, cov, other_mean, other_cov))),
            torchmetrics._compute_fid(mean, cov, other_mean, other_cov),
            *torch_fidelity.fid_statistics_to_metric(
                *({"mu": m.numpy(), "sigma": c.numpy()} for m, c in ((mean, cov), (other_mean, other_cov))), False
            ).values(),
        ]
        target = mo.Moments(other_mean, cov=(other_cov,))
        ours = [mo.frechet_distance(mean, cov, other_mean, other_cov)]
        ours += [mo.frechet_loss(x, target, method=method) for method in ("eigh", "qdwh", "polynomial")]
        for value in ours:
            for other in theirs:
                assert float(value) == pytest.approx(float(other), rel=1e-5)
