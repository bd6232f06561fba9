"""`python -m bench.training`: compare trainings with several options and seeds, which take the same time.

By default it compares GFMN with and without `--covariance 3`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import environment, results
from bench.isolation import isolated
from moment_ops.training.metrics import read_metrics
from moment_ops.training.runs import METRICS

CURVE_STEPS = 300
VARIANTS = ("mean and variance:", "with --covariance 3: --covariance 3")


def train(method: str, arguments: list[str], seed: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Train in a process of its own; steps and Frechet distances on the way and at the end."""
    run = folder / f"{method}-{'-'.join(arguments) or 'default'}-{seed}".replace(" ", "")
    command = [sys.executable, "-m", "moment_ops", "train", method, f"--run-dir={run}"]
    options = [f"--seed={seed}", f"--seconds={seconds}", "--steps=1000000", f"--evaluate-every={CURVE_STEPS}"]
    subprocess.run([*command, *options, *arguments], check=True, capture_output=True, text=True)
    lines = [line for line in read_metrics(run / METRICS) if "frechet_distance" in line]
    return {
        "seed": seed,
        "steps": lines[-1]["step"],
        "seconds": round(lines[-1]["seconds"], 1),
        "frechet_distance": round(lines[-1]["frechet_distance"], 3),
        "held_out": round(lines[-1]["held_out_frechet_distance"], 3),
        "curve": [[line["step"], round(line["frechet_distance"], 2)] for line in lines],
    }


def at(run: dict[str, Any], step: int) -> float | None:
    """The distance at a step of the curve, if the run came so far."""
    return next((distance for s, distance in run["curve"] if s == step), None)


def table(result: dict[str, Any], early: int = 3 * CURVE_STEPS) -> str:
    """One row per variant: distances at the end, seed by seed, and early on."""
    rows = [f"| | steps | Frechet distance, seed by seed | median | after {early} steps |", "|---|---:|---|---:|---|"]
    for name, runs in result["variants"].items():
        ends = [run["frechet_distance"] for run in runs]
        first = [distance for run in runs if (distance := at(run, early)) is not None]
        rows.append(
            f"| {name} | {statistics.median(run['steps'] for run in runs):.0f}"
            f" | {', '.join(f'{end:.1f}' for end in ends)} | {statistics.median(ends):.1f}"
            f" | {', '.join(f'{distance:.1f}' for distance in first)} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description="Compare trainings with several options and seeds, which take the same time.",
    )
    parser.add_argument("--name", default="gfmn-covariance", help="name of the result (default: gfmn-covariance)")
    parser.add_argument("--method", default="gfmn", choices=("gfmn", "molm"), help="method (default: gfmn)")
    parser.add_argument("--seconds", type=float, default=70.0, metavar="X", help="time of each training (default: 70)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default: 3)")
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME:OPTIONS",
        help="name and options of `moment-ops train`; may be given several times (default: "
        + ", ".join(f'"{variant}"' for variant in VARIANTS)
        + ")",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="output folder (default: bench/results/<device>/training)"
    )
    options = parser.parse_args()
    described = isolated(environment.describe)
    print(environment.line(described), flush=True)
    variants = {
        name.strip(): arguments.split()
        for name, _, arguments in (v.partition(":") for v in options.variant or VARIANTS)
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        # In turns, so that a machine that changes changes for all.
        for seed in range(options.seeds):
            for name, arguments in variants.items():
                runs[name].append(train(options.method, arguments, seed, options.seconds, Path(folder)))
                print(f"seed {seed}, {name}: {runs[name][-1]}", flush=True)
    result = {"environment": described, "method": options.method, "seconds": options.seconds, "variants": runs}
    target = (options.output or results.device_folder(described) / "training") / f"{options.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\n{target}")


if __name__ == "__main__":
    main()
