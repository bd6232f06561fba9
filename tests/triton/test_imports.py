"""What the kernels import, and the operators that they say they have: read from their text, without Triton."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = sorted(path.stem for path in KERNELS.glob("*.py"))
# The record types, the averages that they name, and the packed layout.
ALLOWED = {"moment_ops.ops.records", "moment_ops.ops.averages", "moment_ops.ops.triangle"}


def tree(name):
    return ast.parse((KERNELS / f"{name}.py").read_text())


def imported(name):
    """All modules that a module imports, wherever it does."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_allowed(module):
    return any(f"{module}.".startswith(f"{allowed}.") for allowed in (*ALLOWED, "moment_ops.kernels"))


@pytest.mark.parametrize("name", MODULES)
def test_kernels_import_nothing_of_the_package_but_kernels_records_averages_and_the_packed_layout(name):
    assert [module for module in imported(name) if module.startswith("moment_ops") and not is_allowed(module)] == []


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("_")])
def test_operators_are_a_literal_and_public_functions_of_their_module(name):
    """(operator -> dtypes)"""
    body = tree(name).body
    (table,) = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPERATORS"
    ]
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    assert table
    for operator, dtypes in table.items():
        assert not functions[operator].decorator_list
        assert set(dtypes) <= {"float32", "bfloat16", "float16", "float64"}


def test_averages_are_named_in_one_file():
    named = [name for name in MODULES if any("ops.averages" in module for module in imported(name))]
    assert named == ["_averages"]
