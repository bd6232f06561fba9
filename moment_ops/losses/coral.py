"""Deep CORAL: the distance between the covariances of two domains."""

from torch import Tensor

from moment_ops.distributed import ProcessGroup, group_size, merged_covariance, total_rows
from moment_ops.losses.embeddings import check_embeddings
from moment_ops.losses.gram_distance import gram_distance
from moment_ops.losses.squares import divided_squares
from moment_ops.ops.layout import columns_of, statistics_dtype
from moment_ops.ops.packed_match import without_indefinite


def _check(source: Tensor, target: Tensor, alone: bool) -> None:
    for name, x in (("source", source), ("target", target)):
        check_embeddings(x, name, alone)
    if columns_of(target) != columns_of(source):
        raise ValueError(f"target: got {columns_of(target)} columns, expected {columns_of(source)} as in source")
    if target.dtype != source.dtype:
        raise TypeError(f"target: got dtype {target.dtype}, expected {source.dtype} as in source")
    if target.device != source.device:
        raise ValueError(f"target: got device {target.device}, expected {source.device} as in source")


def coral_loss(source: Tensor, target: Tensor, *, process_group: ProcessGroup = False) -> Tensor:
    """`||C_S - C_T||_F^2 / (4 D^2)`, the CORAL loss of B. Sun and K. Saenko, Deep CORAL (2016), equations 1 to 3.

    Args:
        source: (N, ...) features of one domain, float32, bfloat16, float16 or float64; dimensions after the batch are
            flattened to D columns.
        target: (M, ...) features of the other, of as many columns and in the same dtype. M may differ from N.
        process_group: rows of both domains are those of all processes of this group; None is the default group wherever
            torch.distributed is initialized, False this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated rows. A process
            without rows takes part; too few rows of all give NaN.

    Returns:
        Scalar, float32 (float64 for float64). Covariances are unbiased, over N - 1 and M - 1. Gradients to both
        domains, as published; detach one to hold it fixed. Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices or shapes, fewer than two rows.

    Cost: with N + M < D through (N + M)^2 D inner products and no (D, D) matrix, else through the two covariances,
    (N + M) D^2 products: whichever is less. Over processes it waits for the device, for the numbers of rows.
    """
    _check(source, target, alone=group_size(process_group) == 1)
    columns = columns_of(source)
    if total_rows(source.shape[0] + target.shape[0], source, process_group) < columns:
        return gram_distance([source], [target], weight=[1 / (4 * columns**2)], process_group=process_group)
    first, second = (merged_covariance(x, process_group) for x in (source, target))
    value = divided_squares(first - second, 4 * columns**2)
    value = without_indefinite(value, first.diagonal(), second.diagonal())
    return value.to(statistics_dtype(source.dtype))
