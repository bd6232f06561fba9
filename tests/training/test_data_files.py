"""Files of known data sets."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from moment_ops.training import data
from moment_ops.training.errors import TrainingError


def pixels(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(path, array):
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_padded_to_32_pixels_and_have_their_own_test_images(tmp_path, suffix):
    train, test = pixels(30, 28, 28), pixels(10, 28, 28)
    for part, images in (("train", train), ("t10k", test)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", np.arange(len(images), dtype=np.uint8))
    images = data.load(tmp_path)
    assert np.array_equal(images.train[:, 0, 2:30, 2:30], train)
    assert np.array_equal(images.held_out[:, 0, 2:30, 2:30], test)
    assert images.train[:, :, :2].sum() == 0
    assert images.train_labels.tolist() == list(range(30))


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\0\0\x08\x03" + struct.pack(">3I", 9, 28, 28) + b"short"])
def test_damaged_idx_files_are_errors_that_name_them(tmp_path, content):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(TrainingError, match="train-images-idx3-ubyte"):
        data.load(tmp_path)


def cifar_batch(images, key=b"labels"):
    return {b"data": images.reshape(len(images), -1), key: list(range(len(images))), b"batch_label": b"a batch"}


def write_cifar10(folder, protocol=2):
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(
            pickle.dumps(cifar_batch(pixels(number + 3, 3, 32, 32)), protocol)
        )
    (folder / "test_batch").write_bytes(pickle.dumps(cifar_batch(pixels(20, 3, 32, 32)), protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10_from_its_pickles(tmp_path, protocol):
    write_cifar10(tmp_path / "cifar-10-batches-py", protocol)
    images = data.load(tmp_path)
    assert np.array_equal(images.train[:4], pixels(4, 3, 32, 32))
    assert np.array_equal(images.held_out, pixels(20, 3, 32, 32))
    assert len(images.train) == 4 + 5 + 6 + 7 + 8
    assert images.held_out_labels.tolist() == list(range(20))


def test_cifar100_from_its_pickles(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(cifar_batch(pixels(21, 3, 32, 32), b"fine_labels")))
    assert np.array_equal(data.load(tmp_path).train, pixels(21, 3, 32, 32))


class Command:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Command(tmp_path / "ran")}))
    with pytest.raises(TrainingError, match=r"data_batch_3 is not a file of CIFAR.*it wants to run .*open"):
        data.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_stl10_takes_the_unlabeled_images_where_they_are_and_its_columns_come_first(tmp_path):
    unlabeled, test = pixels(24, 3, 96, 96), pixels(20, 3, 96, 96)
    (tmp_path / "unlabeled_X.bin").write_bytes(unlabeled.transpose(0, 1, 3, 2).tobytes())
    (tmp_path / "test_X.bin").write_bytes(test.transpose(0, 1, 3, 2).tobytes())
    images = data.load(tmp_path, size=32)
    expected = data.resize(torch.from_numpy(unlabeled), 32)
    assert images.train.shape == (24, 3, 32, 32)
    assert torch.equal(images.train, expected)
    assert len(images.held_out) == 20


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 3), (3, 32, 32), (32, 32, 1)])
def test_arrays_have_their_channels_first_or_last_or_none(tmp_path, shape):
    array = pixels(30, *shape)
    np.save(tmp_path / "images.npy", array)
    np.savez(tmp_path / "images.npz", x_train=array, y_train=np.arange(30), x_test=array[:20], y_test=np.arange(20))
    images = data.load(tmp_path / "images.npz")
    channels = 3 if 3 in shape else 1
    assert images.train.shape == (30, channels, 32, 32)
    expected = array.reshape(30, 32, 32) if channels == 1 else array if shape[0] == 3 else array.transpose(0, 3, 1, 2)
    assert np.array_equal(images.train.squeeze(1), expected)
    assert images.held_out_labels.tolist() == list(range(20))
    assert len(data.load(tmp_path / "images.npy").held_out) == 6


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((30, 32, 32)), "images: got float64, expected uint8 images"),
        (np.zeros((30, 32), np.uint8), r"images: got shape \(30, 32\), expected \(N, H, W\)"),
        (np.array([{}] * 3), "not a file of arrays"),
    ],
)
def test_arrays_that_are_no_images_are_errors(tmp_path, array, message):
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(TrainingError, match=message):
        data.load(tmp_path / "images.npy")


def test_a_missing_file_of_arrays_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match=r"could not read .*images\.npz"):
        data.load(tmp_path / "images.npz")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "stl10"])
def test_a_named_data_set_that_is_not_there_is_an_error_that_says_where_and_what(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TrainingError, match=f"--data {name}: found no such files in .*data/{name}; put .* there"
    ) as caught:
        data.load(name)
    assert "\n" not in str(caught.value)


def test_a_named_data_set_is_found_in_the_folder_data(tmp_path, monkeypatch):
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    write_cifar10(tmp_path / "data" / "cifar10" / "cifar-10-batches-py")
    monkeypatch.chdir(tmp_path)
    assert data.load("cifar10").name == "cifar10"


@pytest.mark.parametrize("size", [32, 64, 128])
def test_images_are_cropped_to_a_square_and_resized(size):
    images = torch.zeros(2, 3, 100, 200, dtype=torch.uint8)
    images[..., 50:150] = 200
    resized = data.resize(images, size)
    assert resized.shape == (2, 3, size, size)
    assert (resized == 200).all()
