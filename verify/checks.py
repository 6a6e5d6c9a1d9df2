"""What must hold: measured numbers to named checks with their bounds.

Guarantees one check for each promise about outputs and gradients, under a name that says which promise; what a target
did not promise is told with no bound. Must not know how the numbers were measured.
"""

from __future__ import annotations

from math import nan

from invref.formats import Format
from verify.oracle import FLOAT32, TOLERANCE, Oracle
from verify.record import Check, WorstInput
from verify.scan import (
    BEYOND_ROUNDING,
    BEYOND_STORED,
    DECODER,
    DIFFERENT,
    FORWARD,
    FORWARD_ULPS,
    GRADIENT,
    NATIVE,
    NATIVE_NONFINITE,
    NATIVE_ULPS,
    NONFINITE,
    NOWHERE,
    ONE_TAIL,
    OVERFLOWED_BADLY,
    WRONG_SIGN,
    ZERO_TAIL,
    Tally,
)
from verify.targets import Target

SCALAR = " (scalar tail)"
"""Added to the names of checks that ran element by element."""

DECODER_BOUND = 2.0**-20
"""What a decoder may add in float32 arithmetic; where the floor is lower still, the gradient is held to this."""

ZERO_TAIL_BOUND = 1e-5
FOREIGN_FACTOR = 2.0
"""A layer that may keep what it likes is held to so many times the framework's own error."""

FLOAT32_KERNEL = 2.0**-18
"""What computing in float32 may add to a gradient that is rounded once, relative to the numbers in it: 64 roundings."""

FORMULA_ULPS = 1.0
"""Our forward of any formula is rounded once, from float64."""


def floor_factor(fmt: Format) -> float:
    """How many times the error floor's maximum the worst error may be."""
    return 1.05 if fmt.bits == 16 else 1.10


def floor_bound(fmt: Format, floor: float) -> float:
    """What the gradient error (in 16 bits beyond its rounding) of a decoder may be."""
    return nan if floor != floor else max(floor_factor(fmt) * floor, DECODER_BOUND)


def native_bound(native_error: float) -> float:
    """What the gradient error of a layer may be that says nothing of what it keeps."""
    return FOREIGN_FACTOR * native_error + DECODER_BOUND


def worst_input(oracle: Oracle, fmt: Format, at: int) -> WorstInput | None:
    """The input of `fmt` at float32 ordinal `at`, with its piece; None for `NOWHERE`."""
    if at == NOWHERE:
        return None
    piece = next(part.piece.index for part in oracle.ranges if part.first <= at < part.stop)
    return WorstInput.of(fmt, fmt.ordinal(FLOAT32.value(int(at))), piece)


def ulps_slack(fmt: Format) -> float:
    """The oracle's own bound of f, in ulps."""
    return TOLERANCE * 2.0**fmt.precision


def of_tally(
    tally: Tally, fmt: Format, oracle: Oracle, target: Target, floor: float | None, shared: float, suffix: str = ""
) -> list[Check]:
    """The checks of a tally over inputs of a 16- or 32-bit format; `floor` is the error floor's maximum there.

    `shared` is the largest |f'| that the stored outputs do not tell from a tail's where f' is nearly 0. Measured errors
    include the oracle's own bound, so that they bound the true ones.
    """

    def error(name: str, slot: int, bound: float | None, slack: float) -> Check:
        at = worst_input(oracle, fmt, int(tally.worst_at[slot]))
        measured = float(tally.worst[slot]) + slack
        if bound is None:
            return Check(name + suffix, measured, None, True, at)
        return Check.at_most(name + suffix, measured, bound, at)

    def count(name: str, slot: int, held: bool) -> Check:
        at = worst_input(oracle, fmt, int(tally.counts_at[slot]))
        measured = float(tally.counts[slot])
        if not held:
            return Check(name + suffix, measured, None, True, at)
        return Check.at_most(name + suffix, measured, 0.0, at)

    def if_held(bound: float) -> float | None:
        return bound if held else None

    native, own = target.role == "native", target.own(fmt.dtype)
    held = target.held(fmt.dtype)
    checks = []
    if target.role == "row":
        checks.append(count("forward identical", FORWARD, True))
    elif target.known:
        allowed = FOREIGN_FACTOR * float(tally.worst[NATIVE_ULPS]) if target.foreign else 0.0
        bound = None if native else max(FORMULA_ULPS, allowed)
        checks.append(error("forward error in ulps", FORWARD_ULPS, bound, ulps_slack(fmt)))
    checks.append(count("finite gradients", NONFINITE, not (native or own)))
    if own:
        checks.append(count("gradient identical", DIFFERENT, True))
    if held and floor is not None:
        slot = BEYOND_ROUNDING if fmt.bits == 16 else GRADIENT
        checks.append(error("gradient error", slot, floor_bound(fmt, floor), TOLERANCE))
    elif target.by_formula:
        checks.append(error("gradient error", BEYOND_ROUNDING, FLOAT32_KERNEL, TOLERANCE))
    else:
        bound = native_bound(float(tally.worst[NATIVE])) if target.foreign else None
        checks.append(error("gradient error", GRADIENT, bound, TOLERANCE))
    checks += [
        error("zero tail", ZERO_TAIL, if_held(max(ZERO_TAIL_BOUND, shared)), 0.0),
        error("zero tail sign", WRONG_SIGN, if_held(0.0), 0.0),
        error("one tail", ONE_TAIL, if_held(fmt.ulp(1.0)), TOLERANCE),
    ]
    if fmt is FLOAT32 and (held or target.foreign) and any(part.low <= part.high for part in oracle.ranges):
        # A foreign layer that keeps more than (y, s) may be nearer to the truth than the stored y is.
        checks += [
            error("decoder error", DECODER, None if target.foreign else DECODER_BOUND, TOLERANCE),
            error("error beyond stored value", BEYOND_STORED, if_held(DECODER_BOUND), 2 * TOLERANCE),
        ]
    if oracle.relative:
        checks.append(count("overflowed gradients", OVERFLOWED_BADLY, not native))
    if tally.counts[NATIVE_NONFINITE] and not native:
        checks.append(count("non-finite gradients of the framework's own", NATIVE_NONFINITE, False))
    return checks
