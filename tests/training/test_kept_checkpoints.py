"""The last checkpoints are kept, and a run survives being killed at any moment."""

import json
import multiprocessing
import os
import random
import signal

import pytest
from comparison import assert_same
from tiny import TINY

from moment_ops.training import checkpoints, gfmn, runs
from moment_ops.training.errors import TrainingError

# `make test-kill` kills many times.
KILLS = int(os.environ.get("MOMENT_OPS_KILLS", 4))
KILLED = {"steps": 60, "log_every": 3, "evaluate_every": 20, "checkpoint_every": 4}


def silent(line):
    pass


def test_the_last_checkpoints_are_kept_and_the_newest_has_two_names(train):
    run = train("run", checkpoint_every=4, keep_checkpoints=2)
    assert sorted(path.name for path in run.glob("*.pt")) == ["checkpoint-16.pt", "checkpoint-20.pt", "checkpoint.pt"]
    assert (run / "checkpoint.pt").samefile(run / "checkpoint-20.pt")


def test_a_run_with_a_damaged_last_checkpoint_continues_from_the_one_before(train):
    run, said = train("run"), []
    os.truncate(run / "checkpoint.pt", 1000)
    train("run", resume=True, say=said.append)
    assert any("is damaged" in line and "continuing from checkpoint-10.pt" in line for line in said)
    assert f"continuing {run} at step 10" in said
    assert runs.load_checkpoint(run)["trainer"]["step"] == 20


def test_if_all_checkpoints_are_damaged_the_error_names_the_last(train):
    run = train("run")
    for path in run.glob("*.pt"):
        os.truncate(path, 1000)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt is damaged"):
        train("run", resume=True)


def test_a_checkpoint_of_an_earlier_version_is_a_one_line_error(train):
    run = train("run")
    state = runs.load_checkpoint(run)
    del state["version"]
    checkpoints.save(run / "checkpoint.pt", "checkpoint", state)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt was written by an earlier version of moment_ops"):
        train("run", resume=True)


def train_in_process(run, pictures, extractor_path):
    import torch

    torch.set_num_threads(1)
    resume = (run / runs.CHECKPOINT).exists()
    given = {} if resume else {"data": str(pictures), **TINY, **KILLED}
    gfmn.train(run, given, resume=resume, extractor_files=[extractor_path], say=silent)


def test_a_run_that_is_killed_again_and_again_equals_an_uninterrupted_one(train, pictures, extractor_path, tmp_path):
    whole = train("whole", **KILLED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moment_ops.training.gfmn", "moment_ops.training.extractors"])
    moments, killed, run = random.Random(0), 0, tmp_path / "killed-0"
    while killed < KILLS:
        process = context.Process(target=train_in_process, args=(run, pictures, extractor_path))
        before = metrics_time(run)
        process.start()
        # Anywhere, and every second time only after it went on.
        while killed % 2 and process.is_alive() and metrics_time(run) == before:
            process.join(0.05)
        process.join(moments.uniform(0, 1) if killed % 2 else moments.uniform(0.5, 2.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert_same(without_time(run), without_time(whole))
            run = tmp_path / f"killed-{killed}"
    train_in_process(run, pictures, extractor_path)
    assert_same(without_time(run), without_time(whole))
    assert not list(run.glob(".*"))


def metrics_time(run):
    """When metrics were last written."""
    path = run / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else None


def without_time(run):
    """The last state of a run and its metrics, but for the time."""
    state = runs.load_checkpoint(run)["trainer"]
    del state["elapsed"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state, [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
