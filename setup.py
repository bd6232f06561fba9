"""Builds `moment_ops/_C.abi3.so`, the C++ kernels behind the operators.

One library on torch's stable ABI serves every torch from 2.10 on and every Python from 3.10 on. The package works
without it, on the plain PyTorch reference; `MOMENT_OPS_EXTENSION=0` leaves it out.

Switches (environment): MOMENT_OPS_EXTENSION=0|1, MAX_JOBS, DEBUG=0|1.
"""

import os
import platform
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
SOURCES = (ROOT / "csrc").glob("**/*.cpp")
DEBUG = os.environ.get("DEBUG", "0") == "1"

# The stable ABI of torch 2.10: the oldest version whose headers have what the kernels need.
TORCH_TARGET_VERSION = "0x020a000000000000"


def extension():
    from torch.utils import cpp_extension

    return cpp_extension.CppExtension(
        "moment_ops._C",
        # Sources relative, include directories absolute: ninja runs the compiler from another folder.
        sources=sorted(
            str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cpp") if "testing" not in path.parts
        ),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(path) for path in (ROOT / "csrc").glob("**/*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            "-O0" if DEBUG else "-O3",
            "-g" if DEBUG else "-g0",
            # Without -fopenmp torch's parallel_for runs serially, silently.
            "-fopenmp",
            "-fvisibility=hidden",
            # Errno and traps keep sqrt and selects scalar; neither changes a result.
            "-fno-math-errno",
            "-fno-trapping-math",
            # For the x86-64-v4 clones, whose default is half their width.
            *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
            "-Wall",
            "-Wno-attributes",
        ],
        # libtorch.so needs libtorch_cuda exactly where CUDA exists; --as-needed toolchains would drop it.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        py_limited_api=True,
    )


def build_arguments():
    if os.environ.get("MOMENT_OPS_EXTENSION", "1") == "0":
        print("moment_ops: MOMENT_OPS_EXTENSION=0, the extension is left out; the reference will run")
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments())
