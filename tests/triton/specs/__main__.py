"""`PYTHONPATH=tests/triton python -m specs` prints the resources of every spec."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from specs.catalogue import SPECS
from specs.resources import compile_launch, recorded, resources, table


def main() -> None:
    """Print the resources of all specs, against those in a file; with `--record`, write them there."""
    parser = argparse.ArgumentParser(prog="python -m specs", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="a JSON file of recorded resources")
    parser.add_argument("--record", action="store_true", help="write the file")
    arguments = parser.parse_args()
    old = recorded(arguments.file) if arguments.file and arguments.file.exists() else {}
    new = {
        f"{spec.name}, sm_{architecture}": resources(compile_launch(spec.launch(), architecture))
        for spec in SPECS
        for architecture in spec.architectures
    }
    print(table([(name, old.get(name), got) for name, got in new.items()]))
    if arguments.record:
        arguments.file.write_text(json.dumps({name: asdict(got) for name, got in new.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
