"""The decoder to read: from a stored output and its side bit to the derivative, in plain torch operations.

This is the algorithm of the whole project. The GPU's kernels agree with it bit for bit; the CPU's evaluate g on a grid
of polynomials instead (`decoders.Cells`), within the certified bounds of both. It runs on any device, in float32
arithmetic without fused multiply-adds, and must not know formulas or how the coefficients were found.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from invref.decoders import Decoder

TAIL, TURN, HEAD = 0, 1, 2


def side_of(decoder: Decoder, x: Tensor) -> Tensor:
    """Side bits of the inputs x (float32 or narrower, any shape): True on the right piece, False on the left.

    NaN and +inf count as left, too: y may overflow to +inf for finite x, which still decodes to 1, while at x = +inf
    the gradient is NaN, as that of torch's layers is.
    """
    return (x.float() > float(decoder.threshold(np.float32))) & (x < float("inf"))


def derivative(decoder: Decoder, y: Tensor, side: Tensor, fmt: str) -> Tensor:
    """g(y, s) in float32, shape of y.

    y: float32 outputs (those of narrower formats widened), side: bool, same shape; fmt: name of the format in which y
    was stored, which selects the clamp. NaN comes out only for y = NaN, and for y > 0 on the left (from x = +inf).
    """
    clamp = decoder.clamps[fmt]
    high, low = decoder.turning_value(np.float32)

    # The signed root t. y* is a sum of two floats: no float equals it, and near it y - y* is all that counts.
    d = (y - float(high)) - float(low)
    d = torch.where(d < clamp.cut, clamp.base + clamp.slope * d.clamp(min=0), d)
    tail = ~side & (y > decoder.tail_y)
    # torch.sqrt is not correctly rounded in float32 on every CPU; by way of float64 it is, everywhere.
    root = torch.sqrt(torch.where(tail, -y, d).double()).float()
    u = torch.where(tail | side, root, -root)
    u = torch.where(u > decoder.end_t, decoder.end_t, u)

    # Three segments of one shape, c + m * P(z) / Q(z): exact 0 at y = 0 on the left, exact 1 from end_t on.
    head = u > decoder.head_t
    segment = torch.where(tail, TAIL, torch.where(head, HEAD, TURN))
    m = torch.where(tail, y, torch.where(head, decoder.end_t - u, u))
    c = torch.where(head, 1.0, 0.0)

    segments = (decoder.tail, decoder.turn, decoder.head)
    z = u - _select([s.centre for s in segments], segment)
    numerator = _horner([s.numerator for s in segments], segment, z)
    denominator = _horner([(1.0, *s.denominator) for s in segments], segment, z)
    return c + m * (numerator / denominator)


def _select(values: list[float], segment: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=segment.device)[segment]


def _horner(coefficients: list[tuple[float, ...]], segment: Tensor, z: Tensor) -> Tensor:
    columns = list(zip(*coefficients, strict=True))
    value = _select(list(columns[-1]), segment)
    for column in reversed(columns[:-1]):
        value = value * z + _select(list(column), segment)
    return value


def backward(decoder: Decoder, dy: Tensor, y: Tensor, side: Tensor, fmt: str) -> Tensor:
    """dy * g(y, s), computed in float32 and rounded once to the dtype of y."""
    return (dy.float() * derivative(decoder, y.float(), side, fmt)).to(y.dtype)
