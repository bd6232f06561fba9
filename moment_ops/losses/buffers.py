"""What losses with a state share: buffers that keep their addresses and dtypes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Loss = TypeVar("Loss", bound="BufferedLoss")


class BufferedLoss(nn.Module):
    """A loss whose targets and averages are buffers."""

    def _set_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer; one of unchanged shape and dtype keeps its address."""
        old = self._buffers.get(name)
        same = old is not None and value is not None and (old.shape, old.dtype) == (value.shape, value.dtype)
        if same:
            with torch.no_grad():
                old.copy_(value)
        else:
            self.register_buffer(name, value, persistent=persistent)

    def _set_buffers(self, attribute: str, values: dict[str, Tensor]) -> None:
        """Register buffers of one kind, whose names are kept in an attribute, in place of those there were."""
        for name in set(getattr(self, attribute)) - set(values):
            del self._buffers[name]
        setattr(self, attribute, tuple(values))
        for name, value in values.items():
            self._set_buffer(name, value)

    def _apply(self: Loss, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        """Buffers follow a change of device, not one of dtype: an average in bfloat16 would stand still."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
