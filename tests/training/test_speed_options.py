"""Options that make steps faster."""

import pytest
import torch
from comparison import assert_same
from torch import nn

from moment_ops.training import gfmn, runs
from moment_ops.training.generators import make

OPTIONS = [{"amp": "bfloat16"}, {"amp": "float16"}, {"channels_last": True}]


def state_of(run):
    state = runs.load_checkpoint(run)["trainer"]
    del state["elapsed"], state["snapshots"]
    return state


def start_with_scale(monkeypatch, scale):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, scale, enabled=enabled))


@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_a_stopped_and_continued_run_equals_an_uninterrupted_one(train, given):
    whole = train("whole", steps=4, schedule="constant", **given)
    train("parts", steps=2, schedule="constant", **given)
    assert_same(state_of(train("parts", resume=True, steps=4)), state_of(whole))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_is_close_to_float32(train, monkeypatch, amp):
    start_with_scale(monkeypatch, 1.0)
    exact, ours = (state_of(train(name, steps=1, amp=name))["generator"] for name in ("none", amp))
    # The first step of Adam has the size of the learning rate.
    for name, value in exact.items():
        if value.is_floating_point():
            assert (ours[name] - value).abs().max() <= 2.1 * 2e-3 + 0.02 * value.abs().max()


def test_a_scaled_loss_that_overflows_is_a_skipped_step_with_a_smaller_scale(train, monkeypatch):
    start_with_scale(monkeypatch, 2.0**120)
    state = state_of(train("run", steps=2, amp="float16"))
    assert state["skipped"].tolist() == [2, 2]
    assert state["scaler"]["scale"] == 2.0**118


def test_convolutions_are_stored_with_channels_innermost(pictures, extractor_path):
    settings = gfmn.Settings(channels_last=True, latent_size=4, batch_size=2)
    from moment_ops.training.trainer import Trainer

    trainer = Trainer(make("dcgan", 1, 4, 32), nn.Sequential(nn.Conv2d(3, 4, 3)), settings)
    for network in (trainer.generator, trainer.matching, trainer.averaged):
        weights = [p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1]
        assert weights
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_generator_and_extractor_are_compiled_in_place(train, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    names = state_of(train("run", steps=1, compile=True))["generator"].keys()
    assert compiled == ["MomentExtractor", "Generator"]
    assert names == state_of(train("other", steps=1))["generator"].keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"amp": "half"}, "amp: got 'half', expected one of none, bfloat16, float16"),
        ({"amp": "float16", "micro_batches": 2}, "micro_batches: got float16 autocast"),
    ],
)
def test_what_does_not_go_together_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        gfmn.Settings(**given)
