"""Folders of images and Datasets: decoded by processes of their own, at any size, from any mode of colour."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from moment_ops.training import cache, data, decoding
from moment_ops.training.errors import TrainingError


@pytest.fixture
def folder(tmp_path):
    """Thirty grey images whose shades are 8, 16, ..."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(30):
        Image.new("L", (40, 40), 8 * (index + 1)).save(folder / f"{index:02}.png")
    return folder


def shades(images):
    return sorted(images.flatten(1).float().mean(1).round().int().tolist())


def decoded(image, size=32):
    return decoding.square(image, size)


def test_every_image_is_in_one_part(folder):
    images = data.load(folder)
    assert shades(torch.cat([images.train, images.held_out])) == [8 * (i + 1) for i in range(30)]
    assert len(images.held_out) == 6


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "L", "1", "I;16"])
def test_modes_of_colour_become_8_bits(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 40), 257 * 255, np.uint16))
    else:
        image = Image.new("RGB", (40, 40), (255, 255, 255)).convert(mode)
    pixels, grey = decoded(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 32, 32)
    assert (pixels >= 254).all()
    assert grey == (mode in ("L", "1", "I;16"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0)).convert(mode)
    if mode == "P":
        image.info["transparency"] = 0
        image.putpalette([0, 0, 0] * 256)
        image.paste(0, (0, 0, 40, 40))
    assert (decoded(image)[0] == 255).all()


def test_rotation_in_exif_is_applied(tmp_path):
    image = Image.new("L", (40, 40), 0)
    image.paste(255, (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "upside_down.jpg", exif=exif)
    with Image.open(tmp_path / "upside_down.jpg") as read:
        read.load()
    pixels, _ = decoded(read)
    assert pixels[:, :12].max() < 20
    assert pixels[:, 20:].min() > 235


def test_a_few_unreadable_files_are_left_out_and_named(folder):
    (folder / "03.png").write_bytes(b"")
    with open(folder / "05.png", "r+b") as file:
        file.truncate(60)
    said = []
    images = data.load(folder, say=said.append)
    assert shades(torch.cat([images.train, images.held_out])) == [8 * (i + 1) for i in range(30) if i not in (3, 5)]
    (line,) = said
    assert line.startswith("folder: 2 of 30 images cannot be read: 03.png, 05.png (")
    assert line.endswith("they are left out")


def test_more_than_a_tenth_unreadable_is_an_error(folder):
    for index in range(4):
        (folder / f"{index:02}.png").write_bytes(b"no image")
    with pytest.raises(TrainingError, match=r"4 of 30 images cannot be read: 00\.png, .*; expected at most a tenth"):
        data.load(folder)


def test_many_images_are_decoded_by_processes_in_the_same_order(folder, monkeypatch):
    alone = data.load(folder)
    monkeypatch.setattr(decoding, "FEW_IMAGES", 1)
    assert torch.equal(data.load(folder).train, alone.train)


def test_a_large_set_is_decoded_once_into_a_file_and_anew_when_an_image_changes(folder, monkeypatch, tmp_path):
    alone = data.load(folder)
    monkeypatch.setenv("MOMENT_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoding, "MEMORY_BYTES", 1)
    mapped = data.load(folder)
    assert torch.equal(mapped.train, alone.train)
    monkeypatch.setattr(decoding, "square", None)
    again = data.load(folder)
    assert torch.equal(again.train, alone.train)
    assert again.fingerprint == mapped.fingerprint
    assert len(list((tmp_path / "cache").glob("images-*.npy"))) == 1
    monkeypatch.undo()
    monkeypatch.setenv("MOMENT_OPS_CACHE", str(tmp_path / "cache"))
    Image.new("L", (40, 40), 99).save(folder / "00.png")
    os.utime(folder / "00.png", (1, 1))
    changed = data.load(folder)
    assert changed.fingerprint != mapped.fingerprint
    assert 99 in shades(torch.cat([changed.train, changed.held_out]))


class Squares(Dataset):
    """Colour images with labels, of one of the kinds that Datasets return."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 30

    def __getitem__(self, index):
        pixels = np.full((40, 40, 3), index, np.uint8)
        pixels[..., 0] = 255
        image = {
            "pil": Image.fromarray,
            "uint8": lambda x: torch.from_numpy(x).permute(2, 0, 1),
            "fractions": lambda x: torch.from_numpy(x).permute(2, 0, 1) / 255,
            "array": lambda x: x,
        }[self.kind](pixels)
        return image, index % 3


@pytest.mark.parametrize("kind", ["pil", "uint8", "fractions", "array"])
@pytest.mark.parametrize("memory", [2**28, 1])
def test_a_dataset_of_images_and_labels(kind, memory, monkeypatch):
    monkeypatch.setattr(decoding, "MEMORY_BYTES", memory)
    images = data.load(Squares(kind), size=64)
    assert images.train.shape == (24, 3, 64, 64)
    assert (images.train[:, 0] == 255).all()
    values = images.train[:, 1, 0, 0].long()
    assert torch.equal(images.train_labels, values % 3)
    assert data.load(Squares(kind), size=64).fingerprint == images.fingerprint


def test_something_else_than_a_dataset_is_an_error():
    with pytest.raises(TypeError, match="data: got int, expected a path, a name or a map-style Dataset"):
        data.load(3)


def test_cached_moments_depend_on_all_that_they_are_made_of(monkeypatch, tmp_path):
    import moment_ops as mo

    monkeypatch.setenv("MOMENT_OPS_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return mo.moments(torch.randn(5, 3))

    first = cache.moments(["data", "extractor"], make)
    again = cache.moments(["data", "extractor"], make)
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.var, again.var)
    assert len(made) == 1
    cache.moments(["other data", "extractor"], make)
    assert len(made) == 2


def test_the_fingerprint_of_a_network_is_that_of_its_weights():
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert cache.fingerprint(one) != cache.fingerprint(two)
    two.load_state_dict(one.state_dict())
    assert cache.fingerprint(one) == cache.fingerprint(two)
