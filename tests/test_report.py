"""What a verification prints and writes."""

import io
import json
import math
import os
import re

import pytest
from rich.console import Console

from invref import formats
from invref.errors import InvrefError
from verify import document, guarantees, report
from verify.record import Check, Record, WorstInput

WORST = WorstInput.of(formats.get("float32"), -1061109568, 0)


def record(verdict: str = "exhausted", **changes: object) -> Record:
    fields = {
        "activation": "gelu_tanh",
        "formula": "x",
        "target": "layer",
        "forward": "kernel",
        "dtype": "float32",
        "device": "cpu",
        "inputs": 4_278_190_080,
        "coverage": "all",
        "verdict": verdict,
        "worst_error": 1.0501e-4,
        "worst_input": WORST,
        "error_floor": 1.04e-4,
        "excess_error": 1e-6,
        "native_error": 3.2e-7,
        "nonfinite_gradients": 4_278_190_080,
        "bound": 1.1e-4,
        "seconds": 1234.5,
        "reproduce": "python -m verify gradient gelu_tanh --dtype float32 --input 0x1",
        "checks": [Check("decoder error", 4.54e-7, 9.5e-7, True)],
    }
    return Record(**{**fields, **changes})


def printed(width: int, *records: Record) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report.table(records, width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("verdict", "text"),
    [("exhausted", "≤ 1.06e-4"), ("proved", "≤ 1.06e-4"), ("sampled", "≥ 1.05e-4"), ("failed", "1.05e-4")],
)
def test_a_worst_error_is_rounded_so_that_its_sign_stays_true(verdict, text):
    assert report.worst_error(record(verdict)) == text


@pytest.mark.parametrize("verdict", ["failed", "unproved"])
def test_a_worst_error_that_bounds_nothing_has_no_sign(verdict):
    assert "≤" not in report.worst_error(record(verdict))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (math.nan, "nan"), (math.inf, "inf"), (0.0, "0"), (5e-324, "4.94e-324")]
)
def test_numbers_without_three_digits_are_spelled_as_they_are(value, text):
    assert report.number(value) == text


@pytest.mark.parametrize("width", [80, report.WIDE, 200])
def test_the_widest_rows_fit_the_width_they_are_made_for(width):
    longest = record("exhausted", activation="sqrtsoftplus")
    text = printed(width, longest, record("unproved", worst_error=math.nan))
    assert "…" not in text
    assert len(text.splitlines()) == 4  # the titles, a rule, and no row on two lines


def test_the_wide_table_shows_what_the_narrow_one_leaves_out():
    assert "non-finite" in printed(report.WIDE, record())
    assert "non-finite" not in printed(80, record())


def test_a_violated_check_says_what_how_much_where_and_how_to_reproduce_it():
    bad = record("failed", checks=[Check("zero tail", 0.25, 1e-5, False, WORST)])
    (line,) = report.violations([bad])
    for part in ("gelu_tanh float32", "zero tail", "measured 0.25", "bound 1e-05", WORST.bits, "piece 0"):
        assert part in line
    assert line.endswith(f"python -m verify gradient gelu_tanh --dtype float32 --input {WORST.bits}")


def test_a_violated_check_of_no_single_input_is_reproduced_by_the_whole_run():
    bad = record("failed", checks=[Check("count", 1.0, 2.0, False)])
    (line,) = report.violations([bad])
    assert line.endswith("reproduce: python -m verify gradient gelu_tanh --dtype float32")


def test_a_record_that_bounds_nothing_is_named_although_no_check_failed():
    (line,) = report.violations([record("unproved")])
    assert "NOT BOUNDED gelu_tanh float32: unproved" in line
    assert report.violations([record("exhausted")]) == []


def test_only_checks_with_a_bound_count_as_held(capsys):
    told = Check("native non-finite", 3.0, None, True)
    bad = Check("zero tail", 0.25, 1e-5, False)
    assert report.held([record(checks=[*record().checks, told, bad])]) == "1 of 2 checks hold (1 more measured only)"
    assert report.held([record()]) == "1 of 1 checks hold"
    report.show([record(checks=[told])])
    assert "0 of 0 checks hold (1 more measured only) over 4,278,190,080 inputs" in capsys.readouterr().out


