"""Single inputs with an exact answer: far out, the largest values, the zeros, the infinities and NaN.

Guarantees that each runs through the vector body and through the scalar tail. Must not know error floors: here a
gradient is right where it is that of some input with the same stored output in the same tail.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from invref.formats import Format
from verify import batches
from verify.oracle import TAIL, Oracle
from verify.record import Check, WorstInput
from verify.sharing import near, rounded, sharing
from verify.targets import Target

FAR = 1e20

SETTLED = 1e-18
"""f' this near to 0 or 1 has reached it in every format: the gradient must be the limit itself."""


def limits(target: Target, fmt: Format, oracle: Oracle) -> list[Check]:
    """One check an input, measured as the distance from the right gradients, and one for the infinities and NaN.

    Inputs at a jump are left out, and those whose output overflows where f' has no bound.
    """
    largest = fmt.value(fmt.largest_ordinal)
    named = {
        "gradient at 1e20": fmt.ordinal(min(FAR, largest)),
        "gradient at the largest value": fmt.largest_ordinal,
        "gradient at the most negative value": fmt.first_ordinal,
        "gradient at +0": 0,
        "gradient at -0": -1,
    }
    found = [_exactly(name, ordinal, target, fmt, oracle) for name, ordinal in named.items()]
    checks = [*(check for check in found if check), _as_native(target, fmt, oracle)]
    if target.held(fmt.dtype):
        return checks
    return [replace(check, bound=None, holds=True) for check in checks]


def _exactly(name: str, ordinal: int, target: Target, fmt: Format, oracle: Oracle) -> Check | None:
    if any(edge.first <= ordinal < edge.stop for edge in oracle.edges(fmt)):
        return None
    copies = fmt.tensor(ordinal, 1).repeat(batches.VECTOR)
    outcomes = [path(target.layer, copies) for path in (batches.together, batches.in_slices)]
    if oracle.relative and any(bool(y.isinf().any()) for y, _ in outcomes):
        return None
    inputs = np.array([fmt.value(o) for o in sharing(ordinal, target, fmt, oracle)])
    slopes = oracle.exact(inputs)
    slope = float(slopes[0])
    settled = round(slope) if abs(slope) < 2 and abs(slope - round(slope)) < TAIL else slope
    right = rounded([*slopes.tolist(), settled], fmt)
    gradients = torch.cat([dx for _, dx in outcomes]).double()
    outside = torch.maximum(min(right) - gradients, gradients - max(right)).clamp(min=0.0)
    bound = 0.0 if (abs(slope - settled) < SETTLED and settled != slope) or slope in (0.0, 1.0) else near(slope, fmt)
    at = WorstInput.of(fmt, ordinal, oracle.piece_at(fmt, ordinal))
    # torch's max keeps NaN, so that it fails the check.
    return Check.at_most(name, float(outside.max()), bound, at)


def _as_native(target: Target, fmt: Format, oracle: Oracle) -> Check:
    """+inf, -inf and NaN give the outputs and gradients that the framework's layer gives; NaN equals NaN.

    Where its vector and its scalar code give different gradients, each will do. Where finite inputs give the same
    output, theirs is right too.
    """
    different = 0
    for special, end in ((math.inf, fmt.largest_ordinal), (-math.inf, fmt.first_ordinal), (math.nan, None)):
        x = torch.full((batches.VECTOR,), special, dtype=fmt.dtype)
        for path in (batches.together, batches.in_slices):
            (y, dx), (native_y, _) = path(target.layer, x), path(target.native, x)
            different += not torch.equal(_nan_as_one(y), _nan_as_one(native_y))
            native_dx = [each(target.native, x)[1] for each in (batches.together, batches.in_slices)]
            other = torch.stack([_nan_as_one(dx) != _nan_as_one(theirs) for theirs in native_dx]).all(0)
            if not other.any():
                continue
            different += end is None or not _as_finite(dx[other], native_dx[0], y[other], end, target, fmt, oracle)
    name = "infinities and NaN as the framework"
    if target.role == "formula":
        return Check(name, float(different), None, True)
    return Check.at_most(name, float(different), 0.0)


def _as_finite(dx: Tensor, native_dx: Tensor, y: Tensor, end: int, target: Target, fmt: Format, oracle: Oracle) -> bool:
    """Whether gradients at an infinity lie between the framework's and those of finite inputs with the same output."""
    if bool((target.native(fmt.tensor(end, 1)) != y).any()):
        return False
    if bool(y.isinf().any()):
        return bool(dx.isfinite().all())
    inputs = np.array([fmt.value(o) for o in sharing(end, target, fmt, oracle)])
    slopes = [*oracle.exact(inputs).tolist(), float(native_dx[0])]
    right = rounded([slope for slope in slopes if not math.isnan(slope)], fmt)
    return bool(((min(right) <= dx) & (dx <= max(right))).all())


def _nan_as_one(values: Tensor) -> Tensor:
    """Bit patterns, all NaNs alike."""
    values = torch.where(values.isnan(), torch.full_like(values, math.nan), values)
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
