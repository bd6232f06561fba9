"""Settings by name: the demos, and what the papers used, with the source of each value."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

PAPER = "paper"
CODE = "released code"
THIRD_PARTY = "third-party code"
OURS = "ours"


class Preset(NamedTuple):
    """Settings of a method that differ from its defaults: (value, source)."""

    method: str
    settings: dict[str, tuple[Any, str]]


PRESETS = {
    "gfmn-mnist": Preset("gfmn", {}),
    "molm-mnist": Preset("molm", {}),
    # dos Santos et al., ICCV 2019, with the steps of their comparison of networks; the longest runs have 1.17 million.
    # The average starts from zeros, where that of the released code starts from small random numbers.
    "gfmn-cifar10-vgg19-resnet18": Preset(
        "gfmn",
        {
            "data": ("cifar10", PAPER),
            "features": ("vgg19+resnet18", PAPER),
            "generator": ("gfmn-resnet", CODE),
            "latent_size": (100, PAPER),
            "batch_size": (64, PAPER),
            "lr": (5e-5, CODE),
            "schedule": ("constant", CODE),
            "betas": ((0.5, 0.999), CODE),
            "average": ("adam", PAPER),
            "average_lr": (1e-5, CODE),
            "average_reduction": ("mean", CODE),
            "layer_scale": ("equal", CODE),
            "steps": (391_000, PAPER),
            "seconds": (math.inf, OURS),
            "weight_average": (0.0, CODE),
            "evaluate_every": (5000, OURS),
            "checkpoint_every": (5000, OURS),
        },
    ),
    # Ravuri et al., ICML 2018. Sizes are those of a third party; 1024 is read as the width of the last convolutions.
    "molm-cifar10-1024": Preset(
        "molm",
        {
            "data": ("cifar10", PAPER),
            "network": ("conv", THIRD_PARTY),
            "width": (256, OURS),
            "generator": ("molm-dcgan", THIRD_PARTY),
            "latent_size": (128, THIRD_PARTY),
            "batch_size": (200, THIRD_PARTY),
            "lr": (1e-4, THIRD_PARTY),
            "schedule": ("constant", THIRD_PARTY),
            "betas": ((0.9, 0.999), THIRD_PARTY),
            "moment_lr": (1e-4, THIRD_PARTY),
            "first_moment_steps": (100, THIRD_PARTY),
            "moment_steps": (100, THIRD_PARTY),
            "generator_steps": (2000, THIRD_PARTY),
            "real_images": (40_000, OURS),
            "average": ("none", THIRD_PARTY),
            "penalty": ("real", THIRD_PARTY),
            "penalty_weight": (0.1, THIRD_PARTY),
            "squared_norm": (1.0, THIRD_PARTY),
            "hidden_weight": (1e-4, THIRD_PARTY),
            "gradient_weight": (1.0, THIRD_PARTY),
            "input_weight": (1e-4, OURS),
            "steps": (302_000, THIRD_PARTY),
            "seconds": (math.inf, OURS),
            "weight_average": (0.0, THIRD_PARTY),
            "evaluate_every": (2000, OURS),
            "checkpoint_every": (2000, OURS),
        },
    ),
}


def names(method: str) -> tuple[str, ...]:
    """The presets of a method."""
    return tuple(name for name, preset in PRESETS.items() if preset.method == method)


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, for ``train``: ``gfmn.train("runs/paper", {**preset(name), "seed": 1})``."""
    return {setting: value for setting, (value, _) in PRESETS[name].settings.items()}
