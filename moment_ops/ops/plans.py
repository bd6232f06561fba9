"""Plans: what is computed once for calls that are alike, such as checks, layouts and the choice of a backend.

Calls are alike if their tensors have the same signature and their options are equal. A plan holds neither tensors nor
addresses.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

Signature: TypeAlias = tuple[Any, ...]
Plan = TypeVar("Plan")

# Plans that are remembered per kind of call; a network has a few per batch size.
MOST_PLANS = 1024
# Subclasses bring an interpretation of their own along.
_PLAIN = {Tensor: Tensor, torch.nn.Parameter: torch.nn.Parameter}


def signature(tensors: Iterable[Tensor | None]) -> Signature | None:
    """Everything about tensors that a plan may depend on: all but their values, with addresses modulo 16.

    None if a plan does not apply: for tensors that are not plain and strided, and while calls are traced, transformed
    or intercepted. Such calls use the registered operators.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return None
    try:
        return tuple(
            [
                None
                if x is None
                else (_PLAIN[x.__class__], x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.data_ptr() & 15)
                for x in tensors
            ]
        )
    except (KeyError, RuntimeError):
        return None


class Plans(Generic[Plan]):
    """The plans of one kind of call. The oldest are dropped."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}

    def find(self, signature: Signature | None, options: Hashable, make: Callable[..., Plan], *arguments: Any) -> Plan:
        """The plan of a signature and options. If there is none, `make(*arguments)` makes it; if that raises, none is
        kept.
        """
        if signature is None:
            return make(*arguments)
        key = signature, options
        plan = self._plans.get(key)
        if plan is None:
            plan = make(*arguments)
            self.put(key, plan)
        return plan

    def get(self, key: Hashable) -> Plan | None:
        """The plan of a key, or None."""
        return self._plans.get(key)

    def put(self, key: Hashable, plan: Plan) -> None:
        """Remember a plan."""
        if len(self._plans) >= MOST_PLANS:
            self._plans.pop(next(iter(self._plans)), None)
        self._plans[key] = plan
