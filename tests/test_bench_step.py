"""The benchmark of whole steps: its contestants agree, and the table says where the time goes."""

from dataclasses import replace

import pytest
from test_bench import FixedTimes, run

from bench import bench_step, report
from bench.bench_step import EAGER, ORIGINAL, PLAIN, StepBench
from bench.harness import OURS
from bench.results import NO_LOSS
from bench.workloads import DTYPES, WORKLOADS


@pytest.mark.parametrize("dtype", DTYPES)
def test_contestants_compute_the_same_gradients_of_the_generator(dtype):
    bench = StepBench(replace(WORKLOADS["digits"], batch=8), dtype)
    result = run(bench, FixedTimes())
    errors = {name: facts["error"] for name, facts in result["contestants"].items()}
    # All calls of this machine take as long.
    assert "generator 100.0 %, extractor 100.0 %, moments and loss 0.0 %, optimizer 100.0 %" in report.table(result)
    assert f"Images per second: {OURS} 8000.0" in report.table(result)
    assert set(errors) == {OURS, NO_LOSS, PLAIN, EAGER, ORIGINAL}
    assert all(error <= result["tolerance"] for error in errors.values()), errors


@pytest.mark.parametrize("name", ["gfmn", "molm"])
def test_steps_of_the_papers_agree(name, monkeypatch):
    monkeypatch.setitem(bench_step.MOLM, "width", 8)
    bench = StepBench(replace(WORKLOADS[name], batch=2), "float32")
    errors = {contestant: bench.entry(contestant).error() for contestant in (OURS, EAGER, ORIGINAL)}
    assert all(error <= bench.tolerance for error in errors.values()), errors
