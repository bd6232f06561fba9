"""Every specialisation that the specs compile, executed on the smallest shape that takes it."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from emulator.execution import Schedule
from emulator.launcher import compiled
from specs.catalogue import SPECS
from specs.resources import replace, with_constants

from emulated.cases import emulate, planned
from emulated.small import architecture_of, constants, small
from moment_ops.kernels import match


def name_of(spec):
    return f"{spec.name}, sm_{spec.architectures[0]}"


def distinct():
    """One spec of each specialisation and architecture."""
    found = {}
    for spec in SPECS:
        found.setdefault((str(constants(spec.launch())), architecture_of(spec)), spec)
    return list(found.values())


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_every_spec_has_a_small_shape_with_its_constants(spec):
    small(spec)


@pytest.mark.parametrize("spec", distinct(), ids=name_of)
def test_what_is_compiled_for_a_spec_computes_what_float64_does(spec):
    """The spec's own code, on tensors that are aligned as it was told."""
    chosen, architecture = small(spec), architecture_of(spec)
    code = compiled(spec.launch(), architecture)
    with planned(chosen.plan):
        case = chosen.make()
        launches = case.launches(spec.architectures[0])
        index = chosen.index % len(launches)
        again = compiled(launches[index], architecture)
        assert (again.signature, again.constants) == (code.signature, code.constants)
        emulate(case, architecture, Schedule("random"), {index: code}, spec.architectures[0])


def test_a_spec_of_a_kernel_that_is_not_known_here_is_missed_by_name():
    spec = SPECS[0]
    launch = spec.launch()
    unknown = replace(spec, launch=lambda: replace(launch, kernel=match.finish_loss))
    with pytest.raises(LookupError, match=f"finish_loss has no small shape: add one for {spec.name}"):
        small(unknown)


def test_a_spec_whose_constants_no_small_shape_has_is_missed_by_name():
    spec = SPECS[0]
    launch = spec.launch()
    other = with_constants(launch, strip={"FOLD_CHUNKS": 3})
    with pytest.raises(LookupError, match=f"{spec.name} has its constants; the closest differs in .*FOLD_CHUNKS"):
        small(replace(spec, launch=lambda: other))
