"""What a user has without the packages that only some features need, and how long an import may take.

Each program runs in a process of its own, in which those modules cannot be imported.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import records

from invref.errors import OPTIONAL, MissingError, needing

DEADLINE = 180
HEAVY = ("sympy", "mpmath", "flint", "numba", "llvmlite", "scipy", "matplotlib", "triton", "pandas", "rich")
LONGEST_IMPORT = 0.3
"""Seconds beyond torch."""


def run(code, *arguments, without=()):
    """A program's result; `without`: modules that cannot be imported in it."""
    barred = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    program = f"import sys, warnings\n{barred}{code}"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=DEADLINE, check=False,
        encoding="utf-8", env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip


COMMAND = "from verify.cli import main\nsys.exit(main(sys.argv[1:]))"

LAYERS = """
import json, torch, invref
from invref.catalogue import ROWS
warnings.simplefilter("always")
worst = {}
with warnings.catch_warnings(record=True) as said:
    for name, row in ROWS.items():
        for dtype, n in ((torch.float32, 70_001), (torch.bfloat16, 70_001), (torch.float16, 1_001)):
            x = torch.linspace(-6, 6, n).to(dtype).requires_grad_()
            y = row.layer(x)
            own = x.detach().clone().requires_grad_()
            expected = row.native(own)
            assert torch.equal(y, expected), name
            gradients = [torch.autograd.grad(a.sum(), b)[0].double() for a, b in ((y, x), (expected, own))]
            difference = (gradients[0] - gradients[1]).abs() / gradients[1].abs().clamp(min=1)
            # At a kink, which the catalogue has at multiples of a half, the slopes of both sides are right.
            difference[(2 * x.detach()).frac() == 0] = 0
            worst[f"{name} {str(dtype).removeprefix('torch.')}"] = float(difference.max())
print(json.dumps({"worst": worst, "said": [str(w.message) for w in said]}))
"""

BOUNDS = {" ".join(key): 1.05 * record.worst_error + record.native_error for key, record in records().items()}
"""What a layer's gradient may differ from torch's own: both errors, as measured over all inputs, breaks aside.

Without compiled kernels float32 has the rational functions instead of the polynomials: as good within 2^-20, a
twentieth of it.
"""


def far(seen):
    """The layers whose gradients are not those of torch's own, as near as their formats allow."""
    return {name for name, error in seen.items() if not error <= BOUNDS[name] + 2.0**-20}


def layers(*without):
    result = run(LAYERS, without=without)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_layers_are_right_without_any_of_the_packages_but_llvmlite():
    told = layers("numba", "flint", "matplotlib", "triton", "mpmath", "sympy", "rich")
    assert far(told["worst"]) == set()
    assert told["said"] == []


def test_layers_are_right_without_llvmlite_and_say_so_once():
    told = layers("llvmlite")
    assert far(told["worst"]) == set()
    (said,) = told["said"]
    assert "pip install llvmlite" in said


