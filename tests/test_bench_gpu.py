"""The run on a GPU, rehearsed without one: what fails is recorded, what follows still runs, nothing is claimed."""

import copy
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import (
    comparisons,
    records,
    rehearsal,
    report,
    session,
    summary,
)
from bench.gpu.cases import CRASHED, FAILED, HUNG, NOT_RUN, NOT_THERE, OK, WRONG
from bench.gpu.operators import OPERATORS
from bench.gpu.stages import STAGES
from bench.results import BOTH, ON_BACKEND, OURS

ROOT = Path(__file__).parents[1]
VARIABLES = {**os.environ, "PYTHONPATH": str(ROOT)}
MOST_FILES, MOST_BYTES, MOST_CHARACTERS = 6, 16 << 20, 12_000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One rehearsal of everything, whatever the number of processes of pytest: its folder, records and printed text."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, printed = base / "rehearsal", base / "rehearsal.txt"
    with (base / "rehearsal.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            command = [sys.executable, "-m", "bench.gpu", "--rehearse", f"--output={folder}", "--seconds=400"]
            ended = subprocess.run(command, cwd=ROOT, env=VARIABLES, capture_output=True, text=True, timeout=450)
            printed.write_text(ended.stdout or ended.stderr)
    return SimpleNamespace(folder=folder, records=list(records.read([folder])), text=printed.read_text())


def cases(run, stage):
    """Ended cases by name."""
    found = [r for r in run.records if r.get("stage") == stage and "case" in r and r["status"] != "so far"]
    assert len({r["case"] for r in found}) == len(found), "a case ended twice"
    return {r["case"]: r for r in found}


def of(cases, start):
    (case,) = [record for name, record in cases.items() if name.startswith(start)][:1]
    return case


def test_every_stage_ran_in_its_order(run):
    ended = [r for r in run.records if "seconds" in r and "case" not in r and "test" not in r and r["stage"] != "run"]
    written = {r["stage"]: r for r in ended}
    assert set(written) == set(STAGES), run.text
    assert all(r["status"] == "ended" for r in ended), ended
    printed = [line.partition(":")[0] for line in run.text.splitlines() if ": seconds " in line]
    assert printed == list(STAGES)


def test_every_operator_was_tried_on_every_backend_and_dtype(run):
    smoke = [r for r in cases(run, "smoke").values() if "tags" in r]
    assert {r["case"].partition(": ")[0] for r in smoke} == set(OPERATORS)
    tags = {(r["tags"]["family"], r["tags"]["backend"], r["tags"]["dtype"]) for r in smoke}
    wanted = {(o.family, b, d) for o in OPERATORS.values() for b in rehearsal.STAND_INS for d in o.dtypes}
    assert tags == wanted
    assert not [r for r in smoke if r["status"] in (NOT_RUN, NOT_THERE)]


FAILURES = {
    "identity_moments: triton": (FAILED, "an exception of the rehearsal"),
    "relu_moments, bias: reference": (CRASHED, "SIGSEGV"),
    "style_loss: reference": (FAILED, rehearsal.DEVICE_ERROR),
    "MomentLoss, moving, means alone: reference": (HUNG, "no end after 2 s"),
    "covariance_distance, gram: triton": (WRONG, "times the bound"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_each_kind_is_recorded_with_its_place(run, name):
    status, error = FAILURES[name]
    record = of(cases(run, "smoke"), name)
    assert record["status"] == status
    assert error in record["error"]
    if status != WRONG:
        assert "rehearsal.py" in "".join(record.get("traceback") or record["log"])


def test_after_a_crash_a_hang_and_a_dead_device_the_others_still_run(run):
    for stage in ("smoke", "syncs", "graphs"):
        mine = [r for r in cases(run, stage).values() if r.get("tags", {}).get("backend") == "reference"]
        ends = [r["status"] for r in mine]
        assert {CRASHED, HUNG, FAILED, OK} <= set(ends)
        assert NOT_RUN not in ends
        assert OK in ends[ends.index(CRASHED) :]
        assert OK in ends[ends.index(HUNG) :]
        dead = [i for i, r in enumerate(mine) if rehearsal.DEVICE_ERROR in r.get("error", "")]
        # What comes next fails by itself, not by the device.
        assert "an exception of the rehearsal" in mine[dead[-1] + 1]["error"]
    assert of(cases(run, "overhead"), "mean and var, 1 layer")["status"] == CRASHED
    assert of(cases(run, "overhead"), "mean and var, 32 layers")["status"] == OK


def test_a_missing_tool_is_named(run):
    assert cases(run, "environment")["nvcc"]["error"] == "missing tool: nvcc"
    assert cases(run, "environment")["gcc"]["status"] == OK


def test_factors_are_withheld_where_smoke_did_not_agree(run):
    trusted = session.trusted(run.records)
    assert not [key for key in trusted if key[:2] == ("gram", "triton")]
    kernels = cases(run, "kernels")
    gram = [r for name, r in kernels.items() if name.startswith("gram") and "triton" in name]
    assert gram
    assert all(r["status"] == NOT_THERE and "not seen to agree" in r["error"] for r in gram)
    facts = of(cases(run, "comparisons"), "gram")["facts"]
    assert "triton" in facts["withheld"]
    assert "triton" not in facts["backends"].values()
    assert not any(name.startswith(ON_BACKEND) for name in facts["factors"])
    assert facts["factors"]
    match = of(cases(run, "comparisons"), "match")["facts"]
    assert match["backends"] == {OURS: "cuda", f"{ON_BACKEND}triton": "triton"}


def test_what_agreed_is_timed_as_called_and_as_a_graph(run):
    for record in cases(run, "comparisons").values():
        contestants = record["facts"]["result"]["directions"][BOTH]["contestants"]
        assert contestants[OURS]["median_ms"] > 0
        assert contestants[OURS]["replayed"]["median_ms"] > 0
    timed = [r["facts"] for r in cases(run, "kernels").values() if r["status"] == OK]
    assert len(timed) >= 10
    assert all(facts["clocks"]["driver_version"] == "none" for facts in timed)
    assert all(facts["us"] > 0 and facts["copy_gb_per_s"] > 0 and "copy" in facts["times"] for facts in timed)
    assert all(
        len(r["facts"]["times"]["torch.mm"]["samples_ms"]) == 2
        for n, r in cases(run, "kernels").items()
        if "d8192" in n
    )


OUTCOMES = {
    "test_that_passes": OK,
    "test_that_fails": FAILED,
    "test_that_is_skipped": "skipped",
    "test_that_crashes": CRASHED,
    "test_that_hangs": HUNG,
    "test_whose_device_dies": FAILED,
    "test_that_comes_last": OK,
}


def test_tests_are_recorded_one_by_one_and_outlive_the_process_of_some(run):
    outcomes = {r["test"].rpartition("::")[2]: r["status"] for r in run.records if "test" in r}
    assert outcomes == OUTCOMES
    assert cases(run, "tests")["tests/gpu"]["facts"]["not_run"] == 0


def test_tools_have_verdicts(run):
    tools = cases(run, "sanitizer")
    assert tools["memcheck: cuda"]["facts"]["verdict"] == "ERROR SUMMARY: 0 errors"
    assert re.match(r"[1-9]\d* of \d+ calls ran", tools["memcheck: cuda"]["facts"]["program"])
    assert tools["racecheck: cuda"]["status"] == WRONG
    assert "1 hazard" in tools["racecheck: cuda"]["error"]
    assert tools["ncu: cuda"]["facts"]["kernels"][0]["us"] == 1.0
    assert tools["ncu: triton"]["status"] == FAILED


def test_files_keep_within_the_limits(run):
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) <= MOST_FILES
    assert all(path.parent == run.folder and path.stat().st_size <= MOST_BYTES for path in files)


def test_nothing_claims_a_gpu(run):
    assert all(r["rehearsal"] and r["device"] == rehearsal.STAMP for r in run.records)
    page = (run.folder / "summary.txt").read_text()
    headings = [line for line in page.splitlines() if line.startswith("== ")]
    assert len(headings) == len(summary.SECTIONS) + 1
    assert all(rehearsal.STAMP in line.lower().replace("no gpu", "no GPU") for line in headings)


def test_the_page_fits_and_ends_the_output(run):
    page = (run.folder / "summary.txt").read_text()
    assert len(page) <= MOST_CHARACTERS
    assert run.text.rstrip().endswith(page.rstrip())
    assert "this section failed" not in page
    for told in (
        "missing tool: nvcc",
        "signal SIGSEGV",
        "no end after 2 s",
        "2 ok, 2 failed, 1 crashed, 1 hung, 1 skipped",
    ):
        assert told in page


def test_a_rehearsal_makes_no_results(run, tmp_path):
    with pytest.raises(SystemExit, match=rehearsal.STAMP):
        report.write([run.folder], plots=False)
    folder = report.write([run.folder], tmp_path / "page", plots=False)
    page = (folder / "README.md").read_text()
    assert page.startswith(f"# {rehearsal.STAMP}")
    tables = re.findall(r"^\*\*`.*", page, re.MULTILINE)
    assert len(tables) == len(cases(run, "comparisons"))
    assert all("REHEARSAL, NO GPU" in line for line in tables)
    assert "as a graph, ms" in page
    assert (folder / report.RAW / "1-smoke.jsonl").read_text() == (run.folder / "smoke.jsonl").read_text()


def test_no_factors_where_ours_is_wrong_and_none_over_a_wrong_rival(run):
    result = copy.deepcopy(of(cases(run, "comparisons"), "match")["facts"]["result"])
    assert "original" in comparisons.factors(result)
    result["contestants"]["original"]["agrees"] = False
    assert "original" not in comparisons.factors(result)
    result["contestants"][OURS]["agrees"] = False
    assert comparisons.factors(result) == {}
