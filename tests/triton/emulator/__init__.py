"""Executes PTX, the assembly of NVIDIA's GPUs, on NumPy arrays: what the compiler made of a kernel, not what it meant.

An entry of every array is a lane: a thread of one of the blocks that run in lockstep. Numbers are those of the
hardware where PTX defines them, and stated where it does not (rounding.py, floats.py, matrices.py). Accesses to memory
are checked byte by byte (memory.py), and so is whether anything orders them (races.py). What an instruction does
stands in the files of its family; what is not known there is an error, never skipped.

`launcher.run` takes launches of this project's kernels; `execution.execute` any kernel.
"""
