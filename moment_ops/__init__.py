"""Fused moment ops for PyTorch: means, variances and their matching losses over many layers, in one pass."""

from moment_ops.averages import AdamMovingAverage, MovingAverage
from moment_ops.losses.frechet import frechet_distance
from moment_ops.losses.moment import MomentLoss, moment_loss
from moment_ops.ops.backends import backend
from moment_ops.statistics import Moments, moments
from moment_ops.streaming import dataset_moments
from moment_ops.taps import MomentExtractor

__version__ = "0.1.0"

__all__ = [
    "AdamMovingAverage",
    "MomentExtractor",
    "MomentLoss",
    "Moments",
    "MovingAverage",
    "backend",
    "dataset_moments",
    "frechet_distance",
    "moment_loss",
    "moments",
]
