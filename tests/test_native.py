"""The accuracy table of the framework's own activations."""

import json
from dataclasses import replace

import pytest

from invref import formats
from verify import cli, document, native, sweep, targets
from verify.record import Check, WorstInput

RUN = {"torch": "2", "python": "3", "cpu": "some"}


@pytest.fixture(scope="module")
def silu():
    return sweep.run(targets.native_of("silu"), "bfloat16")


def test_the_framework_is_measured_and_held_to_nothing(silu):
    assert silu.passed
    assert silu.verdict == "exhausted"
    assert silu.error_floor is silu.bound is None
    assert silu.worst_error == pytest.approx(silu.native_error, abs=1e-11)
    assert {check.name for check in silu.checks if check.bound is not None} == {"count"}
    assert silu.reproduce.startswith("python -m verify gradient silu --native --dtype bfloat16 --input 0x")


def test_gradients_that_are_not_finite_are_counted_apart_from_the_worst_error():
    record = sweep.run(targets.native_of("gelu_tanh"), "bfloat16")
    # From 1.8e19 on the cube of x overflows, and torch's backward multiplies it by 0.
    assert record.nonfinite_gradients == 16_384
    assert record.worst_error < 0.01
    row = next(line for line in native.table([record], RUN).splitlines() if line.startswith("| gelu_tanh"))
    assert "16,384, first at `-0x1.fep+127`" in row


def test_the_table_has_a_row_for_each_record_with_both_worst_inputs_in_hexadecimal(silu):
    at = WorstInput.of(formats.get("bfloat16"), formats.get("bfloat16").ordinal(-0.75), 0)
    rounded = replace(silu, forward_error_ulps=0.5, forward_worst=at, scale="relative beyond 1")
    (row,) = (line for line in native.table([rounded], RUN).splitlines() if line.startswith("| silu"))
    assert "| 0.5 | `-0x1.8p-1` |" in row
    assert "* |" in row
    assert row.endswith("| 0 | 65,280 |")


def test_the_table_says_what_it_was_measured_on_and_has_no_date(silu):
    text = native.table([silu], {**RUN, "date": "2024-07-23"})
    assert "torch 2, Python 3, some." in text
    assert "2024-07-23" not in text


def test_a_sampled_record_claims_no_more_than_it_has_seen(silu):
    sampled = replace(silu, verdict="sampled", checks=[Check("count", 1.0, 1.0, True)])
    (row,) = (line for line in native.table([sampled], RUN).splitlines() if line.startswith("| silu"))
    assert row.count("≥ ") == 2


def test_the_command_writes_its_records_and_nothing_beside_them(tmp_path):
    path, beside = tmp_path / "README.json", tmp_path / "README.md"
    beside.write_text("mine")
    words = ["gradient", "relu", "--native", "--dtype", "float16", "--json", str(path)]
    assert cli.main(words) == cli.PASSED
    (record,) = document.read(path)
    assert record.decoder == "native"
    assert beside.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [path, beside]
    out = tmp_path / "table.md"
    native.write(path, out)
    text = out.read_text(encoding="utf-8")
    assert text == native.table([record], json.loads(path.read_text())["run"])
    assert text.startswith(native.TITLE)


@pytest.mark.parametrize("command", ["gradient relu --native", "report gelu", "mutants"])
@pytest.mark.parametrize("name", ["out.md", "out.HTML"])
def test_records_are_not_written_to_a_text(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), "--json", name]) == cli.BAD_INPUT
    assert "--json takes the name of a .json file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs that need no time, in a folder that has reports."""
    (tmp_path / "reports").mkdir()
    monkeypatch.chdir(tmp_path)
    noted = []

    def fake(target, dtype, **_):
        noted.append((target.name, dtype))
        return sweep_record

    sweep_record = sweep.run(targets.native_of("relu"), "bfloat16")
    monkeypatch.setattr(sweep, "run", fake)
    return noted


@pytest.mark.parametrize("words", ["--dtype bfloat16", "--samples 9", "--shard 1/2", "--json own.json", "gelu:float64"])
def test_a_part_of_the_native_layers_is_not_the_table(words, asked, tmp_path):
    assert cli.main(["gradient", "--native", "--all", *words.split(), "--state", str(tmp_path)]) == cli.PASSED
    assert asked
    assert list((tmp_path / "reports").iterdir()) == []


def test_all_native_layers_go_to_the_reports_by_default(asked, tmp_path):
    assert cli.main(["gradient", "--native", "--all", "--state", str(tmp_path)]) == cli.PASSED
    assert asked == [(name, dtype) for name in targets.TARGETS for dtype in ("bfloat16", "float16", "float32")]
    assert (tmp_path / "reports" / "native.md").is_file()