def test_machine_code_makes_no_difference_to_a_16_bit_gradient():
    code = """
import hashlib, torch, invref
warnings.simplefilter("ignore")
digest = hashlib.sha256()
for dtype in (torch.bfloat16, torch.float16):
    for layer in (invref.GELU(), invref.SiLU(), invref.Mish(), invref.ELU()):
        x = torch.linspace(-8, 8, 100_003).to(dtype).requires_grad_()
        gradient, = torch.autograd.grad(layer(x).sum(), x)
        digest.update(gradient.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""
    compiled, without = run(code), run(code, without=["llvmlite"])
    assert compiled.returncode == without.returncode == 0, compiled.stderr + without.stderr
    assert compiled.stdout == without.stdout


@pytest.mark.parametrize("without", ["matplotlib", "triton"])
def test_a_verification_does_without(without, tmp_path):
    arguments = ["gradient", "elu", "gelu", "--dtype", "bfloat16", "--json", str(tmp_path / "out.json")]
    result = run(COMMAND, *arguments, without=[without])
    assert result.returncode == 0, result.stderr
    assert "checks hold" in result.stdout


@pytest.mark.parametrize("without", ["matplotlib", "triton"])
def test_a_report_does_without(without, tmp_path):
    result = run(COMMAND, "report", "relu", "--dtype", "bfloat16", "--out", str(tmp_path), without=[without])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "relu.html").exists()


SPEED = [
    "speed",
    "relu",
    "--dtype",
    "float32",
    "--threads",
    "1",
    "--sizes",
    "64",
    "--parts",
    "layers",
    "--seconds",
    "0.01",
]


def test_a_speed_measurement_does_without_all_but_its_table(tmp_path):
    result = run(
        COMMAND,
        *SPEED,
        "--json",
        str(tmp_path / "out.json"),
        without=["flint", "matplotlib", "triton", "numba", "llvmlite"],
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out.json").read_text())["timings"]


@pytest.mark.parametrize(
    ("arguments", "without", "package"),
    [
        (["gradient", "gelu", "--dtype", "bfloat16"], "flint", "python-flint"),
        (["gradient", "--all", "--native"], "flint", "python-flint"),
        (["gradient", "gelu"], "numba", "numba"),
        (["gradient", "gelu"], "rich", "rich"),
        (["report", "gelu", "--out", "."], "flint", "python-flint"),
        (["mutants"], "flint", "python-flint"),
        ([*SPEED, "--plot", "speed.svg"], "matplotlib", "matplotlib"),
        ([*SPEED], "rich", "rich"),
    ],
)
def test_a_command_that_needs_a_package_says_in_one_line_what_to_install(arguments, without, package, tmp_path):
    result = run(f"import os\nos.chdir({str(tmp_path)!r})\n{COMMAND}", *arguments, without=[without])
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("invref-verify: ")
    assert f"pip install {package}" in line
    assert list(tmp_path.iterdir()) == []


def test_the_help_is_there_without_any_of_the_packages():
    assert run(COMMAND, "--help", without=[*OPTIONAL]).returncode == 0
    result = run(COMMAND, "--help", without=["flint"])
    assert result.returncode == 0, result.stderr
    assert "pip install python-flint" in result.stdout


@pytest.mark.parametrize(
    "use",
    [
        "invref.from_formula('x*tanh(x)')",
        "invref.reference.inverse('gelu', 1, 1)",
        "invref.enclosure",
        "ROWS['gelu'].formula",
        "invref.GELU()(torch.ones(3, dtype=torch.float64, requires_grad=True)).sum().backward()",
    ],
)
def test_what_needs_exact_arithmetic_says_what_to_install(use):
    code = f"""
import torch, invref
from invref.catalogue import ROWS
from invref.errors import MissingError
try:
    {use}
except MissingError as error:
    print(error)
"""
    result = run(code, without=["flint"])
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "needs python-flint: pip install python-flint" in result.stdout


def test_an_import_that_fails_for_another_reason_is_not_explained_away():
    with pytest.raises(ModuleNotFoundError) as raised, needing("this"):
        import invref_has_no_such_module  # noqa: F401
    assert not isinstance(raised.value, MissingError)
    with pytest.raises(MissingError, match="this needs numba: pip install numba"), needing("this"):
        raise ModuleNotFoundError("no", name="numba.core")


# Imports.


def test_importing_invref_loads_none_of_the_heavy_packages():
    # Nor does calling a layer in a format that needs none of them.
    before = run("import torch\nprint(*sys.modules)").stdout.split()
    code = (
        "import torch, invref\ninvref.ReLU()(torch.ones(3, requires_grad=True)).sum().backward()\nprint(*sys.modules)"
    )
    after = run(code).stdout.split()
    assert "invref.functional" in after
    new = {name.partition(".")[0] for name in set(after) - set(before)}
    assert new & set(HEAVY) == set()


def test_importing_invref_is_quick():
    code = "import time, torch\nstart = time.perf_counter()\nimport invref\nprint(time.perf_counter() - start)"
    # What else runs on the machine only adds: the quickest of a few is what the import itself takes.
    assert min(float(run(code).stdout) for _ in range(4)) <= LONGEST_IMPORT
