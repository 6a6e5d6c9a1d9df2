"""Pages of training runs: those of the committed records, verdicts of every kind, files that cannot be written."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from invref.errors import InputError
from verify import drawing, training_command, training_findings, training_page, training_plot, training_record
from verify.cli import main
from verify.training_record import Record, Run, Seed, Settings, Step

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

COMMITTED = Path(__file__).parents[1] / "reports" / "training"
NAMES = sorted(path.stem for path in COMMITTED.glob("*.json"))
ARMS = ("native", "inverted", "twin", "coarse")
SETTINGS = Settings("mlp", "float32", 30, "cpu", ARMS, 1234, 64, 1e-3)
RUN = {
    "python": "3.99",
    "torch": "9.9",
    "cpu": "<i>",
    "date": "2001-02-03T04:05:06+00:00",
    "tables": {"gelu": "ab" * 32},
}


def run(arm, apart, **changes):
    step = Step(apart, apart, "w", 0.0)
    losses = tuple(3.0 / (1 + i) + apart for i in range(30))
    return replace(Run(arm, step, step, losses, (apart, 2 * apart), 2.0 + apart, 0.5), **changes)


def seed(number, inverted, **changes):
    """A made-up seed whose inverted arm ends `inverted` from native's; `changes` are to its run."""
    jitter = 1 + 0.01 * (-1) ** number
    runs = (run("native", 0.0), run("inverted", inverted, **changes), run("twin", 1e-6 * jitter),
            run("coarse", 0.01 * jitter))  # fmt: skip
    return Seed(number, (15, 30), 1e-3, 0.5, 1.0, runs)


def record(seeds, unfinished=False):
    found = None if unfinished else training_findings.findings(seeds).to_json()
    return Record(SETTINGS, tuple(seeds), json.loads(json.dumps(found, allow_nan=False)), RUN)


EQUIVALENT = record([seed(i, 1e-6) for i in range(4)])


