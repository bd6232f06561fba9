"""Bar charts of results: one file per operator, one panel per case."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import BOTH, FORWARD, OURS
from bench.report import median, milliseconds, order

# Beyond this ratio of times the short bars cannot be read on a linear scale.
LARGEST_LINEAR_RATIO = 100
OUR_COLOR, OTHER_COLOR, FLOOR_COLOR = "#d1495b", "#5b7a99", "#444444"


def save_plots(all_results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """`<operator>.png` for every operator."""
    paths = []
    for operator in dict.fromkeys(result["operator"] for result in all_results):
        path = folder / f"{operator}.png"
        _save(path, [result for result in all_results if result["operator"] == operator])
        paths.append(path)
    return paths


def _save(path: Path, panels: Sequence[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = max(len(result["contestants"]) for result in panels)
    rows = -(-len(panels) // 2)
    columns = min(len(panels), 2)
    figure = Figure(figsize=(6.2 * columns, rows * (0.44 * bars + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, result in zip(axes, panels, strict=False):
        _panel(axis, result)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    # Long titles of a single panel would be cut off.
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def _panel(axis: Any, result: dict[str, Any]) -> None:
    names = order(result)
    height = 0.38
    times = [median(result, name, direction) for name in names for direction in (FORWARD, BOTH)]
    for i, name in enumerate(names):
        color = OUR_COLOR if name == OURS else OTHER_COLOR
        for direction, offset, alpha in ((FORWARD, -height / 2, 0.45), (BOTH, height / 2, 1.0)):
            entry = result["directions"][direction]["contestants"][name]
            middle = entry["median_ms"]
            spread = [[middle - entry["q20_ms"]], [entry["q80_ms"] - middle]]
            bar = {"height": height, "color": color, "alpha": alpha}
            axis.barh(i + offset, middle, xerr=spread, error_kw={"linewidth": 0.8, "alpha": 0.8}, **bar)
            right = entry["q80_ms"]
            axis.annotate(
                milliseconds(middle),
                (right, i + offset),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                size=7,
            )
    floor = result["directions"][BOTH]["floor_ms"]
    axis.axvline(floor, color=FLOOR_COLOR, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), names, size=8)
    axis.invert_yaxis()
    if max(times) > LARGEST_LINEAR_RATIO * min(times):
        axis.set_xscale("log")
    axis.margins(x=0.1)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("ms; light: forward, dark: forward + backward, dotted: bytes at measured bandwidth", size=7)
    axis.set_title(f"{result['operator']}: {result['title']}, {result['dtype']}", size=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
