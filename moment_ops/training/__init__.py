"""A training loop on top of the library: data, networks, the methods GFMN and MoLM, checkpoints, the command line."""