def test_hexadecimal_floats_are_printed_without_their_zeros():
    at = WorstInput.of(formats.get("bfloat16"), formats.get("bfloat16").ordinal(-0.75), 1)
    assert "= -0x1.8p-1 " in report.place(at)
    one = WorstInput.of(formats.get("bfloat16"), formats.get("bfloat16").ordinal(1.0), 1)
    assert "= 0x1p+0 " in report.place(one)


def test_a_file_has_the_records_and_the_run_they_belong_to(tmp_path):
    path = tmp_path / "out.json"
    document.write_records(path, [record(worst_error=math.nan)], 2.5)
    content = json.loads(path.read_text())
    assert {"python", "torch", "numpy", "numba", "flint", "cpu", "cores", "platform", "date", "seconds"} <= set(
        content["run"]
    )
    (read,) = document.read(path)
    assert math.isnan(read.worst_error)
    assert read.to_json() == record(worst_error=math.nan).to_json()


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")
    monkeypatch.setattr(document.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        document.write_records(path, [record()], 1.0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_rights_of_any_new_file(tmp_path):
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    document.write(ours, {}, 0.0)
    plain.write_text("")
    assert ours.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("name", ["missing/out.json", "."])
def test_a_path_that_cannot_be_written_is_found_before(tmp_path, name):
    with pytest.raises(document.OutputError, match="name a file in"):
        document.check_writable(tmp_path / name)


def test_the_guarantees_replace_only_what_stands_between_the_markers():
    text = f"before\n{guarantees.BEGIN}\nold\n{guarantees.END}\nafter\n"
    new = guarantees.inserted(text, "new")
    assert new == f"before\n{guarantees.BEGIN}\nnew\n{guarantees.END}\nafter\n"
    assert guarantees.inserted(new, "new") == new


def test_a_readme_without_markers_is_an_error_that_shows_them():
    with pytest.raises(InvrefError, match=re.escape(guarantees.BEGIN)):
        guarantees.inserted("no markers", "new")


RUN = {"torch": "2", "python": "3", "cpu": "some", "date": "2024-07-23T00:00:00"}


def test_the_table_of_layers_has_one_row_per_record():
    lines = guarantees.layers([record(), record("failed")], RUN).splitlines()
    rows = [line for line in lines if line.startswith("| gelu_tanh |")]
    assert len(rows) == 2
    assert "| exhausted | ≤ 1.06e-4 |" in rows[0]
    assert "| failed | 1.05e-4 |" in rows[1]
    assert lines[-1] == "torch 2, Python 3, some, 2024-07-23."


def test_the_guarantees_have_one_row_per_layer_and_never_hide_a_failure():
    verdicts = {"bfloat16": "exhausted", "float16": "failed", "float32": "sampled"}
    records = [record(verdict, dtype=dtype) for dtype, verdict in verdicts.items()]
    lines = guarantees.table(records, RUN).splitlines()
    (row,) = [line for line in lines if line.startswith("| gelu_tanh |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4].startswith("≤ ")
    assert cells[5] == "**failed**"
    assert cells[6].startswith("≥ ")


def test_results_follow_a_link_and_never_replace_a_device(tmp_path):
    target, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target)
    document.write(link, {"a": 1}, 0.0)
    assert link.is_symlink()
    assert json.loads(target.read_text())["a"] == 1
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    document.write(pipe, {"a": 2}, 0.0)
    assert json.loads(os.read(reader, 1 << 16))["a"] == 2
    os.close(reader)
    assert pipe.is_fifo()


def test_a_formula_s_long_name_is_cut_so_that_the_numbers_are_not():
    text = printed(report.WIDE, record(activation="x_erf_log_1_exp_x"))
    assert "x_erf_log_1…" in text
    assert text.count("…") == 1
