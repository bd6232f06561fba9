"""A whole MoLM training of the smallest kind: its rounds, what it leaves behind, and how it goes on."""

import itertools
import json
import os
import signal

import numpy as np
import pytest
import torch
from comparison import assert_same

import moment_ops as mo
from moment_ops.training import data, molm, runs
from moment_ops.training.command_line import main
from moment_ops.training.errors import TrainingError
from moment_ops.training.interruption import Interrupted
from moment_ops.training.moment_networks import ConvMomentNetwork

TINY = {
    "steps": 14,
    "seconds": float("inf"),
    "batch_size": 4,
    "latent_size": 8,
    "width": 4,
    "first_moment_steps": 3,
    "moment_steps": 2,
    "generator_steps": 4,
    "real_images": 10,
    "log_every": 1,
    "evaluate_every": 7,
    "checkpoint_every": 7,
    "judge": "digits",
}


@pytest.fixture
def train(tmp_path, pictures):
    """``train(name, **settings)`` trains a tiny MoLM in the folder ``name``, which it returns."""

    def run(name, *, resume=False, say=lambda line: None, **given):
        molm.train(
            tmp_path / name, given if resume else {"data": str(pictures), **TINY, **given}, resume=resume, say=say
        )
        return tmp_path / name

    return run


@pytest.fixture
def trainer(pictures):
    return molm.new_trainer(data.load(str(pictures)), molm.Settings(**TINY))


def trained_state(run):
    state = runs.load_checkpoint(run)["trainer"]
    del state["elapsed"]
    return state


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_pictures_metrics_settings_and_checkpoint(train):
    assert {path.name for path in train("run").iterdir()} == {
        "checkpoint-0.pt",
        "checkpoint-14.pt",
        "checkpoint-7.pt",
        "checkpoint.pt",
        "curves.png",
        "metrics.jsonl",
        "progress.png",
        "quality.json",
        "samples.png",
        "settings.json",
    }


def test_metrics_tell_how_the_moment_network_does(train):
    lines = metrics_of(train("run"))
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert [line["round"] for line in lines] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2
    for name in ("loss", "moment_logistic", "moment_penalty", "moment_squared_norm", "moment_accuracy"):
        assert all(np.isfinite(line[name]) for line in lines)
    assert [line["step"] for line in lines if "frechet_distance" in line] == [7, 14]


def test_the_moment_network_is_trained_before_rounds_and_fixed_during_them(trainer, monkeypatch):
    steps = []
    train_network = molm.Matching.train_network
    monkeypatch.setattr(molm.Matching, "train_network", lambda self: (steps.append(trainer.step), train_network(self)))
    weights = []
    for _ in range(9):
        trainer.advance()
        weights.append(trainer.matching.net.f.value.weight.detach().clone())
    assert steps == [0] * 3 + [4] * 2 + [8] * 2
    same = [torch.equal(one, other) for one, other in itertools.pairwise(weights)]
    assert same == [True, True, True, False, True, True, True, False]


def test_every_round_takes_the_data_moments_of_the_network_of_the_time_and_restarts_the_average(pictures):
    images = data.load(str(pictures))
    every = len(images.train)
    trainer = molm.new_trainer(images, molm.Settings(**{**TINY, "real_images": every}))
    loss = trainer.matching.moment_loss
    for _ in range(6):
        trainer.advance()
        exact = trainer.matching.net.moments(data.scale(images.train)).mean
        torch.testing.assert_close(loss.target_mean, exact, rtol=1e-5, atol=1e-6)
    assert loss.step == 2
    assert trainer.matching.chosen.batch_size == every


def test_the_network_starts_with_the_squared_norm_asked_for(pictures):
    images = data.load(str(pictures))
    trainer = molm.new_trainer(images, molm.Settings(**{**TINY, "squared_norm": 3.0}))
    m = trainer.matching.net.moments(data.scale(images.train))
    gradients = dict(zip(m.names, m.mean.split(m.sizes), strict=True))
    squares = [mean.square().sum().item() for name, mean in gradients.items() if name.startswith("gradient")]
    assert sum(squares) == pytest.approx(3.0, rel=2e-3)


def test_the_learning_rate_of_the_moment_network_falls_with_that_of_the_generator(trainer):
    rates = []
    for _ in range(TINY["steps"]):
        trainer.advance()
        rates.append(trainer.matching.optimizer.param_groups[0]["lr"])
    assert rates[0] == molm.Settings.moment_lr
    # The last round of four begins with step 13 of 14.
    assert rates[-1] == pytest.approx(molm.Settings.moment_lr * (1 - 0.98 * (2 * 12 / 14 - 1)))


def test_weights_of_the_groups_reach_the_loss(pictures):
    settings = molm.Settings(**{**TINY, "hidden_weight": 0.25, "gradient_weight": 2.0, "input_weight": 0.5})
    loss = molm.new_trainer(data.load(str(pictures)), settings).matching.moment_loss
    sizes = [torch.Size(shape).numel() for shape in loss.shapes]
    expected = {"hidden": 0.25, "gradient": 2.0, "input": 0.5}
    for name, weight in zip(loss.names, loss.mean_weight.split(sizes), strict=True):
        assert (weight == expected[name.partition("/")[0]]).all()


