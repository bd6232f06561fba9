"""The base class of losses with a state: buffers that keep their addresses and dtypes, and updates that may wait."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moment_ops.ops.match import advance

Loss = TypeVar("Loss", bound="BufferedLoss")


class BufferedLoss(nn.Module):
    """A loss whose targets and state are buffers.

    A subclass has a method `_loss`, which advances the state in one of two ways. It passes `_next_state(commit)` to an
    operator that advances these tensors in place. Or it calls `_advance(commit, *tensors)` with whatever its method
    `_update` needs.
    """

    _state_names: tuple[str, ...] = ()  # buffers that advance
    _pending_names: tuple[str, ...] = ()  # copies of what `_update` needs
    _pending = False  # whether `commit` may be called

    def forward(self, input: Any, *, commit: bool = True) -> Tensor:
        """The loss of one batch. In `train()` mode the state advances by one step.

        Args:
            commit: False computes the same loss, but leaves the state as it is until `commit()` is called.
        """
        if not isinstance(commit, bool):
            raise TypeError(f"commit: got {commit!r}, expected a bool")
        if not self.training:
            return self._loss(input, commit)
        # Not after the call, which may raise an error when it has already overwritten what was pending.
        self._pending = False
        loss = self._loss(input, commit)
        self._pending = not commit
        return loss

    @torch.no_grad()
    def commit(self) -> None:
        """Advance the state as the last call would have done without `commit=False`, bit for bit.

        For steps that the optimizer may skip, as under AMP: call the loss with `commit=False`, and `commit()` only if
        the step was taken. Every call in `train()` mode, `reset`, `fill` and `load_state_dict` drop an update that is
        pending, also if they raise an error. Calls in `eval()` mode leave it alone. It is not part of `state_dict`.

        Pending updates are copies in buffers that keep their addresses, and the host does not wait. CUDA graphs replay
        device work only: capture `commit()` too, in a graph of its own.

        Raises:
            RuntimeError: nothing is pending.

        Cost: of an average, memory for a second state, and two copies of the state per step. Of a queue, memory for the
        rows of a batch, and one more copy of them.
        """
        if not self._pending:
            raise RuntimeError("commit: got no pending update, expected a call with commit=False in train() mode first")
        self._pending = False
        self._update(*[self._buffers[name] for name in self._pending_names])
        for child in self.children():
            if isinstance(child, BufferedLoss) and child._pending:
                child.commit()

    def fill(self, batches: Iterable[Any]) -> None:
        """Advance the state by one step for each batch, as calls in `train()` mode do, without gradients.

        It may be called in any mode, to start an average or a queue from samples that are not trained on.

        Args:
            batches: inputs of the loss.

        Raises:
            RuntimeError: the loss has no state.
        """
        if not self._state_names:
            raise RuntimeError("fill: got a loss without a state, expected one with an average or a queue")
        training = self.training
        self.train()
        try:
            with torch.no_grad():
                for batch in batches:
                    self._fill_one(batch)
        finally:
            self.train(training)

    def _fill_one(self, batch: Any) -> None:
        self(batch)

    def _loss(self, input: Any, commit: bool) -> Tensor:
        raise NotImplementedError

    def _update(self, *pending: Tensor) -> None:
        """Advance the state. By default the tensors are the next state."""
        for name, value in zip(self._state_names, pending, strict=True):
            self._buffers[name].copy_(value)

    def _next_state(self, commit: bool) -> list[Tensor]:
        """The tensors that an operator may advance in place: the state, or copies of it until `commit()`."""
        # Looking up a buffer as an attribute of the module takes ten times as long.
        state = [self._buffers[name] for name in self._state_names]
        return state if commit or not self.training else self._defer(state)

    @torch.no_grad()
    def _advance(self, commit: bool, *tensors: Tensor) -> None:
        """Update the state with these tensors, now or when `commit` is called."""
        if not torch.compiler.is_compiling():
            advance((), True)
        if commit:
            self._update(*tensors)
        else:
            self._defer(tensors)

    @torch.no_grad()
    def _defer(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Copy tensors to the pending buffers. Those whose shapes do not change keep their addresses."""
        values = {f"pending_{i}": tensor for i, tensor in enumerate(tensors)}
        self._drop_buffers("_pending_names", values)
        for name, value in values.items():
            if not self._fits(name, value):
                # A tensor made in inference mode could not change outside of it.
                with torch.inference_mode(False):
                    self.register_buffer(name, torch.empty_like(value), persistent=False)
            self._buffers[name].copy_(value)
        return [self._buffers[name] for name in values]

    def _restart(self, state: dict[str, Tensor]) -> None:
        """Replace the state, and drop an update that is pending."""
        self._pending = False
        self._set_buffers("_state_names", state)

    def _set_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer. If its shape and dtype do not change, it keeps its address."""
        if self._fits(name, value):
            with torch.no_grad():
                self._buffers[name].copy_(value)
        else:
            self.register_buffer(name, value, persistent=persistent)

    def _fits(self, name: str, value: Tensor | None) -> bool:
        """Whether there is a buffer of this name, of the shape and dtype of the value."""
        old = self._buffers.get(name)
        return old is not None and value is not None and (old.shape, old.dtype) == (value.shape, value.dtype)

    def _set_buffers(self, attribute: str, values: dict[str, Tensor]) -> None:
        """Replace the buffers whose names are kept in `attribute` by these."""
        self._drop_buffers(attribute, values)
        for name, value in values.items():
            self._set_buffer(name, value)

    def _drop_buffers(self, attribute: str, names: Iterable[str]) -> None:
        """Remove the buffers whose names are kept in `attribute`, except for these; keep their names."""
        kept = tuple(names)
        for name in getattr(self, attribute):
            if name not in kept:
                del self._buffers[name]
        setattr(self, attribute, kept)

    def _apply(self: Loss, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        """Buffers change their device, but not their dtype: steps of an average would be lost in bfloat16."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._pending = False
        super()._load_from_state_dict(*arguments)
