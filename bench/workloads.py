"""The layer shapes that the benchmarks run on, and inputs for them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_FILE = Path(__file__).parent / "workloads.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """The features of one training step: one shape per layer, without the batch."""

    name: str
    title: str
    batch: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def columns(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def bytes(self, dtype: torch.dtype) -> int:
        """Size of all features."""
        return self.batch * self.columns * dtype.itemsize


WORKLOADS = {
    name: Workload(name, entry["title"], entry["batch"], tuple(tuple(shape) for shape in entry["shapes"]))
    for name, entry in json.loads(_FILE.read_text()).items()
}


def make_features(workload: Workload, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Feature maps as they leave a ReLU, whose columns differ in mean and spread; they want gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    features = []
    for shape in workload.shapes:
        shift = torch.randn(shape, generator=generator, device=device)
        noise = torch.randn((workload.batch, *shape), generator=generator, device=device)
        features.append(noise.add_(shift, alpha=0.5).relu_().to(dtype).requires_grad_())
    return features


def make_vectors(workload: Workload, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two packed (F,) vectors in [0.2, 0.8): targets for the moments, or gradients of them."""
    generator = torch.Generator(device).manual_seed(seed)
    first, second = torch.rand((2, workload.columns), generator=generator, device=device).mul_(0.6).add_(0.2)
    return first, second
