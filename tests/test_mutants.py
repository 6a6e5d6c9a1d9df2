"""The verifier catches what it is for: each planted fault by the check that is meant for it, and nothing else."""

from functools import cache

import pytest

from verify import mutants
from verify.checks import SCALAR
from verify.mutants import MUTANTS, Mutant, Outcome

QUICK = (
    "no fault in bfloat16",
    "no fault in float32",
    "perturbed coefficient",
    "flipped side bit",
    "shifted turning point",
    "dropped clamp",
    "one NaN",
    "skipped range",
    "swapped activation",
    "wrong closed form",
    "bin off",
    "wrong at a break",
    "gradient of one's own",
    "other forward of a foreign layer",
)


@cache
def outcome(name: str) -> Outcome:
    return MUTANTS[name].run()


@pytest.mark.parametrize("name", QUICK)
def test_the_fault_is_caught_by_name(name):
    assert outcome(name).caught, mutants.escaped(outcome(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in QUICK])
def test_every_other_fault_is_caught_by_name(name):
    assert outcome(name).caught, mutants.escaped(outcome(name))


def test_every_check_has_a_mutant_that_it_must_catch():
    controls = (outcome(name) for name, mutant in MUTANTS.items() if not mutant.checks)
    names = {check.name.removesuffix(SCALAR) for o in controls for check in o.record.checks if check.bound is not None}
    assert names <= {name for mutant in MUTANTS.values() for name in mutant.checks}


def test_a_harmless_mutant_survives():
    honest = outcome("no fault in bfloat16").record
    harmless = Mutant("harmless", "nothing is wrong", "bfloat16", ("gradient error",), lambda target: target.layer)
    assert not Outcome(harmless, honest).caught


def test_a_mutant_caught_by_the_wrong_check_counts_as_survived():
    found = outcome("skipped range")
    other = Mutant("other", "something else", "bfloat16", ("one tail",), lambda target: target.layer)
    assert found.caught
    assert not Outcome(other, found.record).caught
