"""The reports: what they say follows from their data, and a second run changes nothing."""

import json
import math
import re
import shlex
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import report_example
from conftest import records

from invref import formats, formulas
from invref.errors import InputError
from verify import (
    cli,
    document,
    pages_facts,
    pages_html,
    pages_index,
    pages_markdown,
    pages_math,
    pages_measure,
    pages_worst,
    report_command,
    targets,
)
from verify.oracle import Oracle
from verify.plots import Picture, thin
from verify.plots_scale import Scale
from verify.record import Record

REPORTS = Path(__file__).parents[1] / "reports"


def committed():
    return {data["activation"]: data for data in report_command.reports_in(REPORTS)}


# --- pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale", [Scale(-2, 3), Scale(1e-9, 1e-1, "log"), Scale(-100, 100, "symlog"), Scale(-1e-4, 4e-4)]
)
def test_ticks_stand_inside_their_axis_and_apart(scale):
    places = [scale(value) for value, _ in scale.ticks()]
    assert 3 <= len(places) <= 12
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert all(after - before > 0.05 for before, after in pairwise(places))


def test_a_symmetric_log_axis_is_the_inverse_of_itself():
    scale = Scale(-100, 100, "symlog")
    for value in (-100.0, -0.5, 0.0, 1e-3, 7.0):
        assert scale.unbent(scale.bent(value)) == pytest.approx(value, rel=1e-14)


def test_thinned_curves_stay_within_their_tolerance():
    x = np.linspace(0, 6, 2000)
    kept = thin(x, np.sin(x), 1e-3)
    assert kept.sum() < 100
    # The distance is measured across the lines; the curve rises by 45 degrees at most, where the height is 1.42 of it.
    assert np.abs(np.interp(x, x[kept], np.sin(x)[kept]) - np.sin(x)).max() < 1.42e-3


def test_a_curve_breaks_where_it_has_no_value():
    picture = Picture(Scale(0, 4), Scale(0, 1), "t")
    picture.line([0, 1, 2, 3, 4], [0.5, 0.5, math.nan, 0.5, 0.5], "c")
    assert picture.svg().count('class="c"') == 2


# --- notation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("x*sigmoid(x)", r"x \, \sigma \left(x\right)"),
        ("x/2", r"\frac{x}{2}"),
        ("0.044715*x**3", r"0.044715 \, x^{3}"),
        ("x*exp(-x**2)", r"x \, e^{- x^{2}}"),
        ("x - tanh(x)", r"x - \tanh \left(x\right)"),
        ("x*sqrt(2/pi)", r"\sqrt{\frac{2}{\pi}} \, x"),
    ],
)
def test_formulas_are_written_as_people_write_them(text, latex):
    assert pages_math.latex(pages_math.tree(formulas.get(text).expression)) == latex


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("-1/1000000", "-0.000001"),
        ("8943/200000", "0.044715"),
        ("1/3", "1/3"),
        ("-1/4", "-1/4"),
        ("1702/1000", "1.702"),
    ],
)
def test_numbers_are_exact_and_as_people_write_them(value, text):
    assert pages_math.decimal(Fraction(value)) == text
    assert Fraction(text) == Fraction(value)


def test_a_piecewise_formula_says_where_each_branch_holds():
    data = pages_facts.of(targets.TARGETS["hardswish"])
    for condition in ("x ≤ −3", "−3 &lt; x &lt; 3", "x ≥ 3"):
        assert data["mathml"].count(f"<mtext>{condition}</mtext>") == 2


@pytest.mark.parametrize("name", formulas.CATALOGUE)
def test_every_formula_has_its_notation_in_elements_that_browsers_know(name):
    text = pages_facts.notation(formulas.get(name))["mathml"]
    known = {"math", "mrow", "mi", "mn", "mo", "mfrac", "msup", "msqrt", "mtable", "mtr", "mtd", "mtext", "mspace"}
    assert set(re.findall(r"<(\w+)", text)) <= known


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_input_of_a_short_format_is_in_the_error_picture(dtype):
    fmt = formats.get(dtype)
    found = report_example.example()["errors"][dtype]
    assert found["inputs"] == fmt.finite_count
    # The picture's peaks are the run's, as committed; drawn numbers have three digits.
    published = {r.dtype: r for r in document.read(REPORTS / "gradient.json") if r.activation == "gelu"}[dtype]
    assert max(found["floor"]) == pytest.approx(published.error_floor, rel=5e-3)
    assert max(found["ours"]) == pytest.approx(published.worst_error, rel=5e-3)


