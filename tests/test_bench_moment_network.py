"""The benchmark of MoLM's generator step: its contestants agree, and its parts are timed one by one."""

import pytest
from test_bench import FixedTimes, run

from bench import report
from bench.bench_moment_network import PARTS, MomentNetworkBench
from bench.harness import OURS
from bench.workloads import DTYPES, WORKLOADS


@pytest.mark.parametrize("dtype", DTYPES)
def test_contestants_compute_the_same_gradients_of_the_images(dtype):
    result = run(MomentNetworkBench(WORKLOADS["tiny"], dtype), FixedTimes())
    errors = {name: facts["error"] for name, facts in result["contestants"].items()}
    assert len(errors) == 3
    assert all(error <= result["tolerance"] for error in errors.values()), errors


def test_the_table_has_a_row_for_every_part():
    result = run(MomentNetworkBench(WORKLOADS["tiny"], "float32"), FixedTimes())
    table = report.table(result)
    for part in PARTS:
        assert OURS in result["directions"][part]["contestants"]
        assert f"| {part} | 1.00 | 1.00 |" in table


def test_the_workload_has_the_published_layers():
    workload = WORKLOADS["molm"]
    assert workload.columns == 4_874_368
    bench = MomentNetworkBench(WORKLOADS["tiny"], "float32")
    assert len(bench.workload.shapes) == len(bench.target.names)
