"""What must hold: measured numbers to named checks with their bounds.

Guarantees one check for each promise about the gradient, under a name that says which promise. Must not know how the
numbers were measured.
"""

from __future__ import annotations

from invref.formats import Format
from verify.oracle import FLOAT32, TOLERANCE, Oracle
from verify.record import Check, WorstInput
from verify.scan import (
    BEYOND_ROUNDING,
    BEYOND_STORED,
    DECODER,
    FORWARD,
    GRADIENT,
    NATIVE_NONFINITE,
    NONFINITE,
    NOWHERE,
    ONE_TAIL,
    WRONG_SIGN,
    ZERO_TAIL,
    Tally,
)

SCALAR = " (scalar tail)"
"""Added to the names of checks that ran element by element."""

DECODER_BOUND = 2.0**-20
ZERO_TAIL_BOUND = 1e-5


def floor_factor(fmt: Format) -> float:
    """How many times the error floor's maximum the worst error may be."""
    return 1.05 if fmt.bits == 16 else 1.10


def worst_input(oracle: Oracle, fmt: Format, at: int) -> WorstInput | None:
    """The input of `fmt` at float32 ordinal `at`, with its piece; None for `NOWHERE`."""
    if at == NOWHERE:
        return None
    piece = next(part.piece.index for part in oracle.ranges if part.first <= at < part.stop)
    return WorstInput.of(fmt, fmt.ordinal(FLOAT32.value(int(at))), piece)


def of_tally(tally: Tally, fmt: Format, oracle: Oracle, floor: float, suffix: str = "") -> list[Check]:
    """The checks of a tally over inputs of a 16- or 32-bit format whose error floor's maximum is `floor`.

    Measured errors include the oracle's own bound, so that they bound the true ones.
    """

    def error(name: str, slot: int, bound: float, slack: float) -> Check:
        at = worst_input(oracle, fmt, int(tally.worst_at[slot]))
        return Check.at_most(name + suffix, float(tally.worst[slot]) + slack, bound, at)

    def none(name: str, slot: int) -> Check:
        at = worst_input(oracle, fmt, int(tally.counts_at[slot]))
        return Check.at_most(name + suffix, float(tally.counts[slot]), 0.0, at)

    slot = BEYOND_ROUNDING if fmt.bits == 16 else GRADIENT
    checks = [
        none("forward identical", FORWARD),
        none("finite gradients", NONFINITE),
        error("gradient error", slot, floor_factor(fmt) * floor, TOLERANCE),
        error("zero tail", ZERO_TAIL, ZERO_TAIL_BOUND, 0.0),
        error("zero tail sign", WRONG_SIGN, 0.0, 0.0),
        error("one tail", ONE_TAIL, fmt.ulp(1.0), TOLERANCE),
    ]
    if fmt is FLOAT32:
        checks += [
            error("decoder error", DECODER, DECODER_BOUND, TOLERANCE),
            error("error beyond stored value", BEYOND_STORED, DECODER_BOUND, 2 * TOLERANCE),
        ]
    if tally.counts[NATIVE_NONFINITE]:
        at = worst_input(oracle, fmt, int(tally.counts_at[NATIVE_NONFINITE]))
        name = "non-finite gradients of the framework's own" + suffix
        checks.append(Check(name, float(tally.counts[NATIVE_NONFINITE]), None, True, at))
    return checks