def text(page):
    """A page's words, each run of spaces one."""
    body = re.sub(r"<svg.*?</svg>|<style.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def rows(page):
    """The cells of each row of each table, as text."""
    return [[text(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
            for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without pictures, which take a second each."""
    monkeypatch.setattr(training_plot, "pictures", lambda *_: {})
    monkeypatch.setattr(training_plot, "sheet", lambda *_: "<svg></svg>")


# --- what is committed ------------------------------------------------------------------------------------


def test_committed_pages_are_those_of_their_records():
    records = training_page.records_in(COMMITTED)
    assert list(records) == NAMES
    for name, found in records.items():
        page = (COMMITTED / f"{name}.html").read_text(encoding="utf-8")
        assert page == training_page.page(found), f"{name} is stale: run `make training-pages`"
    assert (COMMITTED / "index.html").read_text(encoding="utf-8") == training_page.index(records)


def test_a_committed_sheet_is_that_of_its_record():
    name = NAMES[0]
    drawn = training_page.picture(training_record.read(COMMITTED / f"{name}.json"))
    assert (COMMITTED / f"{name}.svg").read_text(encoding="utf-8") == drawn, "stale: run `make training-pages`"
    assert all((COMMITTED / f"{name}.svg").exists() for name in NAMES)


def test_findings_in_the_committed_records_are_those_of_their_seeds():
    for name in NAMES:
        found = training_record.read(COMMITTED / f"{name}.json")
        stored = training_findings.from_json(found.findings)
        again = training_findings.findings(found.seeds)
        assert stored.whole == again.whole == found.findings["verdict"]
        for mine, theirs in zip(stored.lines, again.lines, strict=True):
            if mine.level == "one step" or mine.quantity == "distance of parameters":
                # Numbers are kept to 7 digits or more, and a mean of ratios is off by no more than each of two is.
                assert mine.test.mean == pytest.approx(theirs.test.mean, rel=2e-6), (name, mine)


def test_every_number_in_the_tables_is_the_records(undrawn):
    for name in NAMES:
        found = training_record.read(COMMITTED / f"{name}.json")
        page = training_page.page(found)
        shown = rows(page)
        for line in found.findings["lines"]:
            (row,) = (r for r in shown if r[:3] == [line["arm"], line["level"], line["quantity"]])
            assert row[3].split()[1] == line["verdict"]
            low, high = row[5].split(" to ") if " to " in row[5] else (row[5], row[5])
            # Three digits.
            for told, key in ((row[4], "mean"), (low, "low"), (high, "high"), (row[6].split()[-1].strip("±"), "margin"),
                              (row[7], "p")):  # fmt: skip
                assert float(told) == pytest.approx(line[key], rel=5.1e-3), (name, row, key)
        for number, seed in enumerate(found.seeds):
            (row,) = (r for r in shown if r[0] == str(number) and " / " in r[1])
            for cell, arm in zip(row[1:], seed.runs, strict=False):
                loss, accuracy = map(float, cell.split(" / "))
                assert (loss, accuracy) == (pytest.approx(arm.loss, rel=1e-5), pytest.approx(arm.accuracy, rel=1e-3))
        words = text(page)
        for value in (f"{found.settings.parameters:,} parameters", found.run["date"], found.run["torch"],
                      *(m["rule"] for m in found.findings["margins"].values())):  # fmt: skip
            assert value in words


def test_the_command_on_a_page_is_understood_and_asks_for_the_same(undrawn):
    from verify import cli

    found = training_record.read(COMMITTED / f"{NAMES[0]}.json")
    (command,) = re.findall(r"<code>invref-verify (.*?)</code>", training_page.page(found))
    asked = cli.parser().parse_args(command.split())
    assert (asked.model, asked.dtype, asked.steps) == (found.settings.model, found.settings.dtype, found.settings.steps)
    assert asked.seeds == len(found.seeds)


# --- pages of their own -----------------------------------------------------------------------------------


def test_a_page_depends_on_its_record_alone(monkeypatch):
    first, sheet = training_page.page(EQUIVALENT), training_page.picture(EQUIVALENT)
    monkeypatch.setattr(training_record.document, "environment", lambda _: {"date": "another", "torch": "another"})
    monkeypatch.setattr(training_record.document, "installed", lambda _: "another")
    monkeypatch.setattr(drawing.mpl, "__version__", "another")
    assert (training_page.page(EQUIVALENT), training_page.picture(EQUIVALENT)) == (first, sheet)


def test_seeds_of_a_longer_run_change_no_curve():
    more = replace(EQUIVALENT, seeds=(*EQUIVALENT.seeds, seed(4, 0.7)))
    found = training_findings.from_json(EQUIVALENT.findings)
    assert training_plot.used(more, found) == EQUIVALENT.seeds


def test_a_page_is_one_file_without_scripts_and_addresses():
    for page in (training_page.page(EQUIVALENT), training_page.index({"a": EQUIVALENT})):
        assert not re.search(r"https?://|@import|src=|<script|<link rel=.stylesheet", page)
    assert "<i>" not in training_page.page(EQUIVALENT)


def test_the_verdict_comes_first_and_says_why(undrawn):
    words = text(training_page.page(EQUIVALENT))
    assert words.startswith(
        "Does training notice? mlp, float32 All runs Does training notice? mlp, float32 ● equivalent , over 4 seeds:"
    )
    assert "✓ one step, trajectory" in words
    assert "AMD" not in words


def test_a_different_run():
    found = record([seed(i, 0.1 + 0.001 * i) for i in range(4)])
    page = training_page.page(found)
    assert "✕ different , over 4 seeds: the difference in validation loss, 0.100 to 0.103 at 90 %, is outside" in text(
        page
    )
    assert "✕ different" in text(training_page.index({"a": found}))
    assert "different" in training_plot.pictures(found, training_findings.from_json(found.findings))[
        "outcome beside the margin"
    ]  # fmt: skip


def test_an_undecided_run_tells_how_many_seeds_would_decide(undrawn):
    found = record([seed(i, 0.01 * (-1) ** i) for i in range(4)])
    needed = training_findings.from_json(found.findings).needed("inverted")
    assert f"◐ undecided , over 4 seeds: the difference in validation loss, -0.0136 to 0.0136 at 90 %, is neither within nor outside ±4.00e-3; the difference in accuracy, 0 to 0 at 90 %, is within ±1.00e-3; about {needed} seeds would decide." in text(training_page.page(found))  # fmt: skip # noqa: E501


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_is_not_finite(value):
    gone = {"losses": (3.0, *[value] * 29), "distances": (0.1, value), "loss": value}
    found = record([seed(0, 1e-6, **gone), *(seed(i, 1e-6) for i in range(1, 4))])
    page = training_page.page(found)
    assert "✕ different , over 4 seeds: the difference in validation loss is not finite" in text(page)
    assert "not finite / 0.5" in text(page)
    drawn = training_plot.pictures(found, training_findings.from_json(found.findings))
    for name in ("loss of each step", "distance of the loss from native's", "distance of the parameters from native's"):
        assert "inverted (not finite)" in drawn[name]
    assert "different: not finite" in drawn["outcome beside the margin"]
    assert not re.search(r"[ \"]-?(nan|inf)[ \"]", page + "".join(drawn.values()))
    training_page.index({"a": found})


def test_native_that_is_not_finite_has_a_page_too():
    lost = run("native", 0.0, losses=(float("nan"),) * 30, loss=float("nan"))
    seeds = [replace(s, runs=(lost, *s.runs[1:])) for s in (seed(i, 1e-6) for i in range(2))]
    found = record(seeds)
    assert "no finite difference to show" in training_page.page(found)
    assert "±not finite" in text(training_page.page(found))


def test_a_worthless_run_says_what_it_did_not_notice(undrawn):
    seeds = [seed(i, 1e-6) for i in range(3)]
    blind = [replace(s, runs=(*s.runs[:3], replace(s.run("twin"), arm="coarse"))) for s in seeds]
    words = text(training_page.page(record(blind)))
    assert "✕ worthless , since no level tells apart: coarse" in words
    assert "✕ no level" in words


def test_an_unfinished_run_shows_what_it_has():
    found = record([seed(0, 1e-6)], unfinished=True)
    words = text(training_page.page(found))
    assert "○ unfinished : 1 seed done, no verdict yet; --resume goes on" in words
    assert "outcome beside the margin" not in words
    assert "○ unfinished" in text(training_page.index({"a": found}))
    training_page.picture(found)


def test_seeds_that_a_longer_run_left_are_not_on_the_page(undrawn):
    more = replace(EQUIVALENT, seeds=(*EQUIVALENT.seeds, seed(4, 0.7)))
    assert training_page.page(more) == training_page.page(EQUIVALENT)


def test_findings_of_something_else_are_refused(undrawn):
    with pytest.raises(InputError, match="train again"):
        training_page.page(replace(EQUIVALENT, findings={"lines": [{}]}))


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Seeds that need no time."""

    def made(_self, number, _arms):
        return seed(number, 1e-6)

    monkeypatch.setattr(training_command.Trainer, "seed", made)


ASKED = ["training", "--model", "mlp", "--steps", "30", "--seeds"]


def test_out_makes_the_folder_and_writes_record_page_picture_and_index(tmp_path, quick, capsys):
    out = tmp_path / "new" / "folder"
    assert main([*ASKED, "3", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "index.html", "mlp-float32.html", "mlp-float32.json", "mlp-float32.svg"
    }  # fmt: skip
    assert "mlp-float32.html" in capsys.readouterr().out
    written = training_record.read(out / "mlp-float32.json")
    assert (out / "mlp-float32.html").read_text() == training_page.page(written)


def test_an_interrupted_run_has_a_page_and_is_not_lost(tmp_path, undrawn, monkeypatch, capsys):
    def stopped(_self, number, _arms):
        if number == 2:
            raise KeyboardInterrupt
        return seed(number, 1e-6)

    monkeypatch.setattr(training_command.Trainer, "seed", stopped)
    asked = [*ASKED, "3", "--out", str(tmp_path)]
    assert main(asked) == 130
    before = (tmp_path / "mlp-float32.json").read_text()
    assert "2 seeds done" in (tmp_path / "mlp-float32.html").read_text()
    assert main(asked) == 2
    assert "mlp-float32.json has an interrupted run (2 done): say --resume" in capsys.readouterr().err
    assert (tmp_path / "mlp-float32.json").read_text() == before
    monkeypatch.setattr(training_command.Trainer, "seed", lambda _self, number, _arms: seed(number, 1e-6))
    assert main([*asked, "--resume"]) == 0
    assert "over 3 seeds" in (tmp_path / "mlp-float32.html").read_text()


@pytest.mark.parametrize(
    ("place", "files", "said"),
    [
        ("file", {"file": ""}, "name another with --out"),
        ("file/below", {"file": ""}, "name another with --out"),
        ("out", {"out/index.html": "<title>Mine</title>"}, "not an index of training runs"),
        ("out", {"out/mlp-float32.json": "[]"}, "not a training record"),
        ("out", {"out/mlp-float32.svg/x": ""}, "it is a folder"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_training(place, files, said, tmp_path, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("trained")

    monkeypatch.setattr(training_command.Trainer, "seed", never)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert main([*ASKED, "2", "--out", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)


def test_a_folder_that_may_not_be_written_to_is_found_before_the_training(tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(training_page.document.tempfile, "NamedTemporaryFile", refused)
    assert main([*ASKED, "2", "--out", str(tmp_path)]) == 2
    assert "(Permission denied): name a file in a folder you may write" in capsys.readouterr().err


def test_pages_are_drawn_anew_from_records_alone(tmp_path, quick, undrawn, capsys):
    assert main([*ASKED, "2", "--out", str(tmp_path)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        if path.suffix != ".json":
            path.unlink()
    (tmp_path / "other.json").write_text('{"settings": 1}')
    assert training_page.main([str(tmp_path)]) == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    shutil.rmtree(tmp_path)
    assert training_page.main([str(tmp_path)]) == 2
    assert "no training record" in capsys.readouterr().err


def test_the_results_in_the_guide_are_the_records():
    guide = (COMMITTED.parents[1] / "docs" / "equivalence.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(.*?)\]", guide, re.MULTILINE) == ["gpt-float32", "gpt-bfloat16", "llama-float32",
                                                                 "vit-float32"]  # fmt: skip
    for name in NAMES:
        assert guide_row(name) in guide


def guide_row(name):
    found = training_findings.from_json(training_record.read(COMMITTED / f"{name}.json").findings)
    tests = {line.quantity: line.test for line in found.lines if line.arm == "inverted"}
    shown = training_findings.shown
    loss, *ratios = (tests[q] for q in ("validation loss", "gradient, first weights", "loss of each step"))
    told = [f"{shown(t.mean)} ({shown(t.low)} to {shown(t.high)})" for t in ratios]
    cells = [f"[{name}](../reports/training/{name}.html)", found.whole, f"{shown(loss.low)} to {shown(loss.high)}",
             f"±{shown(loss.margin)}", *told, found.verdict("inverted", "trajectory")]  # fmt: skip
    return f"| {' | '.join(cells)} |"
