"""A run: stage after stage within a budget of time, whatever happens in them."""

import gc
import importlib
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from bench.gpu.cases import BAD, NOT_RUN, OK, Case, Context
from bench.gpu.records import Record, Records
from bench.gpu.runner import Runner
from bench.gpu.stages import STAGES, Stage

# Kept for the summary at the end.
SUMMARY_SECONDS = 6.0
USABLE_SECONDS = 45.0
# Imported once, before processes are forked; the profiler imports inductor, too. None of them may touch the device, and
# not `torch._inductor.async_compile`, which starts processes.
PRELOADED = (
    "torch",
    "triton",
    "torch._inductor",
    "moment_ops",
    "bench.gpu.agreement",
    "bench.gpu.comparisons",
    "bench.gpu.kernel_times",
)
FINISHED = (OK, *BAD, "not_there")


def trusted(records: Iterable[Record]) -> frozenset[tuple[str, str, str]]:
    """(family, backend, dtype) that agreed with float64 in every smoke case that ran, one at least."""
    good, bad = set(), set()
    for record in records:
        if record.get("stage") != "smoke" or "backend" not in record.get("tags", {}):
            continue
        tags = record["tags"]
        key = (tags["family"], tags["backend"], tags["dtype"])
        if record["status"] == OK:
            good.add(key)
        elif record["status"] in BAD:
            bad.add(key)
    return frozenset(good - bad)


def device_names(records: Iterable[Record]) -> list[str]:
    """As torch and nvidia-smi call the device, one after another."""
    names = []
    for record in records:
        facts = record.get("facts") or {}
        if record.get("case") == "nvidia-smi":
            names.append(facts.get("name"))
        if record.get("case") == "library":
            probe = facts.get("as_built") or facts.get("as_found") or {}
            names.append(probe.get("device", {}).get("name"))
    return [name for name in names if name]


def _is_finished(record: Record) -> bool:
    """Whether a case need not run again. Another machine has another environment."""
    if "case" not in record or record["stage"] == "environment":
        return False
    return record.get("status") in FINISHED and not record.get("facts", {}).get("not_run")


class Session:
    """Runs stages and keeps their records.

    Args:
        seconds: for everything.
        earlier: records of runs that this one continues: what is finished does not run again.
        say: gets a line per stage, and one per failure.
    """

    def __init__(
        self, context: Context, records: Records, seconds: float, earlier: Sequence[Record], say: Any = print
    ) -> None:
        self.context, self.records, self.earlier, self.say = context, records, list(earlier), say
        self.end = time.monotonic() + seconds - SUMMARY_SECONDS
        self.method = "fork"
        self._finished = {(r["stage"], r["case"]) for r in earlier if _is_finished(r)}

    @property
    def all_records(self) -> list[Record]:
        return [*self.earlier, *self.records.written]

    def run(self, names: Sequence[str]) -> None:
        """Every stage leaves a record, also one that was skipped or could not start."""
        for name in names:
            start = time.monotonic()
            try:
                facts = self._stage(name, STAGES[name])
            except Exception as problem:
                facts = {"status": "failed", "error": f"{type(problem).__name__}: {problem}"}
            facts = {"stage": name, "seconds": round(time.monotonic() - start, 1), **facts}
            self.records.write(STAGES[name].file, facts)
            self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items() if key != "stage"))

    def _stage(self, name: str, stage: Stage) -> dict[str, Any]:
        left = self.end - time.monotonic()
        if left < stage.least:
            return {"status": NOT_RUN, "error": f"{max(left, 0):.0f} s are left, it needs {stage.least:g} at least"}
        if name != "environment":
            self._preload()
        context = replace(
            self.context,
            deadline=time.monotonic() + min(stage.most, left),
            trusted=trusted(self.all_records),
            tests_done=frozenset(r["test"] for r in self.earlier if "test" in r),
        )
        cases = [case for case in stage.cases(context) if (name, case.name) not in self._finished]
        counts: dict[str, int] = {}

        def save(case: Case, result: dict[str, Any]) -> None:
            record = {"stage": name, "case": case.name, **({"tags": dict(case.tags)} if case.tags else {}), **result}
            if "test" in result.get("facts", {}):
                record = {"stage": name, **result["facts"]}
            self.records.write(stage.file, record)
            status = record["status"]
            counts[status] = counts.get(status, 0) + 1
            if status in BAD:
                what = record.get("case", record.get("test"))
                self.say(f"  {what}: {status}: {str(record.get('error', ''))[:160]}")

        most = min(stage.side_by_side, max(len(os.sched_getaffinity(0)) - 2, 2))
        Runner(context, name, self.method, most, save).run(cases)
        if name == "environment":
            self._name_device()
        return {"status": "ended", **counts}

    def _name_device(self) -> None:
        """Every record from here on has the name of the device."""
        names = device_names(self.records.written)
        if names and "rehearsal" not in self.records.stamp:
            self.records.stamp["device"] = names[-1]

    def _preload(self) -> None:
        """Import what workers need, and find out whether a forked process can use the device."""
        if getattr(self, "_is_preloaded", False):
            return
        self._is_preloaded = True
        for name in PRELOADED:
            try:
                importlib.import_module(name)
            except ImportError as problem:
                self.say(f"{name} cannot be imported: {problem}")
        # Processes collect garbage before they time: not what was imported here.
        gc.collect()
        gc.freeze()
        if not self._is_usable("fork") and self._is_usable("spawn"):
            self.method = "spawn"
        self.say(f"processes are started by {self.method}")

    def _is_usable(self, method: str) -> bool:
        process = multiprocessing.get_context(method).Process(target=_computes, args=(self.context,))
        process.start()
        process.join(USABLE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode == 0


def _computes(context: Context) -> None:
    device = context.device()
    device.start()
    os._exit(0 if device.alive() else 1)
