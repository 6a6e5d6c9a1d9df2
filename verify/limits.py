"""Single inputs with an exact answer: far out, the largest values, the zeros, the infinities and NaN.

Guarantees that each runs through the vector body and through the scalar tail. Must not know error bounds: here the
gradient is right or wrong.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from invref.formats import Format
from verify import batches
from verify.oracle import TAIL, cuts_of, exact_slopes
from verify.record import Check, WorstInput
from verify.targets import Target

FAR = 1e20


def limits(target: Target, fmt: Format) -> list[Check]:
    """One check an input, measured as the distance from the exact gradient, and one for the infinities and NaN."""
    largest = fmt.value(fmt.largest_ordinal)
    named = {
        "gradient at 1e20": min(FAR, largest),
        "gradient at the largest value": largest,
        "gradient at the most negative value": -largest,
        "gradient at +0": 0.0,
        "gradient at -0": -0.0,
    }
    return [*(_exactly(name, x, target, fmt) for name, x in named.items()), _as_native(target, fmt)]


def _exactly(name: str, x: float, target: Target, fmt: Format) -> Check:
    slope = float(exact_slopes(target.formula, np.array([x]))[0])
    # In a tail the limit is asked for itself, else f' rounded to the format.
    settled = round(slope) if abs(slope - round(slope)) < TAIL else slope
    expected = torch.tensor(settled, dtype=torch.float64).to(fmt.dtype)
    ordinal = fmt.ordinal(x)
    copies = fmt.tensor(ordinal, 1).repeat(batches.VECTOR)
    gradients = [path(target.layer, copies)[1].double() for path in (batches.together, batches.in_slices)]
    # torch's max keeps NaN, so that it fails the check.
    worst = float((torch.cat(gradients) - expected.double()).abs().max())
    piece = sum(ordinal >= cut for cut in cuts_of(target.formula, fmt))
    return Check.at_most(name, worst, 0.0, WorstInput.of(fmt, ordinal, piece))


def _as_native(target: Target, fmt: Format) -> Check:
    """+inf, -inf and NaN give the outputs and gradients that the framework's layer gives; NaN equals NaN."""
    different = 0
    for special in (math.inf, -math.inf, math.nan):
        x = torch.full((batches.VECTOR,), special, dtype=fmt.dtype)
        for path in (batches.together, batches.in_slices):
            pairs = zip(path(target.layer, x), path(target.native, x), strict=True)
            different += sum(not torch.equal(_nan_as_one(ours), _nan_as_one(theirs)) for ours, theirs in pairs)
    return Check.at_most("infinities and NaN as the framework", float(different), 0.0)


def _nan_as_one(values: Tensor) -> Tensor:
    """Bit patterns, all NaNs alike."""
    values = torch.where(values.isnan(), torch.full_like(values, math.nan), values)
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
