"""Processes that compute together, for the tests of what is merged over them."""

import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import make_features
from torch import nn

RANKS = 2


class Processes:
    """Processes that serve tasks from a pipe, the last argument of their function.

    Args:
        seconds: the longest that a task may take.
    """

    def __init__(self, serve, arguments, seconds):
        context = mp.get_context("spawn")
        self.seconds, self.pipes, self.processes = seconds, [], []
        for given in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(*given, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, task, size):
        """The results of a task on the first processes, by rank."""
        for pipe in self.pipes[:size]:
            pipe.send(task)
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(self.seconds), f"rank {rank} does not answer"
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


class Ranks(Processes):
    """Two processes that run the functions they are sent."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        super().__init__(serve, [(rank, port) for rank in range(RANKS)], 60)

    def __call__(self, function, *arguments):
        """`function(rank, *arguments)` on every process; the results, by rank."""
        return self.run((function, arguments), RANKS)


def serve(rank, port, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((False, function(rank, *arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()


class Generator(nn.Module):
    """From three numbers per row to two layers of features, (first,) and (3, 2)."""

    def __init__(self, first=4):
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, first + 6)).double()

    def forward(self, z):
        y = self.net(z)
        return [y[:, : self.first], y[:, self.first :].reshape(len(y), 3, 2)]


def rows_of(rank, sizes, seed=0):
    """The rows of one process, or of all for rank None."""
    z = make_features(sum(sizes), [(3,)], torch.float64, seed)[0]
    return z if rank is None else z.split(list(sizes))[rank]
