"""Fused moment ops for PyTorch: means, variances and covariances of many layers, and the losses that match them."""

from moment_ops.averages import AdamMovingAverage, MovingAverage
from moment_ops.covariances import covariance
from moment_ops.dataset import dataset_moments
from moment_ops.losses.coral import coral_loss
from moment_ops.losses.covariance import CovarianceLoss, covariance_loss
from moment_ops.losses.covariance_distance import CovarianceDistance, covariance_distance
from moment_ops.losses.frechet import frechet_distance
from moment_ops.losses.frechet_loss import FrechetLoss, frechet_loss
from moment_ops.losses.moment import MomentLoss, moment_loss
from moment_ops.losses.style import gram_matrix, style_loss
from moment_ops.losses.vicreg import vicreg_covariance, vicreg_variance
from moment_ops.moment_network import MomentNetwork
from moment_ops.ops.backends import backend
from moment_ops.parts import backward_in_parts
from moment_ops.statistics import Moments, moments
from moment_ops.taps import MomentExtractor

__version__ = "0.1.0"

__all__ = [
    "AdamMovingAverage",
    "CovarianceDistance",
    "CovarianceLoss",
    "FrechetLoss",
    "MomentExtractor",
    "MomentLoss",
    "MomentNetwork",
    "Moments",
    "MovingAverage",
    "backend",
    "backward_in_parts",
    "coral_loss",
    "covariance",
    "covariance_distance",
    "covariance_loss",
    "dataset_moments",
    "frechet_distance",
    "frechet_loss",
    "gram_matrix",
    "moment_loss",
    "moments",
    "style_loss",
    "vicreg_covariance",
    "vicreg_variance",
]
