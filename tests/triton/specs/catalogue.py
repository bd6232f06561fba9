"""The specs of all kernels, and their launches on any architecture."""

from collections.abc import Callable

from moment_ops.kernels._architectures import Architecture
from moment_ops.kernels._launch import Launch
from specs import covariances, grams
from specs.columns import COLUMN_SPECS

SPECS = COLUMN_SPECS + covariances.COVARIANCE_SPECS + grams.GRAM_SPECS


def launches(architecture: Architecture) -> dict[str, Callable[[], Launch]]:
    """What the specs launch, by name: the columns' are the same on all architectures."""
    columns = {spec.name: spec.launch for spec in COLUMN_SPECS}
    return {**columns, **covariances.launches(architecture), **grams.launches(architecture)}
