"""The command line as a user meets it: exit codes, files, pipes, terminals, interruptions."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from invref import formats
from verify import cli, document, mutants, sweep, targets
from verify.record import Check, Record

DEADLINE = 120
"""Seconds after which a run that should take a few is given up."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "verify", *arguments]


def run(*arguments: str, cwd: object = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=DEADLINE, check=False, cwd=cwd, encoding="utf-8"
    )


@pytest.fixture
def calls(monkeypatch):
    """Replaces the sweep by one that notes what it was asked for and passes."""
    noted = []

    def fake(target, dtype, **options):
        noted.append((target.name, dtype, options))
        options["progress"](1, 2)
        return record(target.name, dtype)

    monkeypatch.setattr(sweep, "run", fake)
    return noted


def record(activation: str, dtype: str, **changes: object) -> Record:
    fields = dict.fromkeys(Record.__dataclass_fields__)
    fields |= {"activation": activation, "dtype": dtype, "verdict": "exhausted", "checks": [], "reproduce": "again"}
    fields |= {"inputs": 1, "worst_error": 0.5, "nonfinite_gradients": 0, "seconds": 0.1}
    return Record(**{**fields, **changes})


def test_a_layer_that_holds_its_bounds_exits_0_and_writes_its_record(tmp_path):
    path = tmp_path / "out.json"
    result = run("gradient", "gelu", "--dtype", "bfloat16", "--json", str(path), "--state", str(tmp_path))
    assert result.returncode == cli.PASSED, result.stdout + result.stderr
    assert result.stderr == ""  # no progress bar in a pipe
    assert "\x1b" not in result.stdout
    assert "exhausted" in result.stdout
    assert "65,280" in result.stdout
    (read,) = document.read(path)
    assert (read.inputs, read.verdict) == (formats.get("bfloat16").finite_count, "exhausted")
    assert json.loads(path.read_text())["run"]["seconds"] > 0


def test_a_layer_that_violates_a_bound_exits_1_names_the_check_and_writes_its_record(tmp_path):
    path = tmp_path / "out.json"
    swapped = "torch.nn.functional:silu"
    result = run("gradient", "gelu", "--dtype", "bfloat16", "--target", swapped, "--json", str(path))
    assert result.returncode == cli.VIOLATED, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("VIOLATED gelu bfloat16: gradient error")]
    assert lines
    assert f"--target {swapped}" in lines[0]
    assert document.read(path)[0].verdict == "failed"


def test_the_command_that_reproduces_an_input_shows_that_input():
    result = run("gradient", "gelu", "--dtype", "bfloat16", "--input", "0xbf41")
    assert result.returncode == cli.PASSED
    assert "x = -0.75390625 = -0x1.8200000000000p-1, bits 0xbf41, piece 0" in result.stdout
    assert "f'(x)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["gradient", "gleu"], "did you mean gelu"),
        (["gradient"], "--all"),
        (["gradient", "gelu", "--dtype", "float33"], "did you mean float32"),
        (["gradient", "gelu:float33"], "did you mean float32"),
        (["gradient", "gelu", "--shard", "3/2"], "1 ≤ I ≤ N"),
        (["gradient", "gelu", "--shard", "x"], "as in 2/8"),
        (["gradient", "gelu", "--samples", "0"], "1 or more"),
        (["gradient", "gelu", "--samples", "many"], "--help"),
        (["gradient", "gelu", "--device", "abacus"], "use cpu"),
        (["gradient", "gelu", "--json", "/nowhere/out.json"], "a folder you may write"),
        (["gradient", "gelu", "--json", "/"], "it is a folder"),
        (["gradient", "gelu", "--dtype", "bfloat16", "--input", "0x7f80"], "not a finite bfloat16"),
        (["gradient", "gelu", "--dtype", "bfloat16", "--input", "0x12345"], "4 hexadecimal digits"),
        (["gradient", "gelu", "--target", "nowhere"], "module:callable"),
        (["gradient", "gelu", "silu", "--target", "torch:tanh"], "name the one activation"),
        (["gradient", "gelu", "--frobnicate"], "--help"),
        (["mutants", "nobody"], "use one of"),
        (["frobnicate"], "gradient"),
        ([], "--help"),
    ],
)
def test_bad_input_exits_2_with_one_line_that_names_the_remedy(arguments, remedy, calls, capsys):
    assert cli.main(arguments) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("invref-verify: ")
    assert len(err.splitlines()) == 1
    assert remedy in err
    assert not calls  # found before the work starts


def test_bad_input_exits_2_from_the_shell_too():
    result = run("gradient", "gleu")
    assert (result.returncode, len(result.stderr.splitlines())) == (cli.BAD_INPUT, 1)


def test_all_means_every_layer_and_a_name_with_a_format_adds_to_it(calls, tmp_path):
    dtypes = ["--dtype", "float16", "bfloat16"]
    assert cli.main(["gradient", "--all", "gelu:float32", *dtypes, "--state", str(tmp_path)]) == cli.PASSED
    asked = [(name, dtype) for name, dtype, _ in calls]
    sixteen = [(name, dtype) for name in targets.TARGETS for dtype in ("bfloat16", "float16")]
    assert sorted(asked) == sorted([*sixteen, ("gelu", "float32")])
    assert asked.index(("gelu", "float32")) == asked.index(("gelu", "float16")) + 1  # grouped with its activation


