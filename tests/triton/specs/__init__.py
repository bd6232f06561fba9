"""What the kernels must compile to, checked without a GPU: registers, spills, 128-bit accesses, shared memory.

A spec builds its launch with the functions that launch on a GPU, on tensors without memory, so that what is compiled
here is what runs.
"""
