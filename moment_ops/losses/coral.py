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
    """The CORAL loss, `||C_S - C_T||_F^2 / (4 D^2)` with unbiased covariances C_S and C_T.

    Args:
        source: (N, ...) features of one domain, N >= 2, in float32, bfloat16, float16 or float64. Dimensions after the
            batch are flattened to D columns.
        target: (M, ...) features of the other domain, M >= 2, with the same D, dtype and device.
        process_group: rows of both domains are gathered over this group. None is the default group if torch.distributed
            is initialized, False is this process alone. The loss is the same on every process, and parameters under
            DistributedDataParallel get the gradient of one process on the concatenated rows. Processes may have no
            rows; if fewer than two rows remain in all, the loss is NaN.

    Returns:
        Scalar, float32 (float64 for float64). It has gradients with respect to both domains, as published; detach one
        to keep it constant. Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices or shapes; fewer than two rows.

    Cost: if N + M < D, (N + M)^2 D products and no (D, D) matrix; otherwise (N + M) D^2 products and two (D, D)
    matrices. Over several processes the host waits for the numbers of rows.

    Source: B. Sun and K. Saenko, Deep CORAL (2016), equations 1 to 3.
    """
    _check(source, target, alone=group_size(process_group) == 1)
    columns = columns_of(source)
    if total_rows(source.shape[0] + target.shape[0], source, process_group) < columns:
        return gram_distance([source], [target], weight=[1 / (4 * columns**2)], process_group=process_group)
    first, second = (merged_covariance(x, process_group) for x in (source, target))
    value = divided_squares(first - second, 4 * columns**2)
    value = without_indefinite(value, first.diagonal(), second.diagonal())
    return value.to(statistics_dtype(source.dtype))
