"""The benchmarks run, judge results before they compare times, and write what the README shows."""

from pathlib import Path

import pytest
import torch

from bench import baselines, memory, report, results
from bench.bench_match import MatchBench
from bench.bench_moments import MomentsBench
from bench.harness import BOTH, COMPILED, OURS, Bench, Entry, measure
from bench.machine import Cpu, Probe, Sample
from bench.workloads import DTYPES, WORKLOADS

BENCHES = {"moments": MomentsBench, "match": MatchBench}


class FixedTimes(Cpu):
    """A machine whose calls all take a millisecond."""

    def begin(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def time(self, call) -> Sample:
        call()
        return Sample(1e-3)

    def probes(self, size: int) -> dict[str, Probe]:
        return {"read": Probe(lambda: None, 10**6), "read_write": Probe(lambda: None, 10**6)}

    def peak_memory(self, call) -> int | None:
        return None


def run(bench: Bench, machine=None, without: str = COMPILED):
    contestants = [name for name in bench.contestants if not name.startswith(without)]
    machine = machine or FixedTimes()
    return measure(bench, machine, seconds=0.0, repeat=2, contestants=contestants, say=lambda text: None)


@pytest.fixture(scope="module")
def result():
    return run(MatchBench(WORKLOADS["tiny"], "float32"), Cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", BENCHES)
def test_contestants_compute_the_same(operator: str, dtype: str) -> None:
    bench = BENCHES[operator](WORKLOADS["tiny"], dtype)
    result = run(bench)
    errors = {name: facts["error"] for name, facts in result["contestants"].items()}
    assert set(errors) == {name for name in bench.contestants if not name.startswith(COMPILED)}
    assert all(error <= result["tolerance"] for error in errors.values()), errors


def test_no_factor_for_a_wrong_contestant() -> None:
    class Wrong(MatchBench):
        def entry(self, contestant: str) -> Entry:
            entry = super().entry(contestant)
            return Entry(entry.calls, lambda: 1.0) if contestant == "original" else entry

    result = run(Wrong(WORKLOADS["tiny"], "float32"))
    factors = {name: report.time_over_ours(result, name) for name in result["contestants"]}
    assert factors.pop("original") == "not exact"
    assert set(factors.values()) == {"1.00x"}


def test_no_factors_when_ours_is_wrong() -> None:
    class Wrong(MatchBench):
        def entry(self, contestant: str) -> Entry:
            entry = super().entry(contestant)
            return Entry(entry.calls, lambda: float("nan")) if contestant == OURS else entry

    result = run(Wrong(WORKLOADS["tiny"], "float32"))
    assert not report.ours_agrees(result)
    assert "1.00x" not in report.table(result)


def test_wrong_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        baselines, "per_layer", lambda features: baselines.sums_of_squares([1.001 * x for x in features])
    )
    result = run(MatchBench(WORKLOADS["tiny"], "float32"))
    wrong = [name for name, facts in result["contestants"].items() if not facts["agrees"]]
    assert wrong == ["eager: mean, var"]


def test_results_make_a_round_trip(result, tmp_path: Path) -> None:
    environment = {"device": "A CPU, 2 cores"}
    path = results.save(result, environment, results.device_folder(environment, tmp_path))
    assert path == tmp_path / "a-cpu-2-cores" / "match-tiny-float32.json"
    (loaded,) = results.load(path.parent)
    assert loaded == {"environment": environment, **result}
    assert loaded["directions"][BOTH]["contestants"][OURS]["pytorch_calls"] >= 2


def test_readme_section(result, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert "does not exist" in report.replace_section(readme, "new")
    readme.write_text("no markers")
    assert "has no" in report.replace_section(readme, "new")
    readme.write_text(f"before {report.BEGIN} old {report.END} after")
    for text in ("first", report.table(result)):
        assert report.replace_section(readme, text) is None
        assert readme.read_text() == f"before {report.BEGIN}\n{text}\n{report.END} after"


def test_plots(result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import save_plots

    (path,) = save_plots([result], tmp_path)
    assert path.name == "match.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_peak_memory() -> None:
    """The peak of a call counts what it frees before it returns, and nothing that was there before."""
    size = 64 * 2**20
    kept = torch.ones(size // 4)
    peak = memory.peak_over_rest(lambda: torch.ones(size // 4).sum() + kept.sum())
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.95 * size < peak < 1.25 * size
