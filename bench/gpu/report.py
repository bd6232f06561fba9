"""`python -m bench.gpu report FOLDER...`: raw records kept, tables and plots beside them, in bench/results/<device>."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report, results
from bench.gpu import summary
from bench.gpu.records import Record, read
from bench.gpu.session import device_names

RAW = "raw"


def environment_of(records: Sequence[Record]) -> dict[str, Any]:
    """The environment as results of the CPU have it, of the GPU that the records tell of."""
    described: dict[str, Any] = {}
    commit = None
    for record in records:
        if record.get("stage") == "run":
            commit = record.get("commit") or commit
        facts = record.get("facts") or {}
        if record.get("case") == "library":
            probe = facts.get("as_built") or facts.get("as_found") or {}
            described = probe.get("environment") or described
    devices = device_names(records)
    if not described or not devices:
        sys.exit("the records do not say where they were made: there is no environment among them")
    rehearsed = any(record.get("rehearsal") for record in records)
    if len(set(devices)) > 1 and not rehearsed:
        sys.exit(f"the records are of several devices, {', '.join(sorted(set(devices)))}: report them one by one")
    device = summary.REHEARSAL if rehearsed else devices[0]
    if commit not in (None, "unknown"):
        described = described | {"commit": commit}
    return described | {"device": device}


def comparisons(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Results of contestants; of a case that ended early what it had until then."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.get("stage") == "comparisons" and "result" in (record.get("facts") or {}):
            result = dict(record["facts"]["result"])
            if record.get("rehearsal"):
                result["title"] = f"{summary.REHEARSAL.upper()}: {result['title']}"
            found[record["case"]] = result
    return list(found.values())


def write(folders: Sequence[Path], output: Path | None = None, plots: bool = True) -> Path:
    """Make the folder of a device; its path."""
    records = list(read(folders))
    environment = environment_of(records)
    if output is None and any(record.get("rehearsal") for record in records):
        sys.exit(f"{summary.REHEARSAL}: these are no results; --output makes a page of them all the same")
    folder = output or results.device_folder(environment)
    for number, source in enumerate(folders):
        for file in sorted(source.glob("**/*.jsonl")) if source.is_dir() else [source]:
            target = folder / RAW / f"{number + 1}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for result in comparisons(records):
        results.save(result, environment, folder)
    (folder / "README.md").write_text(_page(records, environment, folder, plots))
    return folder


def _page(records: Sequence[Record], environment: dict[str, Any], folder: Path, plots: bool) -> str:
    all_results = results.load(folder)
    if not all_results:
        page = f"# {environment['device']}\n"
    elif plots:
        from bench.plot import save_plots

        page = report.full(all_results, [path.name for path in save_plots(all_results, folder)])
    else:
        page = report.full(all_results)
    return f"{page}\n## The run\n\n```\n{summary.page(records)}```\n\nAll records: [{RAW}]({RAW}).\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu report", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="of the records of a run, or of several in their order")
    parser.add_argument("--output", type=Path, help="folder (default: bench/results/<device>)")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    print(write(options.folder, options.output, not options.no_plots))
