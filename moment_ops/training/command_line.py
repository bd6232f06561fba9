"""The command ``moment-ops``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moment_ops as mo
from moment_ops.environment import report
from moment_ops.training import (
    autoencoder,
    checkpoints,
    configuration,
    data,
    evaluator,
    extractors,
    gfmn,
    judges,
    molm,
    pictures,
    presets,
    processes,
    runs,
)
from moment_ops.training.allocator import keep_freed_memory
from moment_ops.training.devices import choose_device
from moment_ops.training.errors import TrainingError
from moment_ops.training.interruption import Interrupted, signals_raise
from moment_ops.training.settings import DATA_HELP

INTERRUPTED = 128 + signal.SIGINT
METAVARS = {int: "N", float: "X", str: "NAME"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Errors that a user can act on are printed as one line."""
    with contextlib.redirect_stderr(io.StringIO()) if processes.started_as() else contextlib.nullcontext():
        # Of several processes, the first says what is wrong with the command line.
        options = make_parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except processes.OnOneProcess as error:
        message = f"process {processes.started_as()}: {error}" if processes.started_as() else str(error)
    except TrainingError as error:
        if processes.started_as():
            return 1
        message = str(error)
    except OSError as error:
        message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    print(f"moment-ops: {message}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moment-ops", description="Train generators by matching moments, and show what runs on this machine."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    text = "train a generator by matching moments"
    train = commands.add_parser("train", help=text, description=sentence(text))
    methods = train.add_subparsers(title="methods", required=True, metavar="METHOD")
    train_gfmn = add_train(methods, gfmn, "match the moments of a frozen classifier's features (GFMN)")
    train_gfmn.add_argument(
        "--extractor",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="weights of the networks of --features that come without, in their order, or random (default, for the"
        " classifier only: extractor-DATA.pt next to the folder of the run, which is trained if it does not exist)",
    )
    add_train(
        methods, molm, "match the moments of a network that learns to tell real images from generated ones (MoLM)"
    )
    add_autoencoder(methods)

    moments = add_command(
        commands,
        "moments",
        moments_command,
        "compute the moments of a classifier's features over a data set, and save them",
    )
    moments.add_argument("--data", default="mnist", help=f"{DATA_HELP} (default: mnist)")
    moments.add_argument(
        "--size", type=int, default=32, choices=data.SIZES, help="height and width of the images (default: 32)"
    )
    moments.add_argument(
        "--extractor",
        type=Path,
        metavar="FILE",
        help="classifier (default: runs/extractor-DATA.pt, which is trained if it does not exist)",
    )
    moments.add_argument(
        "--output", type=Path, default=Path("target.npz"), metavar="FILE", help="output file (default: target.npz)"
    )
    add_device(moments)

    sample = add_command(commands, "sample", sample_command, "draw samples from the generator of a checkpoint")
    add_run(sample)
    sample.add_argument("--count", type=int, default=100, metavar="N", help="number of samples (default: 100)")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the latent vectors (default: 0)")
    sample.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        metavar="FILE",
        help="output file: .png for a grid, .npz for a uint8 array (N, H, W, C) (default: samples.png)",
    )
    add_device(sample)

    evaluate = add_command(commands, "evaluate", evaluate_command, "measure the quality of a checkpoint's samples")
    add_run(evaluate)
    evaluate.add_argument(
        "--judge", metavar="NAME", help=f"network that judges (default: that of the run): {judges.EXPECTED}"
    )
    evaluate.add_argument("--judge-weights", metavar="FILE", help="file with its weights, for inception and timm:NAME")
    evaluate.add_argument("--data", help=f"{DATA_HELP} (default: the data of the run)")
    add_device(evaluate)

    add_command(commands, "env", env_command, "show which backends can run here, and why the others cannot")
    return parser


