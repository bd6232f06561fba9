from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from moment_ops.training import gfmn


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from or left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOMENT_OPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 grey pictures in two classes: bright above, bright below."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(40):
        pixels = generator.integers(0, 100, (40, 48), dtype=np.uint8)
        half = "above" if index % 2 else "below"
        pixels[:20] += 100 if half == "above" else 0
        (folder / half).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / half / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def extractor_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extractor") / "extractor.pt"


@pytest.fixture
def train(tmp_path: Path, pictures: Path, extractor_path: Path) -> Any:
    """``train(name, **settings)`` trains a tiny GFMN in the folder ``name``, which it returns."""

    def run(name: str, *, resume: bool = False, say: Any = lambda line: None, **given: Any) -> Path:
        settings = given if resume else {"data": str(pictures), **TINY, **given}
        gfmn.train(tmp_path / name, settings, resume=resume, extractor_files=[extractor_path], say=say)
        return tmp_path / name

    return run
