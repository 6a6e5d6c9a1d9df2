"""The statistics of paired runs: is an arm's outcome equivalent to native's, different, or is that undecided?

Two one-sided tests (TOST) on the differences between runs from the same seed, against a margin that a rule fixes
before any difference is seen. Guarantees that a difference that is not finite never passes as equivalent. Must not know
what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from invref.errors import MissingError

Verdict = Literal["equivalent", "different", "undecided"]

ALPHA = 0.05
"""The level of each of the two one-sided tests; the confidence interval then covers 1 - 2 ALPHA."""
POWER = 0.8
"""The probability to decide at which a number of seeds is called enough."""
OF_SPREAD, OF_VALUE = 0.1, 0.002
"""The margin: a tenth of native's standard deviation from seed to seed, or 0.2 % of the value if that is larger."""
MOST_SEEDS = 10_000
"""More seeds than this are not counted: nobody trains them."""
BAND = math.sqrt(3)
"""Factor on the twin's distance within which an arm's is equivalent.

The twin's noise is uniform within the error floor. A decoder that errs by the whole floor everywhere, the most that one
without excess can, has sqrt(3) times that noise's root mean square.
"""


@dataclass(frozen=True)
class Margin:
    """How far apart means may be, and which rule gave it."""

    value: float
    rule: str

    def to_json(self) -> dict[str, Any]:
        """The fields, with None for a value that is not finite."""
        return _finite(asdict(self))


@dataclass(frozen=True)
class Test:
    """What the paired differences of one quantity say.

    mean, low, high: of the differences, with the interval of confidence 1 - 2 ALPHA; p: the larger of the two one-sided
    tests'; power: of deciding for equivalence with these seeds were the true difference 0; needed: seeds that would
    decide with probability POWER, None where more than MOST_SEEDS or none would.
    """

    verdict: Verdict
    seeds: int
    mean: float
    low: float
    high: float
    margin: float
    p: float
    power: float
    needed: int | None

    def to_json(self) -> dict[str, Any]:
        """The fields, with None for what is not finite."""
        return _finite(asdict(self))


def margin(native: Sequence[float], spread: float = OF_SPREAD, of_value: float = OF_VALUE) -> Margin:
    """The margin from native's own outcomes, before any other arm's is looked at."""
    values = np.asarray(native, np.float64)
    from_spread = spread * float(values.std(ddof=1)) if values.size > 1 else 0.0
    from_value = of_value * abs(float(values.mean()))
    if from_spread > from_value:
        return Margin(from_spread, f"{spread:g} of native's standard deviation from seed to seed")
    return Margin(from_value, f"{of_value:.1%} of native's mean")


def paired(differences: Sequence[float], allowed: float) -> Test:
    """TOST of the mean difference against -allowed and +allowed; at least two differences."""
    values = np.asarray(differences, np.float64)
    n = values.size
    if n < 2:
        raise ValueError(f"{n} paired differences have no spread: give at least 2")
    if not np.isfinite(values).all():
        # A run that ended in inf or NaN is as different as can be, however few the seeds.
        return Test("different", n, math.nan, -math.inf, math.inf, allowed, 1.0, math.nan, None)
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    error = spread / math.sqrt(n)
    reach = quantile(1 - ALPHA, n - 1) * error
    low, high = mean - reach, mean + reach
    verdict: Verdict = "undecided"
    if -allowed < low and high < allowed:
        verdict = "equivalent"
    elif low > allowed or high < -allowed:
        verdict = "different"
    return Test(verdict, n, mean, low, high, allowed, _p(mean, error, n, allowed), power(spread, n, allowed),
                seeds_needed(mean, spread, allowed))  # fmt: skip


def ratio(distances: Sequence[float], reference: Sequence[float], factor: float = BAND) -> Test:
    """Whether distances are at most `factor` times the reference's: paired logarithms; one-sided, less is fine.

    mean, low, high and margin are factors.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.asarray(distances, np.float64)) - np.log(np.asarray(reference, np.float64))
    if (logs == -np.inf).all() or not np.isfinite(logs).all():
        # No distance at all is within any band; anything else that is not finite is not.
        verdict: Verdict = "equivalent" if (logs == -np.inf).all() else "different"
        return Test(verdict, logs.size, math.nan, math.nan, math.nan, factor, 1.0, math.nan, None)
    found = paired(logs.tolist(), math.log(factor))
    verdict = "undecided"
    if found.high < math.log(factor):
        verdict = "equivalent"
    elif found.low > math.log(factor):
        verdict = "different"
    mean, low, high = (math.exp(value) for value in (found.mean, found.low, found.high))
    return Test(verdict, found.seeds, mean, low, high, factor, found.p, found.power, found.needed)


def power(spread: float, n: int, allowed: float) -> float:
    """The probability that TOST with n seeds finds equivalence where there is no difference.

    By the shifted t distribution, which is on the safe side of the exact one.
    """
    if spread == 0:
        return 1.0
    t = students()
    reach = allowed * math.sqrt(n) / spread - quantile(1 - ALPHA, n - 1)
    return max(0.0, 2 * float(t.cdf(reach, n - 1)) - 1)


def seeds_needed(mean: float, spread: float, allowed: float) -> int | None:
    """Seeds with which the interval around `mean` clears the nearer margin with probability POWER, as far as known."""
    room = abs(allowed - abs(mean))
    if room == 0:
        return None
    n = 2
    while n <= MOST_SEEDS:
        if room > (quantile(1 - ALPHA, n - 1) + quantile(POWER, n - 1)) * spread / math.sqrt(n):
            return n
        n += 1 + n // 50
    return None


@cache
def quantile(share: float, freedom: int) -> float:
    """Student's t."""
    return float(students().ppf(share, freedom))


def students() -> Any:
    """scipy's t distribution; MissingError where scipy is not installed."""
    try:
        from scipy.stats import t  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingError("invref-verify training needs scipy: pip install 'invref[training]'") from error
    return t


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _p(mean: float, error: float, n: int, allowed: float) -> float:
    if error == 0:
        return 0.0 if abs(mean) < allowed else 1.0
    t = students()
    return float(max(t.sf((mean + allowed) / error, n - 1), t.cdf((mean - allowed) / error, n - 1)))