def test_the_zoom_shows_codes_that_hold_what_is_decoded():
    for dtype in ("bfloat16", "float16", "float32"):
        rows = report_example.example()["zooms"][0][dtype]
        assert len(rows) >= 16
        assert {row[1] for row in rows} == {0, 1}
        floor = max((row[3] - row[2]) / 2 for row in rows)
        worst = max(max(row[3] - row[4], row[5] - row[2]) for row in rows)
        # No decoded value is further from any derivative of its code than the bound says: 1.1 floors, and half an ulp.
        assert worst <= 1.1 * floor + formats.get(dtype).ulp(max(abs(row[4]) for row in rows)) / 2


def test_landmarks_have_thirty_digits():
    (mark,) = report_example.example()["landmarks"]
    assert mark["x"] == "-0.751791524693564457457904946780"
    assert mark["y"].startswith("-0.16997120747990366169386847098")


def test_special_inputs_are_told_with_the_native_gradient():
    rows = {row["input"]: row for row in report_example.example()["special"]["bfloat16"]}
    assert {"+0", "−0", "+inf", "−inf", "NaN", "+smallest subnormal", "−largest"} <= rows.keys()
    assert rows["+0"]["ours"] == rows["+0"]["exact"] == "0.5"


# --- files ------------------------------------------------------------------------------------------------


