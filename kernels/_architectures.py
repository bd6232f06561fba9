"""What is known of an architecture: its processors, and how it multiplies matrices in a named precision.

An architecture is named as Triton names it: 90 is sm_90 of NVIDIA, "gfx942" is AMD's; 0 stands for the interpreter.
"""

import torch
import triton.language as tl
from triton import knobs

from moment_ops.kernels._plan import MAX_LAYERS

Architecture = int | str

# Multiprocessors of the largest GPU of an architecture.
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170, "gfx90a": 104, "gfx942": 304, "gfx950": 256}


def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a GPU, or 0 for another device."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return 10 * properties.major + properties.minor


def processors(architecture: Architecture) -> int:
    """The number of multiprocessors to keep busy."""
    return _PROCESSORS.get(architecture, 128)


def most_layers(architecture: Architecture) -> int:
    """Layers of a launch. A wave of AMD has a hundred scalar registers: the arguments of more layers would spill."""
    return 8 if isinstance(architecture, str) else MAX_LAYERS


def family(architecture: Architecture) -> str:
    """The architecture whose tiles are used on this one."""
    if isinstance(architecture, str):
        return "gfx"
    if 90 <= architecture < 120:
        return "sm_90" if architecture < 100 else "sm_100"
    return "sm_80"


def product_mode(precision: str, dtype: torch.dtype, centered: bool, architecture: Architecture) -> str:
    """How operands are multiplied, of features of some dtype, in one of the named precisions.

    Differences of 16-bit features fit into two terms, so that tensor cores give "ieee"; the features into one. AMD's
    matrix instructions take float32, too.
    """
    # gfx90a takes subnormal bfloat16 for zero.
    if precision == "ieee" and dtype == torch.bfloat16 and architecture != "gfx90a":
        return "bf16x4" if centered else "bf16"
    if precision == "ieee" and dtype == torch.float16 and not isinstance(architecture, str):
        return "tf32x3" if centered else "tf32"
    return _available(precision, architecture)


def gradient_mode(precision: str, dtype: torch.dtype, architecture: Architecture) -> str:
    """Likewise, of gradients: those of 16-bit features are rounded to 16 bits, and three products are exact enough."""
    return _available("bf16x3" if precision == "ieee" and dtype != torch.float32 else precision, architecture)


def gram_mode(dtype: torch.dtype, architecture: Architecture) -> str:
    """Likewise, of Gram matrices.

    The shift is any float32, so that differences from it do not fit into two bfloat16, as those of a covariance do:
    two terms of 11 bits, of which three products are float32 to two bits.
    """
    return "ieee" if dtype == torch.float32 or isinstance(architecture, str) else "tf32x3"


def _available(precision: str, architecture: Architecture) -> str:
    """The precision, or a more exact one: of AMD's GPUs, gfx942 alone has tf32."""
    missing = precision == "tf32" and isinstance(architecture, str) and architecture != "gfx942"
    return "bf16x3" if missing else precision


def operand_dtype() -> tl.dtype:
    """The dtype of bfloat16 operands: the interpreter cannot multiply them."""
    return tl.float32 if knobs.runtime.interpret else tl.bfloat16
