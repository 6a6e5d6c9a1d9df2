"""Formats: every finite value has one ordinal, in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invref.errors import RangeError
from invref.formats import FORMATS, Format, get

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))


def test_the_numbers_of_finite_values_are_those_of_the_formats() -> None:
    # Sign times exponents times significands: 2 * 255 * 2^7, 2 * 31 * 2^10, 2 * 255 * 2^23, 2 * 2047 * 2^52.
    assert [f.finite_count for f in FORMATS.values()] == [65_280, 63_488, 4_278_190_080, 2 * 2047 * 2**52]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_all_sixteen_bit_values_are_finite_ascending_and_distinct_in_bits(name: str) -> None:
    fmt = FORMATS[name]
    values = fmt.tensor(fmt.first_ordinal, fmt.finite_count)
    assert bool(values.isfinite().all())
    assert bool((values[1:].double() >= values[:-1].double()).all())
    assert len(torch.unique(values.view(torch.int16))) == fmt.finite_count
    assert torch.equal(fmt.ordinals(values), torch.arange(fmt.first_ordinal, fmt.largest_ordinal + 1))
    assert not bool(torch.tensor(fmt.value(fmt.largest_ordinal)).isinf())


@formats
def test_the_ends_and_zeros_have_the_ordinals_they_are_documented_to_have(fmt: Format) -> None:
    assert fmt.value(fmt.largest_ordinal) == torch.finfo(fmt.dtype).max
    assert fmt.value(fmt.first_ordinal) == torch.finfo(fmt.dtype).min
    assert fmt.value(1) == torch.finfo(fmt.dtype).smallest_normal * torch.finfo(fmt.dtype).eps
    assert [np.signbit(fmt.value(o)) for o in (-1, 0)] == [True, False]
    with pytest.raises(RangeError, match="stay within"):
        fmt.tensor(fmt.largest_ordinal, 2)


@formats
@given(data=st.data())
def test_ordinals_and_values_are_inverse(fmt: Format, data: st.DataObject) -> None:
    ordinal = data.draw(st.integers(fmt.first_ordinal, fmt.largest_ordinal))
    value = fmt.from_ordinals(torch.tensor([ordinal]))
    assert fmt.ordinals(value).item() == ordinal
    assert fmt.value(ordinal) == value.item()


@formats
@given(data=st.data())
def test_an_ulp_is_the_step_to_the_next_value_away_from_zero(fmt: Format, data: st.DataObject) -> None:
    ordinal = data.draw(st.integers(0, fmt.largest_ordinal - 1))
    assert fmt.ulp(fmt.value(ordinal)) == fmt.value(ordinal + 1) - fmt.value(ordinal)


def test_an_unknown_format_lists_those_there_are() -> None:
    with pytest.raises(RangeError, match="bfloat16, float16, float32, float64"):
        get("fp8")
