"""Benchmarks: every operator against plain PyTorch, torch.compile and the published code, interleaved in one run."""

import os

# The profiler of torch writes to the terminal otherwise; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
