"""The command ``moment-ops``: what it writes, and that errors are one line."""

import re

import numpy as np
import pytest

import moment_ops as mo
from moment_ops.training.command_line import main

TINY = [
    "--steps=4",
    "--batch-size=4",
    "--latent-size=8",
    "--log-every=1",
    "--evaluate-every=2",
    "--extractor-iterations=2",
    "--judge=digits",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """A folder with a tiny run in ``runs/tiny``."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "gfmn", "--device=cpu", "--run-dir=runs/tiny", f"--data={pictures}", *TINY]) == 0
    return folder


@pytest.fixture(autouse=True)
def work_in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def assert_one_line_error(capfd, status, expected, status_expected=1):
    errors = capfd.readouterr().err
    assert status == status_expected
    assert expected in errors
    assert errors.count("\n") == 1


def test_training_ends_with_both_frechet_distances_and_their_ratio(capfd, pictures):
    assert main(["train", "gfmn", "--device=cpu", "--run-dir=runs/last", f"--data={pictures}", *TINY]) == 0
    output = capfd.readouterr()
    head, *_, last = output.out.splitlines()[-6:]
    assert head.split() == ["samples", "real", "images"]
    assert re.fullmatch(r"Frechet distance +[\d.]+ \+- [\d.]+ +[\d.]+ \+- [\d.]+ +ratio [\d.]+", last)


def test_without_a_terminal_there_is_no_progress_bar(capfd, pictures):
    main(["train", "gfmn", "--device=cpu", "--run-dir=runs/quiet", f"--data={pictures}", *TINY])
    assert capfd.readouterr().err == ""


def test_sample_writes_a_grid(folder):
    assert main(["sample", "--run-dir=runs/tiny", "--output=grid.png", "--count=7"]) == 0
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_sample_writes_arrays(folder):
    assert main(["sample", "--run-dir=runs/tiny", "--output=samples.npz", "--count=7"]) == 0
    with np.load(folder / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (7, 32, 32, 1)
        assert arrays["arr_0"].dtype == np.uint8


def test_evaluate_prints_what_training_printed(capfd):
    assert main(["train", "gfmn", "--device=cpu", "--run-dir=runs/tiny", "--resume"]) == 0
    trained = capfd.readouterr().out.splitlines()[-1]
    assert main(["evaluate", "--device=cpu", "--run-dir=runs/tiny"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == trained


def test_moments_writes_the_targets_of_a_data_set(folder, pictures):
    extractor = next((folder / "runs").glob("extractor-*.pt"))
    assert main(["moments", f"--data={pictures}", f"--extractor={extractor}", "--output=target.npz"]) == 0
    assert mo.Moments.load(folder / "target.npz").mean.shape == (43_008,)


def test_images_of_64_pixels_are_trained_sampled_and_evaluated(folder, pictures, capfd):
    options = ["--device=cpu", "--run-dir=runs/large"]
    assert main(["train", "gfmn", *options, f"--data={pictures}", "--size=64", *TINY]) == 0
    trained = capfd.readouterr().out.splitlines()[-1]
    assert main(["train", "gfmn", *options, "--resume", "--steps=5"]) == 0
    assert main(["sample", *options[1:], "--output=large.npz", "--count=3"]) == 0
    with np.load(folder / "large.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 64, 64, 1)
    assert trained.startswith("Frechet distance")


def test_a_missing_data_folder_is_a_one_line_error(capfd):
    assert_one_line_error(capfd, main(["train", "gfmn", "--data=nowhere"]), "nowhere does not exist")


def test_nothing_to_resume_is_a_one_line_error(capfd):
    assert_one_line_error(capfd, main(["train", "gfmn", "--run-dir=runs/none", "--resume"]), "holds no checkpoint.pt")


def test_a_damaged_checkpoint_is_a_one_line_error_and_stays_as_it_is(capfd, folder):
    path = folder / "runs" / "damaged" / "checkpoint.pt"
    path.parent.mkdir()
    path.write_bytes(b"PK damaged")
    status = main(["train", "gfmn", "--run-dir=runs/damaged", "--resume"])
    assert_one_line_error(capfd, status, "checkpoint.pt is damaged")
    assert path.read_bytes() == b"PK damaged"


def test_an_unusable_device_is_a_one_line_error(capfd):
    assert_one_line_error(capfd, main(["sample", "--run-dir=runs/tiny", "--device=quantum"]), "device quantum")


def test_an_unwritable_output_is_a_one_line_error(capfd):
    status = main(["sample", "--run-dir=runs/tiny", "--output=/dev/null/samples.png"])
    assert_one_line_error(capfd, status, "could not write /dev/null/samples.png")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["train", "gfmn", "--batch-size=1"],
        ["train", "gfmn", "--average=mean"],
        ["train", "autoencoder", "--latent-size=0"],
        ["train", "autoencoder", "--seconds=0"],
        ["sample", "--count=0"],
        ["sample", "--output=samples.gif"],
    ],
)
def test_wrong_usage_exits_with_status_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "command",
    [["train", "gfmn"], ["train", "molm"], ["train", "autoencoder"], ["moments"], ["sample"], ["evaluate"], ["env"]],
)
def test_every_command_explains_itself(command, capfd):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert len(capfd.readouterr().out) > 60