def sentence(text: str) -> str:
    """A help text as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def add_command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=sentence(text))
    command.set_defaults(command=function, parser=command)
    return command


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="torch device, such as cpu or cuda:1 (default: cuda if available, else cpu)"
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/gfmn-mnist"),
        metavar="FOLDER",
        help="folder of the run (default: runs/gfmn-mnist)",
    )


def add_train(methods: Any, method: Any, text: str) -> argparse.ArgumentParser:
    """The command that trains with the module of a method."""
    name = method.Settings.method
    parser = add_command(methods, name, train_command, text)
    parser.set_defaults(method=method)
    parser.add_argument("--run-dir", type=Path, metavar="FOLDER", help=f"folder of the run (default: runs/{name}-DATA)")
    parser.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
    parser.add_argument(
        "--preset", choices=presets.names(name), help="settings to start from, which other options override"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings in a file, .toml or the settings.json of a run"
    )
    add_device(parser)
    add_settings(parser, method.Settings)
    return parser


def add_autoencoder(methods: Any) -> None:
    text = "train an autoencoder on the data, whose features --features autoencoder of GFMN matches"
    parser = add_command(methods, "autoencoder", autoencoder_command, text)
    parser.set_defaults(preset=None, resume=False)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="output file, a new one (default: runs/autoencoder-DATA.pt)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in a file, .toml or .json")
    add_device(parser)
    add_settings(parser, autoencoder.Settings)


def add_settings(parser: argparse.ArgumentParser, settings: Any) -> None:
    """One option for every field with a help text. Only options that are given appear in the result."""
    for field in dataclasses.fields(settings):
        if not field.metadata:
            continue
        keywords = dict(field.metadata, default=argparse.SUPPRESS)
        if isinstance(field.default, bool):
            keywords["action"] = "store_true"
        else:
            keywords["type"] = type(field.default)
            keywords["help"] += f" (default: {field.default if field.default != '' else 'none'})"
            if "choices" not in keywords:
                keywords.setdefault("metavar", METAVARS[type(field.default)])
        parser.add_argument("--" + field.name.replace("_", "-"), **keywords)


def given_settings(options: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The settings of preset, file and command line. They are printed, unless a run is continued."""
    names = {field.name for field in dataclasses.fields(settings)}
    typed = {name: value for name, value in vars(options).items() if name in names}
    given, sources = configuration.combined(settings, typed, options.config, options.preset)
    try:
        whole = settings(**given)
    except ValueError as error:
        options.parser.error(str(error))
    if not options.resume and not processes.started_as():
        print("settings", *configuration.lines(whole, sources), sep="\n", flush=True)
    return given


def train_command(options: argparse.Namespace) -> int:
    method = options.method
    given = given_settings(options, method.Settings)
    run = options.run_dir or default_path(method.Settings, given)
    keep_freed_memory()
    try:
        with signals_raise(), processes.joined(options.device) as device:
            first = processes.is_first()
            measured = method.train(
                run,
                given,
                resume=options.resume,
                device=device,
                say=functools.partial(print, flush=True) if first else lambda line: None,
                **({"extractor_files": options.extractor} if "extractor" in options else {}),
            )
    except Interrupted as interrupted:
        if not processes.started_as():
            print(interrupted, file=sys.stderr)
        return interrupted.exit_status
    if first:
        print(f"results in {run}")
        print("\n".join(measured.lines()))
    return 0


def default_path(settings: Any, given: dict[str, Any]) -> Path:
    """Where the results of a training go by default, without a suffix."""
    return Path("runs") / f"{settings.method}-{Path(given.get('data', settings.data)).resolve().name}"


def autoencoder_command(options: argparse.Namespace) -> None:
    if processes.started() > 1:
        raise TrainingError(f"train autoencoder: got {processes.started()} processes of torchrun, expected one")
    given = given_settings(options, autoencoder.Settings)
    path = options.output or Path(f"{default_path(autoencoder.Settings, given)}.pt")
    autoencoder.train(path, given, device=choose_device(options.device), say=functools.partial(print, flush=True))


def moments_command(options: argparse.Namespace) -> None:
    images = data.load(options.data, options.size).to(choose_device(options.device))
    path = options.extractor or Path("runs") / f"extractor-{images.name}.pt"
    extractor = mo.MomentExtractor(extractors.load_or_train_classifier(images, path))
    target = gfmn.target_moments(images, extractor)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    target.save(options.output)
    print(f"{options.output}: {len(target.mean):,} means and variances of {len(images.train):,} images")


def sample_command(options: argparse.Namespace) -> None:
    if options.count < 1:
        options.parser.error(f"--count: got {options.count}, expected at least 1")
    if options.output.suffix not in (".png", ".npz"):
        options.parser.error(f"--output: got {options.output}, expected a file that ends in .png or .npz")
    generator = runs.averaged_generator(runs.load_checkpoint(options.run_dir)).to(choose_device(options.device))
    images = data.unscale(torch.cat(evaluator.sample(generator, options.count, options.seed)))
    if options.output.suffix == ".png":
        pictures.save_grid(options.output, images)
    else:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images.permute(0, 2, 3, 1).numpy())
        checkpoints.write_atomically(options.output, buffer.getvalue())
    print(f"{options.output}: {len(images)} samples")


def evaluate_command(options: argparse.Namespace) -> None:
    device = choose_device(options.device)
    state = runs.load_checkpoint(options.run_dir)
    images = data.load(options.data or state["settings"]["data"], state["settings"]["size"])
    settings = state["settings"]
    if options.judge:
        try:
            judges.check_name(options.judge)
        except ValueError as error:
            options.parser.error(f"--{error}")
    judge = judges.choose(options.judge or settings["judge"], images.name, settings.get("features", ""))
    weights = options.judge_weights or ("" if options.judge else settings["judge_weights"])
    judging = evaluator.Evaluator(images.to(device), judges.make(judge, weights))
    print("\n".join(judging.measure(runs.averaged_generator(state).to(device)).lines()))


def env_command(options: argparse.Namespace) -> None:
    print(report())


if __name__ == "__main__":
    sys.exit(main())