def files(folder, run=False):
    """What a folder holds, the data's `run` left out."""
    found = {}
    for path in sorted(folder.rglob("*.*")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" and not run:
            text = json.dumps({key: value for key, value in json.loads(text).items() if key != "run"})
        found[str(path.relative_to(folder))] = text
    return found


@pytest.fixture
def measured(monkeypatch):
    """Runs that need no time."""
    monkeypatch.setattr(report_command.sweep, "run", lambda target, dtype, **_: report_example.record(dtype))


def test_a_second_run_changes_nothing_but_its_run(tmp_path, measured, monkeypatch, capsys):
    assert cli.main(["report", "gelu", "--out", str(tmp_path)]) == 0
    first, whole = files(tmp_path), files(tmp_path, run=True)
    assert {"gelu.html", "gelu.md", "gelu.json", "index.html", "worst/gelu.txt"} == first.keys()
    monkeypatch.setattr(report_example.Record, "seconds", 99.0, raising=False)
    assert cli.main(["report", "gelu", "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == first
    assert files(tmp_path, run=True).keys() == whole.keys()


def test_a_formula_of_ones_own_is_reported(tmp_path, measured, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    arguments = ["report", "--formula", "x*sigmoid(1.5*x)", "--name", "mine", "--out", str(out), "--dtype", "float32"]
    assert cli.main(arguments) == 0
    data = json.loads((out / "mine.json").read_text())
    assert data["formula"] == "x*sigmoid(1.5*x)"
    assert data["latex"].startswith("f \\left(x\\right) = x \\, \\sigma \\left(\\frac{3 \\, x}{2}\\right)")
    # What was fitted is told, with the bound that was certified: 2^-22, the budget of the approximation.
    assert data["decoder"]
    assert all(part["bound"] <= 2**-22 for part in data["decoder"])
    assert (out / "mine.html").exists()


def test_records_of_a_former_run_are_taken_over(tmp_path, capsys):
    path = tmp_path / "records.json"
    document.write_records(path, report_example.records(), 1.0)
    assert cli.main(["report", "gelu", "--out", str(tmp_path / "out"), "--records", str(path)]) == 0
    data = json.loads((tmp_path / "out" / "gelu.json").read_text())
    assert [r["inputs"] for r in data["records"]] == [65_280, 63_488, 4_278_190_080]
    assert data["run"]["timings"] == {"bfloat16": 1.5, "float16": 1.5, "float32": 1.5}
    assert "seconds" not in json.dumps({**data, "run": None})


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "torch.nn.functional.gelu", "decoder": "native"},
        {"target": "mine:gelu", "decoder": "foreign"},
        {"formula": "x*sigmoid(x)"},
    ],
)
def test_records_of_another_layer_of_that_name_are_refused(changes, tmp_path, capsys):
    path, out = tmp_path / "records.json", tmp_path / "out"
    document.write_records(path, [report_example.record("bfloat16", **changes)], 1.0)
    assert cli.main(["report", "gelu", "--out", str(out), "--records", str(path)]) == 2
    error = capsys.readouterr().err
    assert "not of invref.functional.gelu" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_files_of_others_in_the_folder_are_no_reports(tmp_path, measured, capsys):
    others = {"bad.json": "{bad", "curves.json": '{"curves": 1}', "list.json": "[]", "binary.json": "\x00"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    assert cli.main(["report", "gelu", "--out", str(tmp_path)]) == 0
    assert [data["activation"] for data in report_command.reports_in(tmp_path)] == ["gelu"]
    assert {name: (tmp_path / name).read_text() for name in others} == others


def test_a_file_that_is_no_report_is_not_replaced_by_one(tmp_path, measured, capsys):
    (tmp_path / "gelu.json").write_text('{"records": []}')
    assert cli.main(["report", "gelu", "--out", str(tmp_path)]) == 2
    assert "gelu.json is no report" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gelu.json"]


def test_a_name_that_another_formula_has_there_is_refused(tmp_path, measured, capsys):
    words = ["--name", "mine", "--out", str(tmp_path), "--dtype", "float32"]
    for _ in range(2):
        assert cli.main(["report", "--formula", "x*tanh(x)", *words]) == 0
    before = files(tmp_path, run=True)
    assert cli.main(["report", "--formula", "x+tanh(x)", *words]) == 2
    assert "mine.json reports another formula, x*tanh(x): give another --name" in capsys.readouterr().err
    assert files(tmp_path, run=True) == before


def test_records_of_other_decoders_are_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / "records.json"
    document.write_records(path, report_example.records(), 1.0)
    monkeypatch.setattr(report_command.document, "tables", lambda: {"gelu": "another"})
    assert cli.main(["report", "gelu", "--out", str(tmp_path), "--records", str(path)]) == 2
    assert "other decoders of gelu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ("", "nothing to report"),
        ("gleu", "unknown activation"),
        ("gelu --dtype float8", "unknown format"),
        ("gelu --samples 0", "ask for 1 or more"),
        ("gelu --formula x*x", "leave out the names"),
        ("gelu --name other", "--name is for --formula"),
        ("--formula ''", "--formula is empty"),
        ("--formula x*foo(x) --out o1", "foo"),
        ("gelu --records missing.json", "cannot read the records"),
        ("gelu --out /dev/null", "name another with --out"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *shlex.split(arguments)]) == 2
    error = capsys.readouterr().err
    assert remedy in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_violated_bound_is_the_exit_code_and_stands_on_the_page(tmp_path, monkeypatch, capsys):
    bad = {"verdict": "failed", "checks": [*report_example.record("float16").checks[:0], failing()]}
    monkeypatch.setattr(report_command.sweep, "run", lambda target, dtype, **_: report_example.record(dtype, **bad))
    assert cli.main(["report", "gelu", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "gelu.html").read_text()
    assert "✕ failed" in page
    assert "<details open>" in page


def failing():
    check = report_example.record("float16").checks[0]
    return type(check).at_most(check.name, 1.0, 0.5, check.worst)


def test_text_of_others_cannot_become_markup():
    data = {**report_example.example(), "label": "<script>", "gain": "<b>", "environment": {"cpu": "<i>"}}
    page, index = pages_html.page(data), pages_index.page([data])
    for text in ("<script>", "<i>"):
        assert text not in page
    assert "<i>" not in index


def test_pages_hold_no_address_outside():
    data = report_example.example()
    for text in (pages_html.page(data), pages_index.page([data])):
        assert not re.search(r"https?://|@import|src=", text)
        assert len(text) < 150_000


# --- worst inputs -----------------------------------------------------------------------------------------


def test_worst_inputs_once_kept_stay(tmp_path):
    path = tmp_path / "gelu.txt"
    path.write_text(pages_worst.merged(path, "gelu", [report_example.record("bfloat16")]))
    other = report_example.record("float16", worst_input=None, checks=[])
    path.write_text(pages_worst.merged(path, "gelu", [other]))
    kept = pages_worst.read(path)
    assert list(kept.inputs["bfloat16"]) == [0xBF40]
    assert kept.inputs["bfloat16"][0xBF40] == {"gradient error", "worst error"}
    assert kept.bounds.keys() == {"bfloat16", "float16"}
    assert path.read_text() == pages_worst.merged(path, "gelu", [other])


def test_a_damaged_file_of_worst_inputs_is_an_error_that_shows_the_line(tmp_path):
    (tmp_path / "gelu.txt").write_text("bfloat16 0xzz\n")
    with pytest.raises(InputError, match="0xzz"):
        pages_worst.read(tmp_path / "gelu.txt")


@pytest.mark.parametrize("path", sorted((REPORTS / "worst").glob("*.txt")), ids=lambda path: path.stem)
def test_layers_hold_their_bound_at_every_worst_input_ever_found(path):
    if path.stem not in targets.TARGETS:
        pytest.skip("not a layer of the catalogue")
    kept = pages_worst.read(path)
    record = records().get((path.stem, "float32"))
    if record and record.forward.endswith("AVX2"):
        kept.bounds["float32"] = record.bound
    assert pages_worst.violations(targets.TARGETS[path.stem], kept) == []


def test_a_layer_that_is_wrong_at_a_kept_input_is_found():
    kept = pages_worst.Kept(bounds={"float32": 1e-9}, inputs={"float32": {0xBF40758A: {"worst error"}}})
    (line,) = pages_worst.violations(targets.TARGETS["gelu"], kept)
    assert "0xbf40758a" in line


# --- what is committed ------------------------------------------------------------------------------------


def test_every_activation_has_its_report():
    assert committed().keys() >= targets.TARGETS.keys(), "missing: run `make reports`"


def test_committed_pages_are_those_of_their_data():
    for name, data in committed().items():
        assert (REPORTS / f"{name}.html").read_text(encoding="utf-8") == pages_html.page(data), (
            f"{name}: `make reports`"
        )
        assert (REPORTS / f"{name}.md").read_text(encoding="utf-8") == pages_markdown.page(data), (
            f"{name}: `make reports`"
        )
    index = (REPORTS / "index.html").read_text(encoding="utf-8")
    assert index == report_command.index(REPORTS), "stale: run `make reports`"
    assert '<a href="training/index.html">' in index


def test_committed_reports_are_those_of_the_decoders_that_ship():
    now = document.tables()
    for name, data in committed().items():
        stale = {table for table, digest in data["tables"].items() if digest != now.get(table)}
        assert stale == set(), f"{name} is stale: run `make reports`"
        assert name not in now or name in data["tables"], f"{name} is stale: run `make reports`"
        if name in formulas.CATALOGUE:
            assert data["formula"] == formulas.get(name).text, f"{name} is stale: run `make reports`"


def test_committed_records_are_those_of_the_verification():
    published = {(r.activation, r.dtype): r for r in document.read(REPORTS / "gradient.json")}
    shown = {(name, r.dtype): r for name, data in committed().items() for r in pages_html.records_of(data)}
    assert shown.keys() >= published.keys(), "missing: run `make reports`"
    meant = {(name, dtype) for name in targets.TARGETS for dtype in report_command.DTYPES}
    assert published.keys() >= meant | {place for place in shown if place[0] in targets.TARGETS}, "run `make reports`"
    for place, record in published.items():
        assert plain(shown[place]) == plain(record), f"{place}: run `make reports`"


def plain(record):
    """Everything a record says but how long it took."""
    return {key: value for key, value in record.to_json().items() if key != "seconds"}


def test_the_errors_measured_for_a_page_are_within_its_records():
    """The picture is measured apart from the verdict: both must say the same."""
    for name, data in committed().items():
        for record in pages_html.records_of(data):
            found = data["errors"].get(record.dtype)
            if found and record.verdict in ("exhausted", "proved"):
                drawn = max((v for v in found["ours"] if v is not None), default=0.0)
                # Drawn numbers have three digits.
                assert drawn <= record.worst_error * 1.005 + 1e-12, (name, record.dtype)


def test_measurements_repeat():
    target = targets.TARGETS["gelu"]
    measured = pages_measure.Measured(target, Oracle(target.formula), "absolute")
    assert measured.errors(formats.get("float32")) == report_example.example()["errors"]["float32"]


def test_records_in_the_data_are_whole():
    for record, made in zip(pages_html.records_of(report_example.example()), report_example.records(), strict=True):
        assert isinstance(record, Record)
        assert record.to_json() == made.to_json()