def test_the_generator_learns_from_the_gradient_moments(pictures):
    settings = molm.Settings(**{**TINY, "hidden_weight": 0.0, "input_weight": 0.0})
    trainer = molm.new_trainer(data.load(str(pictures)), settings)
    trainer.advance()
    trainer.advance()
    gradients = [parameter.grad.abs().max() for parameter in trainer.generator.parameters()]
    assert max(gradients) > 0


def test_the_moment_network_gets_no_gradients_from_the_generators_steps(trainer):
    trainer.advance()
    before = {name: p.grad.clone() for name, p in trainer.matching.net.named_parameters()}
    trainer.advance()
    for name, parameter in trainer.matching.net.named_parameters():
        assert torch.equal(parameter.grad, before[name])


def test_two_runs_with_the_same_seed_are_equal_to_the_last_bit_and_another_seed_gives_another(train):
    one, two, other = (trained_state(train(name, seed=seed)) for name, seed in (("1", 0), ("2", 0), ("3", 1)))
    assert_same(one, two)
    assert not torch.equal(one["averaged"]["project.weight"], other["averaged"]["project.weight"])


@pytest.mark.parametrize(("average", "evaluate_every"), [("adam", 4), ("adam", 7), ("moving", 7), ("none", 7)])
def test_a_stopped_and_continued_run_equals_an_uninterrupted_one(train, average, evaluate_every):
    """Stopped between rounds, and within one."""

    def send_signal(line):
        if line.startswith(f"step {evaluate_every}:"):
            os.kill(os.getpid(), signal.SIGINT)

    settings = {"average": average, "evaluate_every": evaluate_every}
    whole = train("whole", **settings)
    with pytest.raises(Interrupted):
        train("stopped", say=send_signal, **settings)
    assert trained_state(whole.with_name("stopped"))["step"] < 14
    continued = train("stopped", resume=True)
    assert_same(trained_state(continued), trained_state(whole))
    for one, other in zip(metrics_of(continued), metrics_of(whole), strict=True):
        assert_same({**one, "seconds": 0}, {**other, "seconds": 0})


def test_a_run_of_another_method_is_not_continued(train, monkeypatch):
    train("run")
    monkeypatch.setattr(molm.Settings, "method", "gfmn")
    with pytest.raises(TrainingError, match="this is a run of molm, not of gfmn"):
        train("run", resume=True)


def test_a_moment_network_that_diverges_is_a_one_line_error(train):
    with pytest.raises(TrainingError, match="non-finite at step 0; try a lower --moment-lr"):
        train("run", moment_lr=1e30)


def test_in_bfloat16_a_run_goes_through(train):
    assert all(np.isfinite(line["loss"]) for line in metrics_of(train("run", amp="bfloat16")))


def test_images_of_64_pixels(train):
    run = train("run", size=64, steps=2)
    assert runs.load_checkpoint(run)["trainer"]["snapshots"][2].shape[-2:] == (64, 64)


def test_the_published_network_and_loss_can_be_chosen(train):
    run = train("run", network="conv", average="none", penalty="real", steps=2)
    settings = molm.Settings(**runs.load_checkpoint(run)["settings"])
    assert isinstance(settings.make_network(1).f, ConvMomentNetwork)
    assert settings.make_average() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"generator_steps": 0},
        {"moment_steps": 0},
        {"real_images": 0},
        {"moment_lr": 0.0},
        {"penalty": "none"},
        {"penalty_weight": -1.0},
        {"input_weight": -1.0},
        {"hidden_weight": float("inf")},
        {"gradient_weight": float("nan")},
        {"network": "linear"},
        {"average": "mean"},
    ],
)
def test_settings_out_of_range_are_errors_that_name_them(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        molm.Settings(**wrong)


def test_the_command_trains_and_its_run_can_be_sampled_and_evaluated(tmp_path, pictures, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "seconds"]
    assert main(["train", "molm", "--device=cpu", f"--data={pictures}", *options]) == 0
    trained = capfd.readouterr().out.splitlines()
    run = f"runs/molm-{pictures.name}"
    assert f"results in {run}" in trained
    assert main(["evaluate", "--device=cpu", f"--run-dir={run}"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == trained[-1]
    assert main(["sample", f"--run-dir={run}", "--count=3", "--output=samples.npz"]) == 0
    with np.load("samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 32, 32, 1)


def test_help_lists_every_setting_with_its_default(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["train", "molm", "--help"])
    assert caught.value.code == 0
    text = capfd.readouterr().out
    for option in ("--moment-steps", "--generator-steps", "--real-images", "--penalty-weight", "--moment-lr"):
        assert option in text
    assert "(default: 80)" in text


def test_moments_of_a_run_are_those_of_its_network(trainer):
    """The loss that the generator saw, from the saved pieces."""
    trainer.advance()
    matching = trainer.matching
    images = trainer.generator(torch.randn(4, 8))
    value = matching.moment_loss.eval()(matching.net.moments(images))
    m = matching.net.moments(images.detach())
    v = matching.moment_loss.mean_average * matching.moment_loss.mean_weight
    torch.testing.assert_close(value, v @ (matching.moment_loss.target_mean - m.mean))
    assert isinstance(m, mo.Moments)
