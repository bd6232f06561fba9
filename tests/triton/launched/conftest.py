"""These tests launch kernels with nothing behind the driver, in a process of their own: ../test_launched.py."""

import os

if "TRITON_LIBCUDA_PATH" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
