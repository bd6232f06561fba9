"""Steps with non-finite gradients are skipped, and the run goes back to the last good checkpoint once."""

import json
import math

import pytest
import torch
from comparison import assert_same
from torch import nn

from moment_ops.training import checkpoints, gfmn, runs
from moment_ops.training.errors import TrainingError
from moment_ops.training.finite import adam, step_if_finite


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(calls)`` makes the losses of these calls NaN, counted from 1 and over returns."""
    forward, calls, spoiled = gfmn.Matching.forward, iter(range(1, 1000)), set()

    def call(self, images):
        return forward(self, images) * (math.nan if next(calls) in spoiled else 1.0)

    monkeypatch.setattr(gfmn.Matching, "forward", call)
    return spoiled.update


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_are(value):
    layer = nn.Linear(3, 2)
    optimizer = adam(layer.parameters(), lr=0.1, betas=(0.5, 0.999))
    layer(torch.ones(1, 3)).sum().backward()
    assert step_if_finite(optimizer) == 0
    weights = {name: x.clone() for name, x in layer.state_dict().items()}
    state = [{name: x.clone() for name, x in moments.items()} for moments in optimizer.state_dict()["state"].values()]
    layer.weight.grad[1, 2] = value
    assert step_if_finite(optimizer) == 1
    assert_same(dict(layer.state_dict()), weights)
    assert_same(list(optimizer.state_dict()["state"].values()), state)


def test_large_finite_gradients_are_no_reason_to_skip_a_step():
    layer = nn.Linear(3, 2)
    optimizer = adam(layer.parameters(), lr=0.1, betas=(0.5, 0.999))
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 3e38)
    assert step_if_finite(optimizer) == 0


def test_skipped_steps_are_counted_and_have_no_part_in_the_run(train, spoil):
    spoil({5, 6, 12})
    run = train("run")
    lines = metrics_of(run)
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] + [2] * 6 + [3] * 9
    assert [line["step"] for line in lines if "loss" not in line] == [5, 6, 12]
    state = runs.load_checkpoint(run)["trainer"]
    assert all(bool(x.isfinite().all()) for part in ("generator", "averaged") for x in state[part].values())
    # Batches normalised and weights stepped: only in the other 17 steps.
    assert state["generator"]["layers.1.num_batches_tracked"] == 17
    assert state["optimizer"]["state"][0]["step"] == 17


def test_after_ten_in_a_row_the_run_returns_to_the_last_good_checkpoint_with_other_random_numbers(
    train, spoil, tmp_path
):
    spoil(range(13, 23))
    said = []
    run = train("run", say=said.append, steps=30, checkpoint_every=5)
    assert [line for line in said if "in a row" in line] == [
        "the gradients were non-finite in 10 steps in a row up to step 22; continuing from step 10 with other random"
        " numbers"
    ]
    assert [line["step"] for line in metrics_of(run)] == list(range(1, 31))
    assert all("loss" in line for line in metrics_of(run))
    noise = [checkpoints.load(run / f"checkpoint-{step}.pt", "checkpoint")["trainer"]["noise"] for step in (20, 30)]
    other = train("other", steps=30, checkpoint_every=5)
    expected = checkpoints.load(other / "checkpoint-20.pt", "checkpoint")["trainer"]["noise"]
    assert not torch.equal(noise[0], expected)


def test_the_second_time_the_run_ends_with_an_error_and_a_good_checkpoint(train, spoil, tmp_path):
    spoil(range(13, 1000))
    with pytest.raises(TrainingError, match="in a row up to step 20, for the second time; try a lower --lr"):
        train("run", steps=30, checkpoint_every=5)
    assert runs.load_checkpoint(tmp_path / "run")["trainer"]["step"] == 10
