"""What the guides in docs/ say is so: their programs run, and what they call refused is refused."""

import re
from pathlib import Path

import pytest

import invref
from invref.errors import FormulaError
from verify import cli

FORMULAS = (Path(__file__).parents[1] / "docs" / "formulas.md").read_text(encoding="utf-8")


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
