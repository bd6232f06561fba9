"""Settings from presets, files and the command line."""

import dataclasses
import json
import math
import re
import sys

import pytest

from moment_ops.training import configuration, gfmn, molm, presets
from moment_ops.training.command_line import main, make_parser
from moment_ops.training.errors import TrainingError

METHODS = {"gfmn": gfmn.Settings, "molm": molm.Settings}
needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML comes with Python 3.11")


def written(tmp_path, text, name="run.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_settings_of_their_method_with_known_sources(name):
    preset = presets.PRESETS[name]
    settings = METHODS[preset.method](**presets.preset(name))
    for field, (value, source) in preset.settings.items():
        assert type(getattr(settings, field)) is type(value)
        assert type(value) is type(METHODS[preset.method].__dataclass_fields__[field].default), field
        assert source in (presets.PAPER, presets.CODE, presets.THIRD_PARTY, presets.OURS)


def test_demos_are_the_defaults():
    for name in ("gfmn-mnist", "molm-mnist"):
        assert presets.preset(name) == {}


@needs_toml
def test_the_command_line_overrides_the_file_and_the_file_its_preset(tmp_path):
    path = written(tmp_path, 'preset = "gfmn-cifar10-vgg19-resnet18"\nbatch-size = 16\nlr = 1\nbetas = [0, 0.9]\n')
    settings, sources = configuration.combined(gfmn.Settings, {"lr": 3e-4}, path)
    made = gfmn.Settings(**settings)
    assert (made.latent_size, made.batch_size, made.lr, made.betas) == (100, 16, 3e-4, (0.0, 0.9))
    assert {name: sources[name] for name in ("latent_size", "generator", "batch_size", "lr")} == {
        "latent_size": "paper",
        "generator": "released code",
        "batch_size": str(path),
        "lr": "command line",
    }


def test_the_stored_settings_of_a_run_are_a_configuration(tmp_path):
    settings = gfmn.Settings(batch_size=7, seconds=math.inf)
    path = written(tmp_path, json.dumps({"method": "gfmn", **dataclasses.asdict(settings)}), "settings.json")
    read, _ = configuration.combined(gfmn.Settings, {}, path)
    assert gfmn.Settings(**read) == settings


def test_steps_without_seconds_have_no_limit_of_time(tmp_path):
    path = written(tmp_path, '{"steps": 5}', "run.json")
    for given, file in (({"steps": 5}, None), ({}, path)):
        assert configuration.combined(gfmn.Settings, given, file)[0] == {"steps": 5, "seconds": math.inf}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"batchsize": 3}', "got 'batchsize', which is no setting of gfmn"),
        ('{"batch_size": 3.5}', "batch_size: got 3.5, expected int, such as 32"),
        ('{"channels_last": 1}', "channels_last: got 1, expected bool, such as False"),
        ('{"lr": true}', "lr: got True, expected float"),
        ('{"betas": [0.5]}', "betas: got [0.5], expected tuple"),
        ('{"method": "molm"}', "is of molm, not of gfmn"),
        ('{"preset": "molm-mnist"}', "got the preset 'molm-mnist', which gfmn does not have"),
        ("[1]", "got list, expected settings by name"),
        ("{", "Expecting property name"),
    ],
)
def test_bad_files_are_errors_of_one_line(tmp_path, text, message, capsys):
    path = written(tmp_path, text, "run.json")
    assert main(["train", "gfmn", f"--config={path}", f"--run-dir={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert re.match(r"moment-ops: --config: .*\n$", error)
    assert message in error
    assert not (tmp_path / "run").exists()


@needs_toml
def test_bad_toml_and_missing_files_are_errors(tmp_path):
    with pytest.raises(TrainingError, match=r"--config: .*run.toml: "):
        configuration.read(written(tmp_path, "a = "), gfmn.Settings)
    assert main(["train", "gfmn", f"--config={tmp_path / 'none.toml'}"]) == 1


def test_settings_are_printed_with_their_sources():
    settings, sources = configuration.combined(gfmn.Settings, {"seed": 3}, None, "gfmn-cifar10-vgg19-resnet18")
    lines = configuration.lines(gfmn.Settings(**settings), sources)
    assert len(lines) == len(dataclasses.fields(gfmn.Settings))
    for pattern in (r"  seed +3  \(command line\)", r"  batch_size +64  \(paper\)", r"  log_every +10"):
        assert any(re.fullmatch(pattern, line) for line in lines), pattern


def test_each_method_has_its_presets(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["train", "gfmn", "--preset=molm-mnist"])
    assert "invalid choice: 'molm-mnist'" in capsys.readouterr().err
