"""What the run on a GPU is made of: its supervisor, its records, its page, and what it makes of odd machines."""

import gc
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_bench_gpu import MOST_CHARACTERS, OUTCOMES, ROOT, VARIABLES

from bench.gpu import (
    agreement,
    comparisons,
    environment,
    records,
    rehearsal,
    runner,
    sanitizer,
    session,
    stages,
    suite,
    summary,
)
from bench.gpu.cases import CRASHED, FAILED, HUNG, NOT_RUN, OK, Case, Context, NotThere, Wrong
from bench.gpu.exactness import Close, compare
from bench.gpu.operators import DTYPES, OPERATORS, SIZES
from bench.gpu.runner import Runner
from bench.gpu.stages import STAGES, Stage
from bench.gpu.tools import Ended
from bench.machine import Replay
from bench.results import OURS

# The profiler is asked for kernels all the same.
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")


def make_context(tmp_path, **options):
    return Context(True, tmp_path, tmp_path, **options)


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A rehearsed one, started as in a process of its own."""
    monkeypatch.setattr(torch, "compile", torch.compile)
    threads = torch.get_num_threads()
    device = make_context(tmp_path).device()
    device.start()
    yield device
    torch.set_num_threads(threads)


def make_session(tmp_path, seconds=0.0, earlier=()):
    kept = records.Records(tmp_path / "out", {})
    return session.Session(make_context(tmp_path), kept, seconds, earlier, say=lambda text: None), kept


def test_what_does_not_fit_is_skipped_and_said(tmp_path):
    made, kept = make_session(tmp_path)
    made.run(list(STAGES))
    assert [r["stage"] for r in kept.written] == list(STAGES)
    assert all(r["status"] == NOT_RUN and "0 s are left" in r["error"] for r in kept.written)


def fake_stage(monkeypatch, made):
    """A stage of cases that need no device; forked processes know it, too."""
    stage = Stage("fake.jsonl", 0, 60, lambda context: made, needs_device=False, side_by_side=2)
    monkeypatch.setitem(stages.STAGES, "fake", stage)
    monkeypatch.setattr(rehearsal, "prepared", list)
    monkeypatch.setattr(session.Session, "_preload", lambda made: None)
    return stage


def test_a_run_that_goes_on_repeats_nothing_that_ended(tmp_path, monkeypatch):
    fake_stage(monkeypatch, [Case(name, lambda tools, emit: {}) for name in ("done", "was not run", "new")])
    earlier = [
        {"stage": "fake", "case": "done", "status": FAILED},
        {"stage": "fake", "case": "was not run", "status": NOT_RUN},
    ]
    made, kept = make_session(tmp_path, 60.0, earlier)
    made.run(["fake"])
    assert {r["case"] for r in kept.written if "case" in r} == {"was not run", "new"}


def test_a_stage_that_cannot_begin_is_a_failure_and_no_end(tmp_path, monkeypatch):
    def broken(context):
        raise ImportError("no such module")

    stage = fake_stage(monkeypatch, [])
    monkeypatch.setitem(stages.STAGES, "broken", Stage(stage.file, 0, 60, broken))
    made, kept = make_session(tmp_path, 60.0)
    made.run(["broken", "fake"])
    assert [r["status"] for r in kept.written] == ["failed", "ended"]
    assert "no such module" in kept.written[0]["error"]


def run_cases(tmp_path, monkeypatch, made, seconds=30.0):
    """What a runner saves of cases: (name, status, error)."""
    fake_stage(monkeypatch, made)
    saved = []
    context = make_context(tmp_path, deadline=time.monotonic() + seconds)
    Runner(context, "fake", "fork", 2, lambda case, result: saved.append((case.name, result))).run(made)
    return {name: result for name, result in saved if result["status"] != "so far"}


def test_a_stage_ends_at_its_time(tmp_path, monkeypatch):
    def slow(tools, emit):
        time.sleep(60)

    made = [
        Case("quick", lambda tools, emit: {}),
        Case("slow", slow),
        Case("later", slow),
        Case("beside", slow, shard="b"),
    ]
    start = time.monotonic()
    results = run_cases(tmp_path, monkeypatch, made, seconds=2.0)
    assert time.monotonic() - start < 10
    assert {name: result["status"] for name, result in results.items()} == {
        "quick": OK,
        "slow": NOT_RUN,
        "later": NOT_RUN,
        "beside": NOT_RUN,
    }


def test_processes_that_do_not_start_are_given_up_with_their_last_words(tmp_path, monkeypatch):
    def end_at_once(context):
        print("this machine has no luck", flush=True)
        os._exit(3)

    monkeypatch.setattr(Stage, "worker", lambda stage, context: end_at_once(context))
    results = run_cases(tmp_path, monkeypatch, [Case("first", lambda t, e: {}), Case("second", lambda t, e: {})])
    assert results["first"]["status"] == CRASHED
    assert results["first"]["log"] == ["this machine has no luck"]
    assert results["second"]["status"] == NOT_RUN


def test_processes_that_hang_before_their_cases_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "START_SECONDS", 0.3)
    monkeypatch.setattr(Stage, "worker", lambda stage, context: time.sleep(600))
    start = time.monotonic()
    results = run_cases(tmp_path, monkeypatch, [Case("first", lambda t, e: {}), Case("second", lambda t, e: {})])
    assert time.monotonic() - start < 20
    assert [results[name]["status"] for name in ("first", "second")] == [CRASHED, NOT_RUN]


def test_a_case_after_one_that_ended_late_is_not_the_one_that_hung(tmp_path, monkeypatch):
    """The end of the one and the begin of the other may arrive when the supervisor has decided to end the process."""
    made = [Case("late", lambda t, e: time.sleep(0.6), seconds=0.5), Case("next", lambda t, e: time.sleep(0.5))]
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.0)
    listen = Runner._listen
    monkeypatch.setattr(Runner, "_listen", lambda made: (listen(made), time.sleep(0.3)))
    results = run_cases(tmp_path, monkeypatch, made)
    assert results["late"]["status"] in (OK, HUNG)
    assert results["next"]["status"] == OK


def test_without_xdist_pytest_is_started_again_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    tools = rehearsal.RehearsedTools(make_context(tmp_path, tests_done=frozenset({"an earlier test"})))
    outcomes, starts = {}, []
    commands = suite._command
    monkeypatch.setattr(suite, "_command", lambda tools: starts.append(1) or commands(tools))
    facts = suite._suite(tools, lambda line: outcomes.update({line["test"].rpartition("::")[2]: line["status"]}))
    assert outcomes == OUTCOMES
    # After the crash, the hang and the dead device.
    assert len(starts) == 4
    assert "-n" not in commands(tools)
    assert facts["tests"] == len(OUTCOMES)
    assert facts["not_run"] == 0


def test_tests_that_ran_at_the_end_of_the_time_have_not_crashed(tmp_path, monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    tools = rehearsal.RehearsedTools(make_context(tmp_path, deadline=time.monotonic() + 6))
    outcomes = {}
    facts = suite._suite(tools, lambda line: outcomes.update({line["test"].rpartition("::")[2]: line["status"]}))
    assert "test_that_hangs" not in outcomes
    assert facts["not_run"] >= 3
    assert "stopped after" in facts["pytest"][-1]


def test_what_a_crashed_case_started_ends_with_it(tmp_path, monkeypatch):
    def crash(tools, emit):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        emit({"child": child.pid})
        os.kill(os.getpid(), signal.SIGKILL)

    fake_stage(monkeypatch, [Case("crash", crash)])
    saved = []
    context = make_context(tmp_path, deadline=time.monotonic() + 30)
    Runner(context, "fake", "fork", 1, lambda case, result: saved.append(result)).run([Case("crash", crash)])
    assert saved[-1]["status"] == CRASHED
    deadline = time.monotonic() + 10
    while suite._lives(saved[0]["facts"]["child"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not suite._lives(saved[0]["facts"]["child"])


def test_the_supervisor_starts_without_torch_and_without_the_library():
    code = "import sys, bench.gpu.command_line; sys.exit('torch' in sys.modules or 'moment_ops' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=VARIABLES).returncode == 0


def test_the_supervisor_leaves_the_device_to_its_processes(tmp_path, monkeypatch):
    """A process that has a context of CUDA cannot be forked."""

    def touched(*arguments, **keywords):
        raise AssertionError("the supervisor touched the device")

    for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    made, _ = make_session(tmp_path)
    monkeypatch.setattr(made, "_is_usable", lambda method: True)
    made._preload()
    gc.unfreeze()
    for stage in STAGES.values():
        made_cases = stage.cases(Context(False, tmp_path, tmp_path))
        assert len({case.name for case in made_cases}) == len(made_cases) > 0


@pytest.mark.parametrize(
    ("fork", "spawn", "method"), [(True, True, "fork"), (False, True, "spawn"), (False, False, "fork")]
)
def test_processes_are_spawned_where_forked_ones_cannot_use_the_device(tmp_path, monkeypatch, fork, spawn, method):
    monkeypatch.setattr(session, "PRELOADED", ())
    made, _ = make_session(tmp_path)
    monkeypatch.setattr(made, "_is_usable", {"fork": fork, "spawn": spawn}.__getitem__)
    made._preload()
    gc.unfreeze()
    assert made.method == method


def test_spawned_processes_run_cases(tmp_path):
    context = Context(False, tmp_path, tmp_path, deadline=time.monotonic() + 60)
    (machine,) = [case for case in STAGES["environment"].cases(context) if case.name == "machine"]
    saved = []
    Runner(context, "environment", "spawn", 1, lambda case, result: saved.append(result)).run([machine])
    assert saved[0]["facts"]["packages"]["torch"] == torch.__version__


def test_the_rehearsed_cuda_has_the_names_and_arguments_of_the_real_one():
    for name, value in vars(rehearsal.RehearsedCuda).items():
        if name.startswith("_"):
            continue
        real = getattr(torch.cuda, name)
        if inspect.isfunction(value):
            ours = list(inspect.signature(value).parameters)[1:]
            assert ours == list(inspect.signature(real).parameters)[: len(ours)], name
        elif inspect.isclass(value):
            assert all(hasattr(real, method) for method in vars(value) if not method.startswith("_")), name


def test_only_names_of_the_real_cuda_are_used():
    sources = [*(ROOT / "bench" / "gpu").glob("*.py"), ROOT / "bench" / "machine.py"]
    names = {name for path in sources for name in re.findall(r"\b(?:self|device)\.cuda\.(\w+)", path.read_text())}
    assert {"Event", "CUDAGraph", "graph", "Stream", "set_sync_debug_mode"} <= names
    assert all(hasattr(torch.cuda, name) for name in names)
    # What the rehearsal does not run.
    assert "stream" in inspect.signature(torch.cuda.graph.__init__).parameters
    assert hasattr(torch.cuda.CUDAGraph, "replay")


def test_what_cannot_be_captured_is_called_and_says_why(device, monkeypatch):
    device.prepare()

    def record(call, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert "not_captured" not in device.replayed({"call": [lambda: None]}, 0.0)["call"]
    monkeypatch.setattr(device, "record", record)
    times = device.replayed({"call": [lambda: None, lambda: None]}, 0.0)["call"]
    assert times["not_captured"] == "RuntimeError: operation not permitted when stream is capturing"
    assert times["median_ms"] >= 0


def test_replays_that_differ_from_the_call_are_wrong(device, monkeypatch):
    arguments = (device, OPERATORS["moments"], "cuda", "float32", "odd")
    agreement._is_captured(*arguments)
    monkeypatch.setattr(device, "record", lambda call, stream, kept=[]: Replay(lambda: None, lambda: shifted(call())))

    def shifted(results):
        return {name: Close(result.value.detach() + 1e-6, result.terms) for name, result in results.items()}

    with pytest.raises(Wrong, match="replay 0 differs"):
        agreement._is_captured(*arguments)


def test_a_comparison_without_a_backend_that_agreed_is_withheld(device):
    with pytest.raises(NotThere, match="not seen to agree"):
        comparisons._compare(device, lambda facts: None, comparisons.ALL[0])


def test_a_backend_that_fails_in_a_bench_leaves_the_others_to_be_compared(device, tmp_path, monkeypatch):
    trusted = frozenset(("match", backend, "float32") for backend in rehearsal.STAND_INS)
    device.context = make_context(tmp_path, trusted=trusted)
    entry = comparisons.OnBackends.entry

    def failing(bench, contestant):
        if bench.backends.get(contestant) == "cuda":
            raise RuntimeError("no resources")
        return entry(bench, contestant)

    monkeypatch.setattr(comparisons.OnBackends, "entry", failing)
    facts = comparisons._compare(device, lambda facts: None, comparisons.ALL[0])
    assert facts["backends"] == {OURS: "triton"}
    assert "cuda: RuntimeError: no resources" in facts["said"]
    assert facts["factors"]


@pytest.mark.parametrize("value", [1 + 1e-3, float("nan"), float("inf")])
def test_a_wrong_number_among_right_ones_is_found(value):
    exact = {"a": Close(torch.ones(9, dtype=torch.float64)), "b": Close(torch.ones(9, dtype=torch.float64))}
    right = {"a": Close(torch.ones(9)), "b": Close(torch.ones(9))}
    assert compare(right, exact, torch.float32)["worst"] == 0
    right["b"].value[4] = value
    with pytest.raises(Wrong, match="in b"):
        compare(right, exact, torch.float32)


def test_sizes_have_rows_that_are_split_and_layers_beyond_a_launch():
    assert max(rows for rows, _ in SIZES.values()) > 1024
    assert max(len(shapes) for _, shapes in SIZES.values()) > 64
    assert set(DTYPES.values()) == {torch.float32, torch.bfloat16, torch.float16, torch.float64}


class Scripted:
    """Tools whose programs end as they are told: probes and builds by turns."""

    def __init__(self, *texts, force_build=False):
        self.context = SimpleNamespace(force_build=force_build)
        self.texts, self.commands = list(texts), []

    def module(self, *arguments):
        return list(arguments)

    def build_command(self):
        return ["build"]

    def seconds(self, most):
        return most

    def which(self, tool):
        return tool

    def run(self, command, seconds, environment=None):
        self.commands.append(command[0])
        text = self.texts.pop(0)
        return Ended(-11 if text is None else 0, text or "", 0.1)


LOADS = json.dumps({"unavailable": {}})
NO_CUDA = json.dumps({"unavailable": {"cuda": "built without CUDA kernels"}})


def test_a_library_that_loads_is_not_built_again():
    tools = Scripted(LOADS)
    facts = environment._library(tools, lambda facts: None)
    assert facts["as_found"] == {"unavailable": {}}
    assert tools.commands == ["bench.gpu.probe"]


@pytest.mark.parametrize("first", [None, NO_CUDA, "no JSON"])
def test_a_library_that_does_not_load_is_built(first):
    tools = Scripted(first, "compiled", LOADS)
    facts = environment._library(tools, lambda facts: None)
    assert tools.commands == ["bench.gpu.probe", "build", "bench.gpu.probe"]
    assert facts["as_built"] == {"unavailable": {}}
    assert ("signal SIGSEGV" in str(facts["as_found"])) == (first is None)


def test_a_library_that_never_loads_is_set_aside(monkeypatch, tmp_path):
    (tmp_path / "moment_ops").mkdir()
    (tmp_path / "moment_ops" / "_C.abi3.so").write_text("crashes")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    with pytest.raises(Wrong, match="set aside"):
        environment._library(Scripted(None, "", None), lambda facts: None)
    assert not list((tmp_path / "moment_ops").glob("*.so"))


def test_a_build_without_cuda_kernels_is_wrong():
    with pytest.raises(Wrong, match="built without CUDA kernels"):
        environment._library(Scripted(NO_CUDA, "", NO_CUDA), lambda facts: None)


def test_a_driver_that_refuses_a_long_query_gets_a_short_one():
    tools = Scripted('Field "mig.mode.current" is not a valid field to query.', "NVIDIA H0, 1.0, 345 MHz, 3201 MHz\n")
    assert environment.clocks(tools)["clocks.mem"] == "3201 MHz"
    with pytest.raises(RuntimeError, match="nvidia-smi: signal SIGSEGV"):
        environment.clocks(Scripted(None, None))


def test_counters_are_read_from_between_other_output():
    name = '"void moment_ops::moments_kernel<float, 4>(moment_ops::Arguments)"'
    metrics = ",".join(f'"{metric}"' for metric in sanitizer.METRICS)
    text = f'==PROF== Connected\nprinted\n"ID","Kernel Name","Grid Size",{metrics}\n'
    text += '"","","","ns","%","byte","byte","%",""\n'
    text += f'"0",{name},"(132, 1, 1)","71,234","88.5","218,103,808","n/a","74.1","48"\n==PROF== Disconnected\n'
    (kernel,) = sanitizer.parse_ncu(text)
    assert kernel["kernel"] == "void moment_ops::moments_kernel<float, 4>"
    assert kernel["us"] == 71.23
    assert kernel["MB read"] == 218.1
    assert "MB written" not in kernel


def test_a_full_file_gets_short_records_and_then_none(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_BYTES", 3000)
    monkeypatch.setattr(records, "RESERVED_BYTES", 1000)
    kept = records.Records(tmp_path, {})
    for i in range(40):
        kept.write("a.jsonl", {"number": i, "samples": list(range(100)), "text": "x" * 900})
    kept.write("b.jsonl", {"number": 40})
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[0]["samples"] == list(range(100))
    assert lines[1]["samples"] == 100
    assert len(lines[1]["text"]) <= 200
    assert (tmp_path / "a.jsonl").stat().st_size <= 3000
    assert 2 < len(lines) < 40
    assert kept.full == ["a.jsonl"]
    assert len(kept.written) == 41


def test_long_texts_lose_their_middle():
    assert records.cut_middle("short") == "short"
    cut = records.cut_middle("a" * 5000 + "b" * 5000, 1000)
    assert len(cut) <= 1000
    assert cut.startswith("aaa")
    assert cut.endswith("bbb")
    assert "9" in cut


def test_a_line_that_was_cut_off_is_no_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"stage": "smoke"}\n{"stage": "smo')
    assert list(records.read([tmp_path])) == [{"stage": "smoke"}]


def test_a_flood_of_failures_leaves_room_for_what_matters():
    def failed(stage, i, **tags):
        tags = {"family": "moments", "backend": "cuda", "dtype": "float32"} | tags
        error = f"RuntimeError: {'long ' * 60}{i}"
        return {"stage": stage, "case": f"operator {i}: cuda", "status": FAILED, "error": error, "tags": tags}

    flood = [failed(stage, i) for stage in ("smoke", "syncs", "graphs", "overhead", "comparisons") for i in range(600)]
    flood += [
        {"stage": "tests", "test": f"a/test_b.py::test_{i}[x]", "status": FAILED, "error": "y" * 300}
        for i in range(900)
    ]
    facts = {"us": 70.0, "share_of_copy": 0.9, "copy_gb_per_s": 4300.0, "factors": {}, "target": "<= 69 us (H200)"}
    kernel = {"stage": "kernels", "case": "match, forward: cuda, gfmn, float32", "status": OK, "facts": facts}
    page = summary.page([*flood, kernel])
    assert len(page) <= MOST_CHARACTERS
    assert "match, forward, gfmn, float32: cuda 70.0 us 90 %  [<= 69 us (H200)]" in page
    assert page.index("600 failed") < page.index("match, forward")


def test_an_odd_record_costs_its_section_alone():
    page = summary.page([{"stage": "overhead", "case": "a: cuda", "status": OK, "facts": {"strange": 1}}])
    assert "this section failed: KeyError" in page
    assert "== environment" in page
