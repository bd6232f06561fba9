"""Raw results: one JSON file per operator, workload and dtype, in a folder per device."""

import json
import os
import re
from pathlib import Path
from typing import Any

OURS = "moment_ops"
# How the names of ours on another backend begin.
ON_BACKEND = f"{OURS} on "
# How the names of compiled contestants begin.
COMPILED = "torch.compile: "
# The contestant that matches nothing: what it takes is the least.
NO_LOSS = "the network without matching"
FORWARD, BOTH = "forward", "forward + backward"
# Parts of a whole training step.
GENERATOR, EXTRACTOR, OPTIMIZER = "generator", "extractor, moments and loss", "optimizer"

FOLDER = Path(__file__).parent / "results"
# Of operators, in runs and in tables; others follow by name.
ORDER = (
    "match",
    "moments",
    "relu_moments",
    "covariance",
    "gram",
    "frechet",
    "frechet_average",
    "moment_network",
    "step",
)


def device_folder(environment: dict[str, Any], root: Path = FOLDER) -> Path:
    """Where results of this device go: its name in lower case with dashes."""
    return root / re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")


def save(result: dict[str, Any], environment: dict[str, Any], folder: Path) -> Path:
    """Write one result with its environment; an older one of the same case is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['operator']}-{result['workload']}-{result['dtype']}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_dump({"environment": environment, **result}) + "\n")
    os.replace(temporary, path)
    return path


def load(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder: operators in their order, the largest workload first and float32 before others."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]

    def key(result: dict[str, Any]) -> tuple[Any, ...]:
        operator, dtype = result["operator"], result["dtype"]
        place = ORDER.index(operator) if operator in ORDER else len(ORDER)
        return place, operator, -result["columns"], dtype != "float32", dtype

    return sorted(results, key=key)


def _dump(value: Any) -> str:
    """Indented JSON with every list of numbers in one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^][{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
