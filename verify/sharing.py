"""Inputs that share one stored pair (output, side code): no decoder can tell their gradients apart.

Guarantees that every input returned does share it. Must not know checks.
"""

from __future__ import annotations

from math import inf

import numpy as np
import torch

from invref.formats import Format
from invref.pieces import landmarks
from verify.checks import DECODER_BOUND
from verify.oracle import TAIL, TOLERANCE, Oracle
from verify.targets import Target


def sharing(ordinal: int, target: Target, fmt: Format, oracle: Oracle) -> list[int]:
    """An input, and those farthest from it on both sides that give the same output with the same side code.

    An input at a jump, or exactly at the end of a piece (as both zeros are for x*x), may have the code of the piece on
    its left or on its right. Only the input itself where the target does not state its codes.
    """
    if target.codes is None:
        return [ordinal]
    sides = {target.codes[oracle.piece_at(fmt, ordinal)]}
    for edge in oracle.edges(fmt):
        if edge.first <= ordinal < edge.stop:
            sides |= {target.codes[oracle.piece_at(fmt, near)] for near in (edge.first - 1, edge.stop)}
    for index, mark in enumerate(landmarks(target.formula)):
        if float(mark.x) == fmt.value(ordinal):
            sides |= {target.codes[index], target.codes[index + 1]}
    ends = (fmt.first_ordinal, fmt.largest_ordinal)
    return [ordinal, *(_farthest(ordinal, end, sides, target, fmt, oracle) for end in ends)]


def zero_tail(target: Target, fmt: Format, oracle: Oracle) -> float:
    """The largest |f'| of inputs that share their stored pair with inputs of a tail where f' is nearly 0."""
    left, right = oracle.tails
    ends = [fmt.first_ordinal, fmt.largest_ordinal]
    # The last inputs of the tails, where those leave any.
    ends += [fmt.ordinal(left) - 1] if left > -inf and left < inf else []
    ends += [fmt.ordinal(right) + 1] if right > -inf and right < inf else []
    largest = 0.0
    for end in ends:
        if not fmt.first_ordinal <= end <= fmt.largest_ordinal:
            continue
        slopes = np.abs(oracle.exact(np.array([fmt.value(o) for o in sharing(end, target, fmt, oracle)])))
        if slopes[0] < TAIL:
            largest = max(largest, float(slopes.max()))
    return largest


def _farthest(ordinal: int, end: int, sides: set[int], target: Target, fmt: Format, oracle: Oracle) -> int:
    """By bisection: exact where the output is monotone up to `end`."""
    codes = target.codes or ()

    def same(other: int) -> bool:
        if codes[oracle.piece_at(fmt, other)] not in sides:
            return False
        y = target.layer(torch.cat([fmt.tensor(ordinal, 1), fmt.tensor(other, 1)]))
        return bool(y[0] == y[1])

    inside, outside = (end, end) if same(end) else (ordinal, end)
    while abs(inside - outside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if same(middle) else (inside, middle)
    return inside


def rounded(values: list[float], fmt: Format) -> list[float]:
    """Numbers rounded to the format."""
    result: list[float] = torch.tensor(values, dtype=torch.float64).to(fmt.dtype).double().tolist()
    return result


def near(slope: float, fmt: Format) -> float:
    """What a decoder's arithmetic and its rounding may add to a gradient."""
    allowed = TOLERANCE if fmt.bits == 64 else DECODER_BOUND
    return allowed * max(1.0, abs(slope)) + fmt.ulp(slope)
