"""The inputs exactly at a jump of f or of its derivative, where there is no one gradient to compare with.

Guarantees that each runs through the vector body and through the scalar tail. Must not know error floors: a gradient
between the two one-sided derivatives is right, as is that of other inputs with the same stored output.
"""

from __future__ import annotations

from math import inf, isnan

import numpy as np
import torch
from torch import Tensor

from invref.formats import Format
from verify import batches
from verify.oracle import Oracle
from verify.ranges import Edge
from verify.record import Check, WorstInput
from verify.sharing import near, rounded, sharing
from verify.targets import Target

NAME = "between the one-sided derivatives at breaks"


def count(oracle: Oracle, fmt: Format) -> int:
    """How many inputs of the format lie at a jump."""
    return sum(edge.stop - edge.first for edge in oracle.edges(fmt))


def checks(target: Target, fmt: Format, oracle: Oracle) -> list[Check]:
    """One check over all inputs at jumps: how far from the right gradients one is; none without jumps.

    A row of the catalogue also fails it (by infinity) where its output there is not the framework's.
    """
    found = [
        (*_distance(target, fmt, oracle, edge, ordinal), ordinal)
        for edge in oracle.edges(fmt)
        for ordinal in range(edge.first, edge.stop)
    ]
    if not found:
        return []
    # NaN sorts nowhere: it is taken for infinite, so that it is the worst.
    distance, allowed, ordinal = max(found, key=lambda entry: inf if isnan(entry[0]) else entry[0] - entry[1])
    worst = WorstInput.of(fmt, ordinal, oracle.piece_at(fmt, ordinal))
    if target.role == "native":
        return [Check(NAME, distance, None, True, worst)]
    return [Check.at_most(NAME, distance, allowed, worst)]


def _distance(target: Target, fmt: Format, oracle: Oracle, edge: Edge, ordinal: int) -> tuple[float, float]:
    """How far the gradient of one input is from the right ones rounded to the format, and how far it may be."""
    x = fmt.tensor(ordinal, 1).repeat(batches.VECTOR)
    outcomes = [path(target.layer, x) for path in (batches.together, batches.in_slices)]
    if target.role == "row" and not all(torch.equal(y, target.native(x)) for y, _ in outcomes):
        return inf, 0.0
    others = np.array([fmt.value(o) for o in sharing(ordinal, target, fmt, oracle)[1:] if o != ordinal])
    right = rounded([edge.least, edge.largest, *oracle.exact(others).tolist()], fmt)
    gradients: Tensor = torch.cat([dx for _, dx in outcomes]).double()
    outside = torch.maximum(min(right) - gradients, gradients - max(right)).clamp(min=0.0)
    return float(outside.max()), near(max(map(abs, right)), fmt)
