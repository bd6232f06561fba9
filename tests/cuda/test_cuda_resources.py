"""What the compiled GPU kernels ask for: read from the machine code inside the extension, no GPU needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import moment_ops
from moment_ops.kernels import _machine_code
from moment_ops.ops import extension

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float", "double", "Half", "BFloat16")

# A register file of 65,536 holds four blocks of 128 threads with 128 registers each. That keeps 4 * 128 threads * 8
# loads * 16 bytes = 64 KB in flight per multiprocessor, more than bandwidth times latency asks for (about 40 KB).
REDUCTION_REGISTERS = 128
# A tap holds its columns' bias besides, and three blocks still keep 48 KB in flight.
TAP_REGISTERS = 168
# An elementwise pass has four or eight loads in flight per thread and wants one block more.
ELEMENTWISE_REGISTERS = 96
# Two doubles for each of 128 * 8 columns of a narrow block, and a block's losses. Four blocks fit in 80 KB.
REDUCTION_SHARED = 20 * 1024

# kernel: (registers, shared bytes, 16-byte loads, 16-byte stores) at the most and at the least.
# A tile of eight rows is eight loads; the pivot is made of eight more. Backward reads tiles of four rows, with and
# without a gradient to add.
BUDGETS = {
    "moments_kernel": (REDUCTION_REGISTERS, REDUCTION_SHARED, 16, 0),
    "match_features_kernel": (REDUCTION_REGISTERS, REDUCTION_SHARED, 16, 0),
    "match_moments_kernel": (72, 4 * 1024, 0, 0),
    "moments_backward_kernel": (ELEMENTWISE_REGISTERS, 0, 12, 8),
    "relu_moments_kernel": (TAP_REGISTERS, REDUCTION_SHARED, 16, 8),
    "relu_moments_backward_kernel": (ELEMENTWISE_REGISTERS, 0, 12, 8),
}


@pytest.fixture(scope="module")
def library() -> Path:
    if extension.missing("CUDA") is not None:
        if shutil.which("nvcc") and extension.missing("CPU") is None:
            pytest.fail(f"there is an nvcc, but {extension.missing('CUDA')}; build again")
        pytest.skip(str(extension.missing("CUDA")))
    return next(Path(moment_ops.__file__).parent.glob("_C*.so"))


@pytest.fixture(scope="module")
def kernels(library):
    """{architecture: {mangled kernel: its machine code}}."""
    try:
        return _machine_code.library_functions(library)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def budget_of(name: str):
    return next(((kernel, budget) for kernel, budget in BUDGETS.items() if re.search(rf"\d{kernel}I", name)), None)


def test_every_kernel_is_there_for_every_architecture(kernels):
    for architecture in ARCHITECTURES:
        found = [budget_of(name)[0] for name in kernels[architecture]]
        counts = {kernel: found.count(kernel) for kernel in BUDGETS}
        assert counts == {
            "moments_kernel": len(DTYPES),
            "match_features_kernel": 3 * len(DTYPES),
            "match_moments_kernel": 3 * 2,
            "moments_backward_kernel": len(DTYPES),
            "relu_moments_kernel": len(DTYPES),
            "relu_moments_backward_kernel": len(DTYPES),
        }, architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_stay_within_their_budgets(kernels, architecture):
    rows = []
    for name, function in sorted(kernels[architecture].items()):
        kernel, (registers, shared, loads, stores) = budget_of(name)
        wide_loads, wide_stores = function.loads(wide=True), function.stores(wide=True)
        comparison = [
            ("registers", function.registers, "<=", registers, function.registers <= registers),
            ("shared", function.shared, "<=", shared, function.shared <= shared),
            ("stack", function.stack, "<=", 0, function.stack == 0),
            ("spills", function.spills, "<=", 0, function.spills == 0),
            ("16-byte loads", wide_loads, ">=", loads, wide_loads >= loads),
            ("16-byte stores", wide_stores, ">=", stores, wide_stores >= stores),
        ]
        rows += [
            f"{kernel:24} {what:14} {got:6} {sign} {want:6}  {name}"
            for what, got, sign, want, ok in comparison
            if not ok
        ]
    assert not rows, "\n" + "\n".join(rows)


def test_every_kernel_has_a_budget(kernels):
    for names in kernels.values():
        assert all(budget_of(name) for name in names)


def test_the_library_needs_nothing_of_a_cuda_build(library):
    """One file for CPU and CUDA builds of torch: no CUDA library is needed, the only CUDA symbol is weak."""
    needed = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    assert "libtorch.so" in needed
    assert not re.search(r"NEEDED.*(cuda|cudart|c10_cuda)", needed)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True)
    undefined = [line.split() for line in symbols.stdout.splitlines()]
    assert ["w", "aoti_torch_get_current_cuda_stream"] in undefined
    assert not [name for _, name in undefined if re.match(r"_ZNK?(2at|3c10)", name)]
