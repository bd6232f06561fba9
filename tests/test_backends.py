"""Choosing a backend, and running without the compiled extension."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, make_features, make_target

import moment_ops as mo
from moment_ops import environment
from moment_ops.ops import backends, extension, registry
from moment_ops.ops.checks import FEATURE_DTYPES
from moment_ops.ops.library import OPERATORS
from moment_ops.ops.relu_moments import identity_moments, relu_moments

PACKAGE = Path(mo.__file__).parent
NUMBERS = """
import torch, moment_ops as mo
torch.manual_seed(0)
x = torch.randn(9, 4, 3, requires_grad=True)
loss = mo.MomentLoss(mo.Moments(torch.zeros(12), torch.ones(12), shapes=((4, 3),)), mo.AdamMovingAverage(lr=0.1))
for _ in range(3):
    value = loss(x)
value.backward()
torch.save([value.detach(), x.grad, loss.state_dict()["var_average"]], {path!r})
"""


def python(code, path=None, **environment):
    """Runs code in a new interpreter; `path` comes before the installed packages."""
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=path or os.getcwd()
    )


def spied(monkeypatch):
    """Names of the backends that operators are run on."""
    names = []
    select = backends.select

    def spy(*arguments):
        names.append(select(*arguments))
        return names[-1]

    monkeypatch.setattr(backends, "select", spy)
    return names


def test_auto_takes_the_kernels_where_they_are(monkeypatch):
    names = spied(monkeypatch)
    mo.moments(torch.randn(4, 3))
    assert names == ["cpu"]
    assert backends.chosen("moments", "cpu") == "cpu"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_forced_backend_runs_every_operator(monkeypatch, name):
    names = spied(monkeypatch)
    x = torch.randn(4, 3, requires_grad=True)
    with mo.backend(name):
        mo.moment_loss(x, make_target([(3,)])).backward()
        mo.moment_loss(mo.moments(x), make_target([(3,)])).backward()
    assert set(names) == {name}


def test_a_forced_backend_ends_with_its_block(monkeypatch):
    names = spied(monkeypatch)
    with mo.backend("reference"), mo.backend("cpu"):
        mo.moments(torch.randn(4, 3))
    with pytest.raises(KeyError), mo.backend("reference"):
        raise KeyError
    mo.moments(torch.randn(5, 3))
    assert names == ["cpu", "cpu"]


CALLS = {
    "moments": lambda x: mo.moments(x).var.sum(),
    "tap": lambda x: sum(y.sum() for y in relu_moments(x)),
    "identity tap": lambda x: sum(y.sum() for y in identity_moments(x)),
    "moment_loss": lambda x: mo.moment_loss(x, make_target([(3,)])),
    "covariance": lambda x: mo.covariance(x).sum(),
    "covariance_loss": lambda x: mo.covariance_loss(x, torch.eye(3)),
    "gram": lambda x: mo.gram_matrix(x.view(1, 2, 2, 3)).sum(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("inside", "outside"), [("cpu", "reference"), ("reference", "cpu")])
def test_a_backward_outside_of_the_block_gives_the_gradient(call, inside, outside):
    x = torch.randn(4, 3)
    gradients = []
    for forward, backward in ((inside, outside), (outside, outside)):
        leaf = x.clone().requires_grad_()
        with mo.backend(forward):
            value = call(leaf)
        with mo.backend(backward):
            value.backward()
        gradients.append(leaf.grad)
    assert_close(gradients[0], gradients[1].double(), rows=4)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backward_runs_on_the_backend_that_is_forced_where_it_runs(call, name):
    x = torch.randn(4, 3, requires_grad=True)
    with mo.backend(name):
        value = call(x)
    with mo.backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was forced but cannot run .*_backward"):
        value.backward()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_run_says_why(name):
    with (
        mo.backend(name),
        pytest.raises(RuntimeError, match=rf"'{name}' was forced but cannot run moments: .*cpu"),
    ):
        mo.moments(torch.randn(4, 3))


def test_an_operator_without_a_kernel_of_its_own_runs_on_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "_warned", {"reference"})
    assert backends.select("no_such_operator", torch.ones(1)) == "reference"
    with mo.backend("cpu"), pytest.raises(RuntimeError, match=r"no_such_operator: .* has no CPU kernel for it"):
        backends.select("no_such_operator", torch.ones(1))


def test_a_forced_backend_that_cannot_run_leaves_the_state():
    loss = mo.MomentLoss(make_target([(3,)]), mo.AdamMovingAverage())
    x = torch.randn(4, 3)
    with mo.backend("triton"), pytest.raises(RuntimeError, match="triton"):
        loss(x)
    assert int(loss.step) == 0


def test_the_environment_variable_forces_a_backend():
    code = "import torch; from moment_ops.ops import backends; print(backends.select('x', torch.ones(1)))"
    assert python(code, MOMENT_OPS_BACKEND="reference").stdout.strip() == "reference"
    assert "'cuda' was forced" in python(code, MOMENT_OPS_BACKEND="cuda").stderr


def test_an_unknown_name_in_the_environment_variable_raises():
    result = python("import torch, moment_ops as mo; mo.moments(torch.ones(2, 2))", MOMENT_OPS_BACKEND="metal")
    assert result.returncode != 0
    assert re.search(r"ValueError: .*metal.*expected one of", result.stderr)


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory):
    """A copy of the package that was never built."""
    folder = tmp_path_factory.mktemp("unbuilt")
    shutil.copytree(PACKAGE, folder / "moment_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__", "training"))
    return folder


def test_without_the_extension_the_numbers_are_the_same_after_one_warning(without_extension, tmp_path):
    paths = [str(tmp_path / "unbuilt.pt"), str(tmp_path / "built.pt")]
    result = python(NUMBERS.format(path=paths[0]), without_extension)
    assert result.returncode == 0, result.stderr
    exec(NUMBERS.format(path=paths[1]), {})
    for one, other in zip(*(torch.load(path) for path in paths), strict=True):
        assert_close(one, other.double(), rows=36)
    assert result.stderr.count("moment_ops runs on plain PyTorch") == 1
    assert "the C++ extension is not built" in result.stderr


def test_without_the_extension_forcing_it_says_how_to_build_it(without_extension):
    code = "import torch, moment_ops as mo\nwith mo.backend('cpu'): mo.moments(torch.ones(2, 2))"
    result = python(code, without_extension)
    assert "RuntimeError: backend 'cpu' was forced" in result.stderr
    assert "pip install" in result.stderr


def test_an_extension_that_does_not_load_says_why(without_extension, tmp_path):
    shutil.copytree(without_extension, tmp_path / "broken")
    (tmp_path / "broken" / "moment_ops" / "_C.abi3.so").write_bytes(b"not a library")
    code = "import torch, moment_ops as mo; print(mo.moments(torch.ones(2, 2)).var.tolist())"
    result = python(code, tmp_path / "broken")
    assert result.stdout.strip() == "[0.0, 0.0]", result.stderr
    assert "_C.abi3.so does not load" in result.stderr


def test_libraries_of_other_builds_are_left_alone(without_extension, tmp_path):
    """Before ours in the alphabet, and after it."""
    package = tmp_path / "several" / "moment_ops"
    shutil.copytree(without_extension / "moment_ops", package)
    shutil.copy(extension.LIBRARY, package)
    for other in ("_C.abi2.so", "_C.so", "_C.cpython-310-x86_64-linux-gnu.so"):
        (package / other).write_bytes(b"not a library")
    result = python("from moment_ops.ops import extension; print(extension.missing())", package.parent)
    assert result.stdout.strip() == "None", result.stdout + result.stderr
    (package / extension.LIBRARY.name).unlink()
    result = python("from moment_ops.ops import extension; print(extension.missing())", package.parent)
    assert "is not built" in result.stdout


def test_importing_needs_torch_and_numpy_alone():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import moment_ops;"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert {"moment_ops"} <= set(ast.literal_eval(python(code).stdout)) <= {"moment_ops", "numpy", "torch"}


def test_the_report_names_versions_and_every_backend():
    report = environment.report()
    for fragment in (mo.__version__, torch.__version__, "python", "numpy"):
        assert fragment in report
    for name in backends.NAMES[1:]:
        assert re.search(rf"^  {name}\s+(available|not available: .+)$", report, re.MULTILINE)
    for operator in OPERATORS:
        assert re.search(rf"^  {operator} +cpu$", report, re.MULTILINE)
    # Of products of torch, on every device.
    assert "polar" not in report


def test_the_report_says_why_a_backend_is_missing(without_extension):
    result = python("from moment_ops import environment; print(environment.report())", without_extension)
    assert re.search(r"  cpu +not available: the C\+\+ extension is not built; build it with", result.stdout)
    assert re.search(r"^  moments +reference$", result.stdout, re.MULTILINE)
    # Around the BLAS of torch: they need no extension.
    assert re.search(r"^  covariance +cpu$", result.stdout, re.MULTILINE)


def test_the_report_tells_of_gpus_where_a_dtype_has_no_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    assert re.search(r"^  gram +cpu +triton \(float64: reference\)$", environment.report(), re.MULTILINE)


@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_report_says_is_what_auto_takes(operator, dtype):
    x = torch.ones(2, 2, dtype=dtype)
    assert backends.chosen(operator, "cpu", dtype) == backends.select(operator, x)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_every_kernel_that_is_registered_is_there(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    kernels = [kernel for operator in OPERATORS if (kernel := registry.find(backend, operator))]
    assert kernels
    assert all(callable(kernel.load()) for kernel in kernels)


def test_reading_the_registry_does_not_import_triton():
    code = (
        "import sys; from moment_ops.ops import registry; assert registry.find('triton', 'moments');"
        "print('triton' in sys.modules)"
    )
    assert python(code).stdout.strip() == "False"


def test_features_of_another_device_type_run_on_the_reference():
    m = mo.moments(torch.empty(4, 3, device="meta"))
    assert m.mean.shape == m.var.shape == (3,)
    assert m.mean.device.type == "meta"


def test_backends_agree():
    features = make_features(33)
    results = []
    for name in ("cpu", "reference"):
        with mo.backend(name):
            results.append(mo.moments(features))
    assert_close(results[0].var, results[1].var.double(), rows=33)
