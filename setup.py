"""Builds `moment_ops/_C.abi3.so`, the C++ and CUDA kernels behind the operators.

One library on torch's stable ABI serves every torch from 2.10 on and every Python from 3.10 on, with a GPU or without.
The package works without it too, on plain PyTorch.

Switches (environment):
    MOMENT_OPS_EXTENSION=0|1   0 leaves the library out (default 1)
    MOMENT_OPS_CUDA=auto|0|1   auto: with nvcc on the PATH or in CUDA_HOME, also on a machine without a GPU
    TORCH_CUDA_ARCH_LIST       default 8.0;9.0, with CUDA 12.8 and later also 10.0; PTX of the newest
    MAX_JOBS, DEBUG=0|1
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
DEBUG = os.environ.get("DEBUG", "0") == "1"

# The stable ABI of torch 2.10: the oldest version whose headers have what the kernels need.
TORCH_TARGET_VERSION = "0x020a000000000000"

OPTIMIZE = ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
CXX_FLAGS = [
    *OPTIMIZE,
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
]
NVCC_FLAGS = [*(["-O0", "-G"] if DEBUG else ["-O3"]), "-Xcompiler=-fvisibility=hidden"]


def find_cuda():
    """(CUDA home, version), or None with a message that says why CUDA is left out."""
    wanted = os.environ.get("MOMENT_OPS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"MOMENT_OPS_CUDA: got {wanted!r}, expected auto, 0 or 1")
    if wanted == "0":
        print("moment_ops: MOMENT_OPS_CUDA=0, CUDA kernels are left out")
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        if wanted == "1":
            raise SystemExit("MOMENT_OPS_CUDA=1, but there is no nvcc on the PATH or in CUDA_HOME")
        print("moment_ops: no nvcc found, CUDA kernels are left out; GPU tensors will use Triton")
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(int(part) for part in re.search(r"release (\d+)\.(\d+)", text).groups())
    return toolkit_root(nvcc), version


def toolkit_root(nvcc):
    """Where nvcc itself looks for headers and libraries; `nvcc` may be a link or a wrapper elsewhere."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    tops = [line.split("=", 1)[1] for line in lines if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parent.parent


def extension():
    from torch.utils import cpp_extension

    sources = sorted(path for path in (ROOT / "csrc").glob("**/*.cpp") if "testing" not in path.parts)
    link_args = ["-Wl,--no-as-needed", "-ltorch"]  # --as-needed toolchains would drop libtorch.so, see launch_cuda.h
    library_dirs = []
    cuda = find_cuda()
    if cuda is not None:
        home, version = cuda
        print(f"moment_ops: CUDA {version[0]}.{version[1]} in {home}")
        sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        # A CPU build of torch forgets its CUDA_HOME and finds no GPU to ask for architectures.
        cpp_extension.CUDA_HOME = str(home)
        archs = "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", archs)
        library_dirs += [str(path) for path in (home / "lib64", home / "lib") if path.exists()]
        link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "moment_ops._C",
        # Sources relative, include directories absolute: ninja runs the compiler from another folder.
        sources=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=library_dirs,
        depends=sorted(str(path) for path in (ROOT / "csrc").glob("**/*.*h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=link_args,
        py_limited_api=True,
    )


def remove_stale_objects():
    """Objects of nvcc older than any header: ninja gets no list of their headers from torch's build rules."""
    headers = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")]
    newest = max(path.stat().st_mtime for path in headers)
    for path in (ROOT / "build").glob("temp*/csrc/cuda/*.o"):
        if path.stat().st_mtime < newest:
            path.unlink()


def build_arguments():
    if os.environ.get("MOMENT_OPS_EXTENSION", "1") == "0":
        print("moment_ops: MOMENT_OPS_EXTENSION=0, the extension is left out; plain PyTorch will run")
        return {}
    from torch.utils.cpp_extension import BuildExtension

    remove_stale_objects()
    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_arguments())
