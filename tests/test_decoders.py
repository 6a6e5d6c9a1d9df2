"""Tables: whole, certified, exact where they must be."""

from __future__ import annotations

import json
from fractions import Fraction
from importlib import resources

import numpy as np
import pytest

from invref import decoders, formulas
from invref.decoders import from_json, load, nearest, to_json
from invref.errors import FormulaError, TableError

NAMES = ("gelu", "gelu_tanh", "silu")


def text(name: str) -> str:
    return (resources.files("invref") / "tables" / f"{name}.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_table_reads_and_writes_to_the_same_bytes(name: str) -> None:
    assert to_json(from_json(text(name)), json.loads(text(name))["command"]) == text(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_belongs_to_the_formula_of_the_catalogue(name: str) -> None:
    assert load(name).formula == formulas.get(name).text


@pytest.mark.parametrize("name", NAMES)
def test_every_segment_is_certified_to_half_of_what_float32_may_cost(name: str) -> None:
    decoder = load(name)
    for segment in (decoder.tail, decoder.turn, decoder.head):
        # 2^-20 is the bound for the decoder as evaluated; the approximation may use half of it.
        assert 0 < segment.bound <= 2.0**-21
    # float64: the Taylor polynomial at the turning point is as good as float64 can tell.
    assert 0 < decoder.series_bound <= 2.0**-52


def test_a_changed_digit_is_found_by_the_hash() -> None:
    data = json.loads(text("gelu"))
    data["turn"]["centre"] = (1.0).hex()
    with pytest.raises(TableError, match="make tables"):
        from_json(json.dumps(data))


def test_an_unknown_table_lists_those_there_are() -> None:
    with pytest.raises(FormulaError, match="gelu, gelu_fast, gelu_new, gelu_tanh"):
        load("unheard_of")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_turning_value_is_a_sum_of_two_floats_to_twice_the_precision(name: str, kind: decoders.Float) -> None:
    decoder = load(name)
    high, low = decoder.turning_value(kind)
    error = abs(Fraction(decoder.turning_y) - Fraction(float(high)) - Fraction(float(low)))
    # Each part is rounded to nearest, so what is left is half an ulp of half an ulp.
    unit = Fraction(float(np.finfo(kind).eps)) / 2
    assert error <= unit * unit * abs(Fraction(decoder.turning_y))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_threshold_is_the_last_float_not_above_the_turning_point(name: str, kind: decoders.Float) -> None:
    decoder = load(name)
    threshold = decoder.threshold(kind)
    above = np.nextafter(threshold, kind(np.inf))
    assert Fraction(float(threshold)) <= Fraction(decoder.turning_x) < Fraction(float(above))


def test_nearest_rounds_once_where_a_double_on_the_way_would_round_twice() -> None:
    # Just above the middle of 1 and the next float32: rounding to double first lands on the tie and goes down.
    exact = 1 + Fraction(1, 2**24) + Fraction(1, 2**80)
    assert nearest(exact, np.float32) == np.float32(1 + 2.0**-23)
