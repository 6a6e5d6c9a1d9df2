"""What the guides in docs/ say is so: their programs run, and what they call refused is refused."""

import re
from pathlib import Path

import pytest

import invref
from invref.errors import FormulaError
from verify import cli

ROOT = Path(__file__).parents[1]
FORMULAS = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")


def test_the_programs_run():
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", FORMULAS, re.DOTALL):
        exec(compile(code, "formulas.md", "exec"), names)


@pytest.mark.parametrize("text", ["log(x)", "1/x", "sqrt(x*x)", "x**(1/3)", "sin(x)", "1e6 + gelu(x)", "x + z"])
def test_what_is_called_refused_is_refused_in_one_line(text):
    with pytest.raises(FormulaError) as raised:
        invref.from_formula(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("command", re.findall(r"^invref-verify (.*)$", FORMULAS, re.MULTILINE))
def test_the_command_lines_are_understood(command):
    import shlex

    assert cli.parser().parse_args(shlex.split(command))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_every_relative_link_leads_to_a_file(path):
    links = re.findall(r"\]\(<?([^)\s>]+)", path.read_text(encoding="utf-8"))
    relative = [link.partition("#")[0] for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|#", link)]
    assert [link for link in relative if not (path.parent / link).exists()] == []
