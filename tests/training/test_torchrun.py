"""The command under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import TINY

from moment_ops.training import runs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def options(pictures, run):
    given = {name: value for name, value in TINY.items() if name != "seconds"}
    return [
        f"--data={pictures}",
        f"--run-dir={run}",
        "--device=cpu",
        *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()),
    ]


def test_a_process_that_dies_ends_all_and_one_process_continues_its_run(tmp_path, pictures):
    run = tmp_path / "runs" / "run"
    script = Path(__file__).with_name("dying_process.py")
    environment = {**os.environ, "DIE_IN_STEP": "15", "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(script), "train", "gfmn", *options(pictures, run)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("moment-ops:")]
    assert ours == [
        "moment-ops: another process of the training ended; the last checkpoint is of step 10, which --resume continues"
    ]
    assert ended.stdout.count("step 10: loss") == 1
    assert runs.load_checkpoint(run)["trainer"]["step"] == 10

    alone = [sys.executable, "-m", "moment_ops", "train", "gfmn", "--resume", f"--run-dir={run}", "--device=cpu"]
    finished = subprocess.run(alone, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))
    weights = runs.load_checkpoint(run)["trainer"]["generator"].values()
    assert all(bool(value.isfinite().all()) for value in weights if isinstance(value, torch.Tensor))


def test_several_processes_write_one_run_and_one_summary(tmp_path, pictures):
    run = tmp_path / "runs" / "run"
    command = [*TORCHRUN, "-m", "moment_ops", "train", "gfmn", *options(pictures, run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\nFrechet distance ") == 1
    assert ended.stdout.count(f"results in {run}") == 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))
