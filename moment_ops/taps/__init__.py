"""Taps: moments collected inside a network."""

from moment_ops.taps.extractor import MomentExtractor

__all__ = ["MomentExtractor"]
