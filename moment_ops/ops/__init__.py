"""The operators: schemas, shape functions, derivatives and the choice of a backend. Users import `moment_ops`."""

from moment_ops.ops import covariance, extension, gram, match, moments, relu_moments

extension.load()

__all__ = ["covariance", "extension", "gram", "match", "moments", "relu_moments"]
