"""Digits, folders of images, batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from moment_ops.training import data
from moment_ops.training.errors import TrainingError


@pytest.fixture(scope="module")
def digits():
    return data.mnist()


def test_mnist_is_4000_and_1000_digits_of_32_by_32_with_all_classes_in_both_parts(digits):
    assert digits.train.shape == (4000, 1, 32, 32)
    assert digits.held_out.shape == (1000, 1, 32, 32)
    assert digits.train_labels.unique().tolist() == list(range(10))
    assert digits.held_out_labels.unique().tolist() == list(range(10))


def test_no_digit_is_in_both_parts(digits):
    train = {image.numpy().tobytes() for image in digits.train}
    assert not any(image.numpy().tobytes() in train for image in digits.held_out)


def test_scale_and_unscale_are_inverse():
    images = torch.arange(256, dtype=torch.uint8)
    assert data.scale(images).aminmax() == (-1, 1)
    assert torch.equal(data.unscale(data.scale(images)), images)


def test_a_folder_of_classes_gives_grey_images_with_labels(pictures):
    images = data.load(str(pictures))
    assert images.train.shape == (32, 1, 32, 32)
    assert len(images.held_out) == 8
    above = images.train[images.train_labels == 0].float()
    assert above[:, :, :12].mean() > above[:, :, 20:].mean() + 50


def test_colour_pictures_of_any_size_become_three_channels_of_32_by_32(tmp_path):
    for index in range(20):
        pixels = np.zeros((50, 60 + index, 3), np.uint8)
        pixels[..., 1] = 200
        Image.fromarray(pixels).save(tmp_path / f"{index}.{'jpg' if index % 2 else 'png'}")
    images = data.load(str(tmp_path))
    assert images.train.shape == (16, 3, 32, 32)
    assert images.train_labels is None
    assert abs(images.train.float().mean((0, 2, 3)) - torch.tensor([0.0, 200.0, 0.0])).max() < 3


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(TrainingError, match=r"data folder .*nowhere does not exist"):
        data.load(str(tmp_path / "nowhere"))


def test_an_empty_folder_is_an_error_that_says_what_is_needed(tmp_path):
    with pytest.raises(TrainingError, match=r"holds 0 images \(such as png or jpg\), expected at least 20"):
        data.load(str(tmp_path))


def test_a_file_that_is_no_image_is_named(tmp_path):
    for index in range(20):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(TrainingError, match=r"20 of 20 images cannot be read: 0\.png, .*; expected at most a tenth"):
        data.load(str(tmp_path))


def test_batches_take_every_index_once_an_epoch_in_another_order_each_time():
    batches = data.Batches(10, 5)
    epochs = [torch.cat([next(batches), next(batches)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_continue_where_their_state_was_taken():
    batches = data.Batches(10, 4)
    next(batches)
    state = batches.state_dict()
    expected = [next(batches).tolist() for _ in range(5)]
    other = data.Batches(10, 4, seed=7)
    other.load_state_dict(state)
    assert [next(other).tolist() for _ in range(5)] == expected
