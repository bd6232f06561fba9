"""A whole training of the smallest kind, and what it leaves behind."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from comparison import assert_same

import moment_ops as mo
from moment_ops.training import data, extractors, gfmn, runs
from moment_ops.training.errors import TrainingError
from moment_ops.training.interruption import Interrupted


def trained_state(run):
    state = runs.load_checkpoint(run)["trainer"]
    del state["elapsed"]
    return state


def send_signal_after(step, number):
    """A ``say`` that signals this process when the evaluation of ``step`` is reported."""

    def say(line):
        if line.startswith(f"step {step}:"):
            os.kill(os.getpid(), number)

    return say


def test_a_run_leaves_pictures_metrics_targets_settings_and_checkpoint(train):
    run = train("run")
    assert {path.name for path in run.iterdir()} == {
        "checkpoint-0.pt",
        "checkpoint-10.pt",
        "checkpoint-20.pt",
        "checkpoint.pt",
        "curves.png",
        "metrics.jsonl",
        "progress.png",
        "quality.json",
        "samples.png",
        "settings.json",
        "target.npz",
    }


def test_metrics_have_one_object_a_line_and_the_frechet_distance_at_evaluations(train):
    lines = [json.loads(line) for line in (train("run") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["step"] for line in lines if "frechet_distance" in line] == [10, 20]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_targets_are_the_moments_of_the_features_of_all_training_images(train, pictures, extractor_path):
    saved = mo.Moments.load(train("run") / "target.npz")
    images = data.load(str(pictures))
    extractor = extractors.load_or_train_classifier(images, extractor_path, iterations=2)
    features = torch.cat([part.flatten(1) for part in extractor.features(data.scale(images.train))], 1).double()
    torch.testing.assert_close(saved.mean.double(), features.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved.var.double(), features.var(0), rtol=1e-4, atol=1e-9)


def test_two_runs_with_the_same_seed_are_equal_to_the_last_bit(train):
    assert_same(trained_state(train("one")), trained_state(train("two")))


def test_another_seed_gives_another_run(train):
    one, two = trained_state(train("one")), trained_state(train("two", seed=1))
    assert not torch.equal(one["averaged"]["project.weight"], two["averaged"]["project.weight"])


@pytest.mark.parametrize("average", ["adam", "moving", "none"])
def test_a_stopped_and_continued_run_equals_an_uninterrupted_one(train, average):
    whole = train("whole", average=average)
    with pytest.raises(Interrupted):
        train("stopped", average=average, say=send_signal_after(10, signal.SIGINT))
    assert 10 <= trained_state(whole.with_name("stopped"))["step"] < 20
    assert_same(trained_state(train("stopped", resume=True)), trained_state(whole))


def test_a_crashed_and_continued_run_equals_an_uninterrupted_one_and_logs_no_step_twice(train):
    def crash(line):
        if line.startswith("step 15:"):
            raise MemoryError

    whole = train("whole", evaluate_every=5)
    with pytest.raises(MemoryError):
        train("crashed", evaluate_every=5, say=crash)
    crashed = train("crashed", resume=True)
    assert_same(trained_state(crashed), trained_state(whole))
    steps = [json.loads(line)["step"] for line in (crashed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_ends_the_run_saved_and_says_how_to_continue(train, number, status):
    with pytest.raises(Interrupted, match="saved at step 11; --resume continues") as caught:
        train("run", say=send_signal_after(10, number))
    assert caught.value.signal_number == number
    assert caught.value.exit_status == status


def test_after_a_run_ctrl_c_does_what_it_did_before(train):
    before = signal.getsignal(signal.SIGINT)
    train("run")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_schedule_ends_with_the_time_budget(train):
    run = train("run", steps=1_000_000, seconds=0.5)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] < 1000
    assert last["lr"] == pytest.approx(0.02 * gfmn.Settings.lr)


def test_a_new_run_keeps_the_earlier_one_beside_it(train):
    first = trained_state(train("run"))
    train("run", seed=1)
    assert_same(trained_state(train("run", seed=2).with_name("run.1")), first)


def test_a_folder_with_other_files_is_not_taken_for_a_run(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("text")
    with pytest.raises(TrainingError, match="holds files that are not of a run"):
        train("run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_resuming_refuses_settings_that_would_make_it_another_run(train):
    train("run")
    with pytest.raises(TrainingError, match="keeps its batch_size"):
        train("run", resume=True, batch_size=8)


def test_a_finished_run_continues_with_more_steps(train):
    train("run")
    assert trained_state(train("run", resume=True, steps=25))["step"] == 25


def test_the_extractor_is_reused_for_the_same_data_and_trained_anew_for_other_data(pictures, tmp_path):
    path, said = tmp_path / "extractor.pt", []
    images = data.load(str(pictures))
    first = extractors.load_or_train_classifier(images, path, iterations=2, say=said.append)
    again = extractors.load_or_train_classifier(images, path, iterations=2, say=said.append)
    assert_same(dict(first.state_dict()), dict(again.state_dict()))
    assert len(said) == 1
    other = data.ImageData(images.name, images.held_out, images.train, images.held_out_labels, images.train_labels)
    extractors.load_or_train_classifier(other, path, iterations=2, say=said.append)
    assert "other data" in said[1]


def test_images_without_labels_train_an_extractor_by_their_orientation(pictures, tmp_path):
    images = data.load(str(pictures))
    unlabelled = data.ImageData(images.name, images.train, images.held_out)
    extractor = extractors.load_or_train_classifier(unlabelled, tmp_path / "extractor.pt", iterations=2)
    assert extractor.head.out_features == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 1},
        {"steps": 0},
        {"lr": 0.0},
        {"average": "mean"},
        {"weight_average": 1.0},
        {"mean_weight": float("nan")},
        {"var_weight": -1.0},
        {"covariance_weight": float("inf")},
    ],
)
def test_settings_out_of_range_are_errors_that_name_them(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        gfmn.Settings(**wrong)
