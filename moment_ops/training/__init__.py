"""A thin training loop around the moment ops: data, networks, GFMN, checkpoints and the command line."""
