"""The base class of losses with a state: buffers that keep their addresses and dtypes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Loss = TypeVar("Loss", bound="BufferedLoss")


class BufferedLoss(nn.Module):
    """A loss whose targets and averages are buffers."""

    def _set_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer. If its shape and dtype do not change, it keeps its address."""
        old = self._buffers.get(name)
        same = old is not None and value is not None and (old.shape, old.dtype) == (value.shape, value.dtype)
        if same:
            with torch.no_grad():
                old.copy_(value)
        else:
            self.register_buffer(name, value, persistent=persistent)

    def _set_buffers(self, attribute: str, values: dict[str, Tensor]) -> None:
        """Replace the buffers whose names are kept in `attribute` by these."""
        for name in set(getattr(self, attribute)) - set(values):
            del self._buffers[name]
        setattr(self, attribute, tuple(values))
        for name, value in values.items():
            self._set_buffer(name, value)

    def _apply(self: Loss, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        """Buffers change their device, but not their dtype: steps of an average would be lost in bfloat16."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
