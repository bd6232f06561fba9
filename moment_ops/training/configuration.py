"""The settings of a run from a preset, a file and the command line, each of which overrides the ones before."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from moment_ops.training.errors import TrainingError
from moment_ops.training.presets import PRESETS, preset

COMMAND_LINE = "command line"


def read(path: Path, method: Any) -> tuple[str | None, dict[str, Any]]:
    """(preset, settings) of a file: TOML, or the ``settings.json`` of a run.

    Args:
        method: the dataclass of the settings. Names are those of its fields, with "-" or "_".

    Raises:
        TrainingError: a file that cannot be read, of another method, or with settings that do not exist or have other
            types.
    """
    content = _parsed(path)
    if content.get("method", method.method) != method.method:
        raise TrainingError(f"--config: {path} is of {content['method']}, not of {method.method}")
    name = content.get("preset")
    if name is not None and (name not in PRESETS or PRESETS[name].method != method.method):
        raise TrainingError(f"--config: {path}: got the preset {name!r}, which {method.method} does not have")
    fields = {field.name: field for field in dataclasses.fields(method)}
    settings = {}
    for key, value in content.items():
        if key in ("method", "preset"):
            continue
        setting = key.replace("-", "_")
        if setting not in fields:
            raise TrainingError(f"--config: {path}: got {key!r}, which is no setting of {method.method}")
        settings[setting] = _converted(f"--config: {path}: {key}", value, fields[setting].default)
    return name, settings


def _parsed(path: Path) -> dict[str, Any]:
    text = path.read_text()
    try:
        content = json.loads(text) if path.suffix == ".json" else _toml().loads(text)
    except ValueError as error:
        raise TrainingError(f"--config: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"--config: {path}: got {type(content).__name__}, expected settings by name")
    return content


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise TrainingError("--config: TOML needs Python 3.11; a .json file works as well") from error
    return tomllib


def _converted(label: str, value: Any, default: Any) -> Any:
    """The value in the type of the default."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list) and len(value) == len(default):
        return tuple(_converted(label, v, d) for v, d in zip(value, default, strict=True))
    if type(value) is not type(default):
        raise TrainingError(f"{label}: got {value!r}, expected {type(default).__name__}, such as {default!r}")
    return value


def combined(
    method: Any, given: dict[str, Any], file: Path | None = None, preset_name: str | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, the source of each) from a preset, a file and what is given otherwise.

    If ``steps`` is among them and ``seconds`` is not, the time has no limit.
    """
    of_file: dict[str, Any] = {}
    if file is not None:
        named, of_file = read(file, method)
        preset_name = preset_name or named
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if preset_name is not None:
        settings.update(preset(preset_name))
        sources.update({name: source for name, (_, source) in PRESETS[preset_name].settings.items()})
    for values, source in ((of_file, str(file)), (given, COMMAND_LINE)):
        settings.update(values)
        sources.update(dict.fromkeys(values, source))
    if "steps" in settings and "seconds" not in settings:
        settings["seconds"], sources["seconds"] = math.inf, "as --steps is given"
    return settings, sources


def lines(settings: Any, sources: dict[str, str]) -> list[str]:
    """All settings, with where they come from."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    width = max(map(len, values))
    return [
        f"  {name:<{width}}  {value if value != '' else '-'}" + (f"  ({sources[name]})" if name in sources else "")
        for name, value in values.items()
    ]
