"""What the README says is so."""

import json
import re
from pathlib import Path

import pytest

from verify import cli, document, figure, guarantees

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_at_most_120_lines_long():
    assert len(TEXT.splitlines()) <= 120


def test_its_guarantees_and_the_table_of_layers_are_those_of_the_committed_results():
    for path, text in guarantees.current().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `make readme`"


def test_its_guarantees_are_those_of_the_decoders_that_ship():
    run = json.loads(guarantees.RESULTS.read_text(encoding="utf-8"))["run"]
    assert run["tables"] == document.tables(), "stale: run `make reports`"


def test_its_example_runs_and_has_eight_lines():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.splitlines()) == 8
    exec(compile(code, "README.md", "exec"), {})


def test_its_pictures_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", TEXT)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file()


def test_its_make_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"`+([^`]*)`+", TEXT))))
    assert {"verify", "test", "tables"} <= named <= targets


@pytest.mark.parametrize("command", re.findall(r"^\.venv/bin/invref-verify (.*?)(?: +#.*)?$", TEXT, re.MULTILINE))
def test_its_command_lines_are_understood(command):
    assert cli.parser().parse_args(command.split())


def test_the_files_it_points_to_exist():
    for name in re.findall(r"`((?:invref|verify)/[\w/.]+)`", TEXT):
        assert (ROOT / name).exists(), name


def test_the_picture_is_drawn_from_the_formula_and_the_layer():
    branches, errors = figure.draw().axes
    assert len(branches.lines) >= 2
    assert len(errors.lines) >= 3
