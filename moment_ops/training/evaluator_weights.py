"""The file with the weights of the digit classifier that judges samples."""

from pathlib import Path

import numpy as np
from torch import nn

WEIGHTS = Path(__file__).with_name("evaluator.npz")


def save(classifier: nn.Module, path: Path = WEIGHTS) -> None:
    """Write the weights in half precision, which does not change the class of any digit."""
    state = {name: value for name, value in classifier.state_dict().items() if value.is_floating_point()}
    np.savez_compressed(path, **{name: value.cpu().numpy().astype(np.float16) for name, value in state.items()})
