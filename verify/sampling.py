"""Which inputs a sampled run takes: runs of consecutive floats around landmarks, and log-uniform random ones.

Guarantees the same inputs for the same arguments. Must not know what is done with them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from invref.formats import Format
from verify.oracle import Oracle

SEED = 20240723


def ordinals(fmt: Format, oracle: Oracle, count: int, span: int) -> NDArray[np.int64]:
    """Sorted distinct ordinals of `fmt`: `span` on each side of every landmark, and `count` random ones.

    Half of those are uniform in the ordinal, so log-uniform over the whole format, half between the tails.
    """
    random = np.random.default_rng(SEED)
    largest = fmt.largest_ordinal
    left, right = (fmt.ordinal(end) if np.isfinite(end) else 0 for end in oracle.tails)
    everywhere = random.integers(fmt.first_ordinal, largest + 1, count // 2)
    scale = random.uniform(-10, 0, count - count // 2)
    side = np.where(random.integers(0, 2, scale.size), fmt.value(left), fmt.value(right))
    between = _ordinals(fmt, side * 2.0**scale)
    smallest_normal = fmt.ordinal(2.0**fmt.emin)
    ones = fmt.ordinal(1.0), fmt.ordinal(-1.0)
    marks = [0, smallest_normal, -smallest_normal, *ones, left, right, largest, fmt.first_ordinal]
    marks += [start for _, start in oracle.cuts(fmt)]
    near = (np.array(marks, dtype=np.int64)[:, None] + np.arange(-span, span)).ravel()
    chosen = np.unique(np.concatenate([everywhere, between, near]))
    return chosen[(chosen >= fmt.first_ordinal) & (chosen <= largest)]


def _ordinals(fmt: Format, values: NDArray[np.float64]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = fmt.ordinals(torch.from_numpy(values).to(fmt.dtype)).numpy()
    return found
