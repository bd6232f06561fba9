"""Processes that train together, for the tests of what is merged over them."""

import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import Processes


class Workers(Processes):
    """Processes that run the functions they are sent, alone or as a group."""

    def __init__(self, count, folder):
        self.folder, self.groups = Path(folder), 0
        super().__init__(serve, [(rank,) for rank in range(count)], 120)

    def __call__(self, size, function, *arguments):
        """``function(*arguments)`` on a group of ``size`` processes, in float64; the results, by rank."""
        self.groups += 1
        store = self.folder / f"group-{self.groups}"
        return self.run((size, str(store), function, arguments), size)


def serve(rank, pipe):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    while (task := pipe.recv()) is not None:
        size, store, function, arguments = task
        try:
            if size > 1:
                dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
                # All are connected before one is done and leaves.
                dist.barrier()
            pipe.send((False, function(*arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
