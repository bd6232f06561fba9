"""When Triton runs, and what is said when it cannot."""

from types import SimpleNamespace

import pytest
import torch

import moment_ops as mo
from moment_ops import environment
from moment_ops.ops import backends

GPU_TENSOR = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


def available(monkeypatch, *names):
    """Only these backends can run."""

    def missing(name, *_):
        return None if name.lower() in names else "missing"

    monkeypatch.setattr(backends.extension, "missing", missing)
    monkeypatch.setattr(backends, "unavailable", missing)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(("cuda", "triton", "reference"), "cuda"), (("triton", "reference"), "triton"), (("reference",), "reference")],
)
@pytest.mark.filterwarnings("ignore:moment_ops runs on plain PyTorch")
def test_auto_prefers_compiled_kernels_then_triton_on_gpus(monkeypatch, names, chosen):
    available(monkeypatch, *names)
    assert backends.select("moments", GPU_TENSOR) == chosen


def test_an_operator_without_a_triton_kernel_runs_elsewhere(monkeypatch):
    available(monkeypatch, "triton", "reference")
    monkeypatch.setattr(backends, "_warned", {"reference"})
    assert backends.select("another", GPU_TENSOR) == "reference"


def test_an_amd_gpu_is_told_once_that_nobody_has_run_the_kernels_there(monkeypatch):
    available(monkeypatch, "triton", "reference")
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.warns(UserWarning, match="never run on one") as caught:
        chosen = [backends.select(operator, GPU_TENSOR) for operator in ("moments", "match_")]
    assert chosen == ["triton", "triton"]
    assert len(caught) == 1
    assert "compiled for AMD GPUs, never run on one" in environment.report()


def test_a_machine_without_triton_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    assert "not installed" in backends.unavailable("triton")


def test_a_machine_without_a_gpu_is_told_of_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "_triton_installed", lambda: True)
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in backends.unavailable("triton")
    assert "TRITON_INTERPRET=1" in backends.unavailable("triton")


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(backends, "_triton_installed", lambda: True)
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_has_compiler", lambda: False)
    assert "C compiler" in backends.unavailable("triton")


def test_forcing_triton_on_cpu_tensors_says_what_it_runs_on():
    if backends.interpreted():
        pytest.skip("the interpreter runs on CPU tensors")
    with mo.backend("triton"), pytest.raises(RuntimeError, match="runs on cuda tensors, got cpu"):
        mo.moments(torch.randn(4, 3))
