"""The compiled kernels of every operator, in the emulator, against float64.

A case allocates its tensors and makes its launches as the operator does, runs them for one architecture in one order
of blocks, and checks everything that they have written. `make test` runs the tests of this folder; those of
full, every operator with every dtype, average and layout, is `make test-emulated`.
"""
