"""Autograd nodes in two forms, of which the cheaper one is called wherever it will do."""

from typing import Any

import torch


class Node(torch.autograd.Function):
    """A Function with a `setup_context`, as the transforms of `torch.func` and the compiler want it.

    torch binds the signature of such a `forward` anew at every call, which takes 20 us. Outside of transforms `call`
    takes a form with the context in `forward`, made from the same parts.
    """

    _direct: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = cls.forward(*inputs)
                cls.setup_context(ctx, inputs, output)
                return output

            backward = staticmethod(cls.backward)

        Direct.__name__ = Direct.__qualname__ = cls.__name__
        cls._direct = Direct

    @classmethod
    def call(cls, *inputs: Any) -> Any:
        """Apply the function."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*inputs)
        return cls._direct.apply(*inputs)
