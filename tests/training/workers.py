"""Processes that train together, for the tests of what is merged over them."""

import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Workers:
    """Processes that run the functions they are sent, alone or as a group."""

    def __init__(self, count, folder):
        context = mp.get_context("spawn")
        self.folder, self.groups = Path(folder), 0
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(rank, theirs), daemon=True))
            self.processes[-1].start()

    def __call__(self, size, function, *arguments):
        """``function(*arguments)`` on a group of ``size`` processes, in float64; the results, by rank."""
        self.groups += 1
        store = self.folder / f"group-{self.groups}"
        for pipe in self.pipes[:size]:
            pipe.send((size, str(store), function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(120), f"rank {rank} does not answer"
            failed, result = pipe.recv()
            assert not failed, f"rank {rank}:\n{result}"
            results.append(result)
        return results

    def stop(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


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
