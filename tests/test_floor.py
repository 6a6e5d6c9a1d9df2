import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verify import floor, sweep, targets
from verify.floor import Hulls
from verify.scan import BLOCK


def brute_force(codes, slopes):
    """The definition, one code after the other."""
    return max((np.ptp(slopes[codes == code]) / 2 for code in np.unique(codes)), default=0.0)


def hulls_of(codes, slopes):
    blocks = codes.reshape(-1, BLOCK), slopes.reshape(-1, BLOCK)
    y, slope = (np.stack([b.min(axis=1), b.max(axis=1)], axis=1) for b in blocks)
    return Hulls(np.arange(0, codes.size, BLOCK), y.astype(np.int32), slope.astype(np.float32))


def searched(codes, slopes):
    """The floor by branch and bound, and how many blocks it looked into."""
    seen = []

    def inputs(first):
        seen.extend(first)
        at = (first[:, None] + np.arange(BLOCK)).ravel()
        return codes[at], slopes[at]

    return floor.search(hulls_of(codes, slopes), inputs), len(seen)


def forward(blocks, noise, scale, seed, saturated=0):
    """A rounded parabola with rounding noise and a saturated stretch: codes, and slopes that float32 holds exactly."""
    n = blocks * BLOCK
    x = np.arange(n) / n
    codes = np.floor(scale * x**2 + noise * np.random.default_rng(seed).standard_normal(n)).astype(np.int64)
    codes[n - saturated * BLOCK :] = codes.max(initial=0)
    return codes, x.astype(np.float32).astype(np.float64)


def test_the_floor_is_half_the_widest_range_of_slopes_that_share_a_code():
    codes, slopes = np.array([3, 1, 3, 1, 2]), np.array([0.0, 1.0, 0.5, 4.0, 9.0])
    assert floor.exact(codes, slopes) == 1.5


def test_no_input_has_no_floor_and_nan_is_not_lost():
    assert floor.exact(np.array([], np.int64), np.array([])) == 0.0
    assert np.isnan(floor.exact(np.array([1, 2, 2]), np.array([0.0, np.nan, 1.0])))


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 40),
    noise=st.sampled_from([0.0, 0.7, 3.0, 50.0]),
    scale=st.sampled_from([0.0, 5.0, 300.0, 1e5, 1e9]),
    saturated=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_branch_and_bound_finds_the_floor_of_any_forward_monotone_or_not(blocks, noise, scale, saturated, seed):
    codes, slopes = forward(blocks, noise, scale, seed, min(saturated, blocks))
    assert searched(codes, slopes)[0] == brute_force(codes, slopes)


def test_two_inputs_far_apart_that_share_a_code_are_found():
    codes = np.arange(50 * BLOCK)
    slopes = codes / 2.0**20
    codes[7] = codes[-7]
    assert searched(codes, slopes)[0] == (slopes[-7] - slopes[7]) / 2


def test_only_blocks_that_could_beat_the_best_are_looked_into():
    # Rounding noise of a code or two around a parabola, as in the framework's forward: the foot has the widest codes.
    codes, slopes = forward(2000, 1.0, 1e5, 0)
    found, seen = searched(codes, slopes)
    assert found == floor.exact(codes, slopes)
    assert seen < 200


def test_a_nan_among_the_slopes_makes_the_floor_nan():
    hulls = hulls_of(*forward(3, 0.0, 100.0, 0))
    hulls.slope[1, 1] = np.nan
    assert np.isnan(floor.search(hulls, lambda first: (first, first.astype(float))))


def test_a_forward_whose_blocks_all_meet_is_given_up_instead_of_running_for_hours():
    blocks = 50_000
    y = np.tile(np.array([[0, 1000]], np.int32), (blocks, 1))
    hulls = Hulls(np.arange(0, blocks * BLOCK, BLOCK), y, np.zeros((blocks, 2), np.float32))
    assert np.isnan(floor.search(hulls, lambda first: (first, first.astype(float))))


# Measured with a prototype that grouped the outputs of torch's own forward in another way; three digits were kept.
@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("gelu", "bfloat16", 1.06e-2),
        ("gelu", "float16", 4.84e-3),
        ("silu", "bfloat16", 1.14e-2),
        ("silu", "float16", 3.77e-3),
    ],
)
def test_the_floors_of_the_frameworks_forward_are_those_known(name, dtype, expected):
    record = sweep.run(targets.torch_itself(name), dtype)
    assert record.error_floor == pytest.approx(expected, rel=0.005)
