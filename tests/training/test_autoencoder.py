"""The autoencoder whose encoder gives features to match."""

import math
from pathlib import Path

import pytest
import torch
from comparison import assert_same

import moment_ops as mo
from moment_ops.training import autoencoder, checkpoints, data, extractors, gfmn, runs
from moment_ops.training.command_line import main
from moment_ops.training.errors import TrainingError
from moment_ops.training.extractors import Choice
from moment_ops.training.pretrained import AUTOENCODER_KIND, Encoder

TINY = {"steps": 4, "seconds": math.inf, "latent_size": 8}


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    path = tmp_path_factory.mktemp("autoencoder") / "autoencoder.pt"
    autoencoder.train(path, {"data": str(pictures), **TINY}, say=silent)
    return path


@pytest.mark.parametrize("size", data.SIZES)
def test_it_returns_images_of_the_same_shape_through_codes(size):
    network = autoencoder.Autoencoder(3, 5, size).eval()
    with torch.no_grad():
        images = torch.rand(2, 3, size, size) * 2 - 1
        assert network.encoder(images).shape == (2, 5)
        assert network(images).shape == images.shape


def test_the_features_are_those_of_the_paper():
    """All ReLUs and the code, 60K of 1,024 features: dos Santos et al. 2019, table 1."""
    extractor = extractors.pretrained_extractor(Choice("autoencoder", latent_size=128), None)
    moments = extractor(torch.zeros(2, 3, 32, 32))
    assert extractor.names[-1] == "autoencoder/net.code:0"
    assert moments.shapes == ((64, 16, 16),) * 3 + ((128, 8, 8), (256, 4, 4), (128, 1, 1))
    assert moments.mean.numel() == 61_568


def test_the_code_that_is_matched_is_that_of_the_saved_encoder(file):
    extractor = extractors.pretrained_extractor(Choice("autoencoder", latent_size=8), [file], 32, 1)
    encoder = Encoder(1, 8, 32)
    encoder.load_state_dict(checkpoints.load(file, AUTOENCODER_KIND)["encoder"])
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    expected = mo.moments(encoder.eval()(images))
    torch.testing.assert_close(extractor(images).layers()[-1][0].flatten(), expected.mean, rtol=1e-4, atol=1e-5)


def test_other_networks_have_the_same_features_beside_it(file):
    names = extractors.pretrained_extractor(Choice("autoencoder+resnet18", latent_size=8), None).names
    assert [name.partition("/")[0] for name in names] == ["autoencoder"] * 6 + ["resnet18"] * 16


class Halves(torch.utils.data.Dataset):
    """Images of one grey above, and of another below."""

    def __init__(self) -> None:
        levels = torch.randint(0, 256, (40, 1, 2, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self.images = levels.repeat_interleave(16, 2).repeat(1, 1, 1, 32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_training_reduces_the_error_of_held_out_images(tmp_path):
    given, said = {"seconds": math.inf, "latent_size": 8, "batch_size": 8}, []
    few, many = (
        autoencoder.train(tmp_path / f"{steps}.pt", {**given, "steps": steps}, data=Halves(), say=said.append)
        for steps in (1, 60)
    )
    assert many < 0.4 * few
    assert f"error of held-out images is {many:.4f}" in said[-2]


def test_the_same_seed_gives_the_same_weights(file, tmp_path, pictures):
    autoencoder.train(tmp_path / "again.pt", {"data": str(pictures), **TINY}, say=silent)
    first, again = (checkpoints.load(path, AUTOENCODER_KIND) for path in (file, tmp_path / "again.pt"))
    assert_same(first, again)


def test_a_run_that_matches_it_continues_without_its_file(file, tmp_path, pictures):
    own = tmp_path / "own.pt"
    own.write_bytes(file.read_bytes())
    given = {"data": str(pictures), "features": "autoencoder", "batch_size": 2, "judge": "digits", **TINY}
    gfmn.train(tmp_path / "run", {**given, "steps": 2}, extractor_files=[own], say=silent)
    own.unlink()
    gfmn.train(tmp_path / "run", {"steps": 3}, resume=True, say=silent)
    assert runs.load_checkpoint(tmp_path / "run")["trainer"]["step"] == 3


@pytest.mark.parametrize(
    ("choice", "size", "channels", "message"),
    [
        (Choice("autoencoder"), 32, 1, "latent_size 8, expected latent_size 64"),
        (Choice("autoencoder", latent_size=8), 64, 1, "size 32, expected size 64"),
        (Choice("autoencoder", latent_size=8), 32, 3, "channels 1, expected channels 3"),
    ],
)
def test_an_autoencoder_for_other_images_or_codes_is_an_error(file, choice, size, channels, message):
    with pytest.raises(TrainingError, match=f"--extractor: .* is of an autoencoder with {message}"):
        extractors.pretrained_extractor(choice, [file], size, channels)


def test_files_of_other_things_are_errors(tmp_path):
    torch.save(Encoder(1, 8, 32).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(TrainingError, match=r"weights\.pt is damaged, or not a feature autoencoder"):
        extractors.pretrained_extractor(Choice("autoencoder", latent_size=8), [tmp_path / "weights.pt"], 32, 1)


def test_the_command_writes_a_new_file_only(tmp_path, pictures, capsys):
    path = tmp_path / "new" / "autoencoder.pt"
    command = ["train", "autoencoder", "--device=cpu", f"--data={pictures}", "--steps=1", f"--output={path}"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{path}: --features autoencoder --extractor {path}")
    content = path.read_bytes()
    assert main(command) == 1
    assert capsys.readouterr().err == f"moment-ops: --output: {path} exists, expected the name of a new file\n"
    assert path.read_bytes() == content


def test_several_processes_are_an_error(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "autoencoder"]) == 1
    assert capsys.readouterr().err == "moment-ops: train autoencoder: got 2 processes of torchrun, expected one\n"