def test_the_formats_asked_for_by_default_are_the_three_that_training_uses(calls, tmp_path):
    cli.main(["gradient", "silu", "--state", str(tmp_path)])
    assert [dtype for _, dtype, _ in calls] == ["bfloat16", "float16", "float32"]


def test_samples_reach_the_sweep(calls, tmp_path):
    cli.main(["gradient", "silu", "--dtype", "float32", "--samples", "7", "--state", str(tmp_path)])
    assert calls[0][2]["samples"] == 7


def test_shard_and_state_reach_the_sweep(calls, tmp_path, capsys):
    options = ["--shard", "2/3", "--state", str(tmp_path)]
    assert cli.main(["gradient", "silu", "--dtype", "float32", *options]) == cli.PASSED
    ((_, _, asked),) = calls
    assert (asked["shard"], asked["state_dir"]) == ((2, 3), tmp_path)
    assert f"invref-verify merge {tmp_path}" in capsys.readouterr().out


def test_a_state_folder_that_cannot_be_written_costs_only_the_resuming(calls, tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert cli.main(["gradient", "silu", "--dtype", "float16", "--state", str(blocker / "state")]) == cli.PASSED
    assert calls[0][2]["state_dir"] is None
    assert "--state DIR" in capsys.readouterr().err


def test_the_state_folder_is_in_the_cache_of_the_user(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.main(["gradient", "silu", "--dtype", "float16"])
    assert calls[0][2]["state_dir"] == tmp_path / "invref-verify"


def test_fresh_forgets_the_parts_of_the_layers_asked_for_and_nothing_else(calls, tmp_path):
    mine, other, foreign = (tmp_path / name for name in (f"silu-float32-{'0' * 16}", f"gelu-float32-{'0' * 16}", "x"))
    for folder in (mine, other, foreign):
        folder.mkdir()
    cli.main(["gradient", "silu", "--fresh", "--state", str(tmp_path)])
    assert (mine.exists(), other.exists(), foreign.exists()) == (False, True, True)


def test_one_violated_check_among_many_records_exits_1(monkeypatch, tmp_path):
    def fake(target, dtype, **_):
        bad = target.name == "gelu"
        checks = [Check("count", 1.0, 2.0, not bad)]
        return record(target.name, dtype, verdict="failed" if bad else "exhausted", checks=checks)

    monkeypatch.setattr(sweep, "run", fake)
    assert cli.main(["gradient", "--all", "--dtype", "float16", "--state", str(tmp_path)]) == cli.VIOLATED


def test_a_target_that_raises_is_bad_input(monkeypatch, capsys, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(sweep, "run", broken)
    arguments = ["gradient", "gelu", "--target", "torch:tanh", "--state", str(tmp_path)]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert "the target raised ZeroDivisionError: oops" in capsys.readouterr().err


def test_a_terminal_gets_a_progress_bar_and_a_table_without_it(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("gradient", "silu", "--dtype", "float32", "--shard", "1/256", "--state", str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how a terminal says that the other side has closed it
        pass
    out, _ = process.communicate(timeout=DEADLINE)
    os.close(ours)
    assert "silu float32 (1 of 1)" in shown.decode()
    assert "%" in shown.decode()
    assert "%" not in out


def test_an_interrupted_run_exits_130_keeps_its_parts_and_resumes(tmp_path):
    # Part 1 of 16 has 16 shards or so: more than can finish between the first one's file and the signal.
    part = command("gradient", "gelu", "--dtype", "float32", "--shard", "1/16", "--state", str(tmp_path))
    process = subprocess.Popen(part, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + DEADLINE
    while not (kept := list(tmp_path.glob("*/*.npz"))) and time.monotonic() < until:
        time.sleep(0.01)
    assert kept
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == cli.INTERRUPTED, err
    assert out == ""
    assert "the same command resumes" in err
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")}
    resumed = subprocess.run(part, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert "sampled" in resumed.stdout or "failed" in resumed.stdout
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npz")}
    assert len(after) > len(before)
    assert all(after[path] == stamp for path, stamp in before.items())  # not run again


def test_a_reader_that_leaves_early_is_no_crash():
    process = subprocess.Popen(
        command("gradient", "gelu", "--dtype", "bfloat16", "--input", "0xbf41"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(DEADLINE)
    assert "Traceback" not in err


def test_a_surviving_mutant_exits_1_and_is_named(monkeypatch, capsys, tmp_path):
    path = tmp_path / "mutants.json"
    mutant = mutants.Mutant("harmless", "nothing is wrong", "bfloat16", ("gradient error",), lambda t: t.layer)
    monkeypatch.setattr(mutants, "MUTANTS", {"harmless": mutant})
    monkeypatch.setattr(sweep, "run", lambda target, dtype, **_: record(target.name, dtype))
    assert cli.main(["mutants", "--json", str(path)]) == cli.VIOLATED
    out = capsys.readouterr().out
    assert "SURVIVED" in out
    assert "harmless (nothing is wrong): must fail gradient error; failed nothing" in out
    assert json.loads(path.read_text())["mutants"][0]["caught"] is False


@pytest.mark.parametrize(
    "text", ["import sys\nsys.exit(0)\n", "def f(x:\n", "1 / 0\n", "def f(x):\n    raise SystemExit(0)\n"]
)
def test_a_target_that_exits_or_does_not_load_is_bad_input(tmp_path, text):
    (tmp_path / "odd_target.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "verify", "gradient", "gelu", "--dtype", "bfloat16", "--target", "odd_target:f"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
