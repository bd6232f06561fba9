"""Gram matrices of feature maps and the style loss between them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moment_ops.distributed import ProcessGroup, group_size, mean_over_ranks
from moment_ops.losses.matching import check_names
from moment_ops.losses.weights import LayerWeight, layer_weights
from moment_ops.ops import checks
from moment_ops.ops.gram import gram
from moment_ops.ops.layout import statistics_dtype

NORMALIZATIONS = ("sum", "mean")


def _check_maps(input: Any, name: str, *, empty: bool = False) -> list[Tensor]:
    features = checks.features(input, name)
    for i, x in enumerate(features):
        label = checks.label_of(name, i, features, checks.names_of(input))
        if x.dim() != 4:
            raise ValueError(f"{label}: got shape {tuple(x.shape)}, expected (N, C, H, W)")
        if x.numel() == 0 and not (empty and x.shape[1:].numel()):
            raise ValueError(f"{label}: got shape {tuple(x.shape)} without elements")
    return features


def _gram_matrices(x: Tensor) -> Tensor:
    """(N, C, C) float64 `F F'` of every sample, F its (C, H W) map."""
    if x.shape[0] == 0:
        maps = x.flatten(2).double()
        return maps @ maps.mT
    # For the operator, each sample is a layer whose rows are the channels.
    samples = list(x.flatten(2).unbind())
    zero = x.new_zeros(x.shape[2] * x.shape[3])
    return gram([samples], [[zero] * len(samples)])


def gram_matrix(features: Tensor, normalize: str = "sum") -> Tensor:
    """The Gram matrices of feature maps: `G_ij = sum_k F_ik F_jk` over positions k, for every sample. Not centred.

    Args:
        features: (N, C, H, W), float32, bfloat16, float16 or float64.
        normalize: "sum" is the published form. "mean" divides by C H W, as PyTorch's tutorial does for one sample.

    Returns:
        (N, C, C), exactly symmetric, float32 (float64 for float64). Blocks of columns are summed in float64. Twice
        differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or option.

    Cost: one read of the features. Backward takes one read and one write.

    Source: L. Gatys, A. Ecker, M. Bethge, Image Style Transfer Using Convolutional Neural Networks (CVPR 2016),
    equation 3.
    """
    (x,) = _check_maps(features, "features")
    checks.option(normalize, "normalize", NORMALIZATIONS)
    matrices = _gram_matrices(x)
    if normalize == "mean":
        matrices = matrices / x[0].numel()
    return matrices.to(statistics_dtype(x.dtype))


def _check_target(target: Any, maps: Sequence[Tensor]) -> list[Tensor]:
    targets, names = checks.features(target, "target"), checks.names_of(target)
    if len(targets) != len(maps):
        raise ValueError(f"target: got {len(targets)} layers, expected {len(maps)} as in features")
    for i, (t, x) in enumerate(zip(targets, maps, strict=True)):
        label, channels = checks.label_of("target", i, targets, names), x.shape[1]
        if t.dim() != 3 or t.shape[1:] != (channels, channels) or t.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{label}: got shape {tuple(t.shape)}, expected ({x.shape[0]} or 1, {channels}, {channels}), the shape"
                " of `gram_matrix` of the style's features"
            )
        if t.device != x.device:
            raise ValueError(f"{label}: got device {t.device}, expected {x.device} as in features")
    return targets


def style_loss(
    features: checks.Features,
    target: checks.Features,
    *,
    normalize: str = "sum",
    weight: LayerWeight | None = None,
    process_group: ProcessGroup = False,
) -> Tensor:
    """The style loss, `sum_l weight_l sum_ij (G_ij - A_ij)^2 / (4 C^2 (H W)^2)`, averaged over the batch.

    G is the Gram matrix of the features of layer l, and A that of the style image.

    Args:
        features: (N, C, H, W) per layer, of the images that get the style, in float32, bfloat16, float16 or float64.
        target: (N or 1, C, C) per layer: `gram_matrix` of the features of the style image, with the same `normalize`.
            A style image of another size needs "mean". If features and target are mappings, their keys must be equal.
        normalize: "sum" is the published form. "mean" is the form of PyTorch's tutorial, which divides Gram matrices by
            C H W and takes their `mse_loss`. For images of equal size it is 4 / C^2 times the published form.
        weight: a number, or one per layer; finite and non-negative. The default is 1 / L for L layers with "sum", as
            published, and 1 with "mean", as in the tutorial.
        process_group: the average is over the batches of all processes of this group. None is the default group if
            torch.distributed is initialized, False is this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated batch.
            Processes may have no images; without images on any process, the loss is NaN.

    Returns:
        Scalar, float32 (float64 for float64), computed in float64. Differentiable with respect to features and target,
        twice in eager mode.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes, names, options or weights. The message names the
            argument.

    Cost: one read of the features. Backward takes one read and one write.

    Source: L. Gatys, A. Ecker, M. Bethge, Image Style Transfer Using Convolutional Neural Networks (CVPR 2016),
    equations 3 to 5, for one sample. C is N_l there, and H W is M_l.
    """
    alone = group_size(process_group) == 1
    maps = _check_maps(features, "features", empty=not alone)
    targets = _check_target(target, maps)
    check_names(checks.names_of(features), checks.names_of(target))
    checks.option(normalize, "normalize", NORMALIZATIONS)
    if weight is None:
        weight = 1 / len(maps) if normalize == "sum" else 1.0
    weights = layer_weights(weight, "weight", len(maps))
    squares = []
    for x, matrices in zip(maps, targets, strict=True):
        difference = _gram_matrices(x) / (1 if normalize == "sum" else x.shape[1:].numel()) - matrices.double()
        squares.append(difference.square().sum((1, 2)))
    means = [of_samples.mean() for of_samples in squares] if alone else mean_over_ranks(squares, process_group)
    total: Tensor | float = 0.0
    for x, mean, w in zip(maps, means, weights, strict=True):
        channels, size = x.shape[1], x.shape[1:].numel()
        total = total + w * mean / (4 * size**2 if normalize == "sum" else channels**2)
    assert isinstance(total, Tensor)
    return total.to(statistics_dtype(maps[0].dtype))
