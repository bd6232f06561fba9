"""The pictures of a run: a grid of samples, samples over the steps, curves."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moment_ops.training.checkpoints import write_atomically
from moment_ops.training.errors import import_extra

ENLARGEMENT = 3


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Tile uint8 images ``(N, C, H, W)``, one black pixel apart -> ``(height, width, 3)``."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_grid(path: Path, images: Tensor, columns: int = 10) -> None:
    """Write a PNG of uint8 images ``(N, C, H, W)``, enlarged without smoothing."""
    canvas = tile(images, columns).repeat(ENLARGEMENT, 0).repeat(ENLARGEMENT, 1)
    buffer = io.BytesIO()
    import_extra("PIL.Image").fromarray(canvas).save(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def save_progress(path: Path, snapshots: dict[int, Tensor]) -> None:
    """Write samples of several steps: one row per step, one column per latent vector."""
    if not snapshots:
        return
    steps = sorted(snapshots)
    canvas = tile(torch.cat([snapshots[step] for step in steps]), columns=len(snapshots[steps[0]]))
    height, width, _ = canvas.shape
    figure, (axis,) = new_figure(1, 1, size=(10, 0.2 + 9 * height / width))
    axis.imshow(canvas)
    axis.set_yticks((np.arange(len(steps)) + 0.5) * height / len(steps), [f"step {step}" for step in steps])
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    save_figure(path, figure)


def save_curves(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Write the curves of the loss, of the Frechet distance and, if there is one, of the moment network."""
    evaluations = [line for line in metrics if "frechet_distance" in line]
    network = [line for line in metrics if "moment_accuracy" in line]
    figure, axes = new_figure(1, 3 if network else 2, size=(15 if network else 10, 3.8))
    left, right, *more = axes
    # Lines of skipped steps have no loss.
    logged = [line for line in metrics if "loss" in line]
    steps, losses = (np.array([line[name] for line in logged]) for name in ("step", "loss"))
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="one batch")
    left.plot(steps, running_median(losses), color="tab:blue", label="running median")
    # The loss of an ADAM moving average can be negative, so that the scale is linear near zero.
    smallest = float(np.quantile(np.abs(losses), 0.1)) if logged else 1.0
    left.set_yscale("symlog", linthresh=max(smallest, 1e-12))
    left.set(xlabel="step", ylabel="matching loss", title="Matching loss (not a measure of quality)")
    left.legend()

    judge = evaluations[-1].get("judge", "") if evaluations else ""
    distances = [line["frechet_distance"] for line in evaluations]
    right.plot([line["step"] for line in evaluations], distances, "o-", color="tab:blue", label="samples")
    if evaluations:
        held_out = evaluations[-1]["held_out_frechet_distance"]
        right.axhline(held_out, color="black", linestyle="--", label=f"held-out images ({held_out:.2f})")
        right.annotate(
            f"{distances[-1]:.2f}",
            (evaluations[-1]["step"], distances[-1]),
            (-2, 8),
            textcoords="offset points",
            ha="right",
        )
    right.set_yscale("log")
    right.yaxis.set_major_locator(import_extra("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    right.set(
        xlabel="step",
        ylabel="Frechet distance to the training images",
        title=f"Sample quality (lower is better)\n{judge}" if judge else "Sample quality (lower is better)",
    )
    right.legend()
    for axis in more:
        draw_moment_network(axis, network)
    for axis in (left, right, *more):
        axis.grid(alpha=0.3)
    save_figure(path, figure)


def draw_moment_network(axis: Any, metrics: list[dict[str, float]]) -> None:
    """The accuracy and the loss of the moment network, and the squared norm of its gradient."""
    steps = [line["step"] for line in metrics]
    for name, label, colour in (
        ("moment_accuracy", "accuracy", "tab:green"),
        ("moment_logistic", "logistic loss", "tab:orange"),
        ("moment_squared_norm", "squared norm of its gradient", "tab:purple"),
    ):
        values = np.array([line[name] for line in metrics])
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps, running_median(values), color=colour, label=label)
    axis.axhline(2 * np.log(2), color="tab:orange", linestyle="--", label="logistic loss by chance")
    axis.set_yscale("log")
    axis.set(xlabel="step", title="Moment network")
    axis.legend()


def running_median(values: np.ndarray, width: int = 15) -> np.ndarray:
    half = width // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure without pyplot, which has global state and may need a display."""
    figure = import_extra("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes.flat


def save_figure(path: Path, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())
