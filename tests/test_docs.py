"""What the guides in docs/ say is so: their programs run, and what they call refused is refused."""

import re
import shlex
from pathlib import Path

import pytest

import invref
from invref.errors import FormulaError
from verify import cli

ROOT = Path(__file__).parents[1]
FORMULAS = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["formulas.md", "convert.md", "memory.md"])
def test_the_programs_run_and_print_what_stands_below_them(name, capsys):
    names: dict[str, object] = {}
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for code, printed in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL):
        exec(compile(code, name, "exec"), names)
        out = capsys.readouterr().out
        assert not printed or out == printed


@pytest.mark.parametrize("text", ["log(x)", "1/x", "sqrt(x*x)", "x**(1/3)", "sin(x)", "1e6 + gelu(x)", "x + z"])
def test_what_is_called_refused_is_refused_in_one_line(text):
    with pytest.raises(FormulaError) as raised:
        invref.from_formula(text)
    assert "\n" not in str(raised.value)


COMMANDS = [
    command
    for name in ("equivalence.md", "formulas.md", "memory.md", "reports.md", "speed.md", "verification-at-scale.md")
    for command in re.findall(
        r"(?:^|^ {4}|&& )invref-verify ([^&#\n]*)", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.MULTILINE
    )
]


def test_there_are_command_lines():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_lines_are_understood(command):
    assert cli.parser().parse_args(shlex.split(command))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_every_relative_link_leads_to_a_file(path):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(<?([^)\s>]+)", prose)
    relative = [link.partition("#")[0] for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|#", link)]
    assert [link for link in relative if not (path.parent / link).exists()] == []
