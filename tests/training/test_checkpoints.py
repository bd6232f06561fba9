"""Files are either whole or not there."""

import os
import resource

import pytest
import torch

from moment_ops.training import checkpoints
from moment_ops.training.errors import TrainingError


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(path, "checkpoint", {"weight": torch.arange(10_000.0), "step": 3})
    return path


def test_what_was_saved_is_loaded(saved):
    state = checkpoints.load(saved, "checkpoint")
    assert state["step"] == 3
    assert torch.equal(state["weight"], torch.arange(10_000.0))


@pytest.mark.parametrize("size", [0, 1, 100, 20_000])
def test_a_truncated_file_is_a_one_line_error(saved, size):
    os.truncate(saved, size)
    with pytest.raises(TrainingError, match=r"damaged, or not a checkpoint") as caught:
        checkpoints.load(saved, "checkpoint")
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_inside_a_tensor_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(TrainingError, match="damaged"):
        checkpoints.load(saved, "checkpoint")


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(TrainingError, match="not a checkpoint written by moment_ops"):
        checkpoints.load(path, "checkpoint")


def test_one_kind_of_file_is_not_taken_for_another(saved):
    with pytest.raises(TrainingError, match="not a feature extractor"):
        checkpoints.load(saved, "feature extractor")


def test_a_missing_file_is_a_one_line_error(tmp_path):
    with pytest.raises(TrainingError, match="No such file"):
        checkpoints.load(tmp_path / "none.pt", "checkpoint")


def test_when_the_disk_is_full_the_last_checkpoint_stays_and_nothing_is_left_over(saved):
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"could not write .*checkpoint\.pt"):
            checkpoints.save(saved, "checkpoint", {"weight": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["checkpoint.pt"]
