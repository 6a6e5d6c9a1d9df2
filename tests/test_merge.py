"""Parts run by themselves and put together: the record of one run, or one line that says what is missing."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import shrink

from verify import cli, document, shards, sweep, sweep32, targets
from verify.oracle import FLOAT32

COUNT = 3
COMMITTED = document.read(Path(__file__).parents[1] / "reports" / "gradient.json")


def fewer(monkeypatch):
    """Few inputs, in four shards, and few through the scalar tail."""
    shrink(monkeypatch)
    monkeypatch.setattr(sweep32, "WINDOW", 1 << 12)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    fewer(monkeypatch)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The folders of three machines, each of which has run a part of two layers."""
    folders = [tmp_path_factory.mktemp("parts") / f"machine {i}" for i in range(1, COUNT + 1)]
    with pytest.MonkeyPatch.context() as patch:
        fewer(patch)
        for i, folder in enumerate(folders, 1):
            part = ["--shard", f"{i}/{COUNT}", "--state", str(folder)]
            cli.main(["gradient", "gelu", "silu", "--dtype", "float32", *part])
    return folders


@pytest.fixture
def parts(originals, tmp_path):
    """Copies of these folders, as one would fetch them from the machines."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in originals]


def merge(folders, *options):
    return cli.main(["merge", *map(str, folders), *options])


def files(folders):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for folder in folders for p in folder.rglob("*") if p.is_file()}


def test_the_merged_record_is_that_of_one_run_and_the_parts_stay(parts, monkeypatch, tmp_path, capsys):
    before = files(parts)
    ran = []
    honest = sweep32.run_shard
    monkeypatch.setattr(sweep32, "run_shard", lambda *a: ran.append(1) or honest(*a))
    path = tmp_path / "merged.json"
    # These are fewer inputs than float32 has, which no merger may hide.
    assert merge(parts, "--json", str(path)) == cli.VIOLATED
    assert "VIOLATED gelu float32: count" in capsys.readouterr().out
    assert ran == []
    assert files(parts) == before
    merged = document.read(path)
    assert [record.activation for record in merged] == ["gelu", "silu"]
    for record in merged:
        whole = sweep.run(targets.TARGETS[record.activation], "float32")
        assert len(ran) == 4
        ran.clear()
        assert replace(record, seconds=0) == replace(whole, seconds=0)
        assert record.inputs == 1 << 16


def test_only_the_layers_named_are_merged_and_one_that_is_not_there_is_said(parts, tmp_path, capsys):
    shutil.rmtree(next(parts[0].glob("silu-*")))
    assert merge(parts) == cli.BAD_INPUT
    assert "silu: 2 of 4 results are missing (0, 3)" in capsys.readouterr().err
    path = tmp_path / "merged.json"
    merge(parts, "--name", "gelu", "--json", str(path))
    assert [record.activation for record in document.read(path)] == ["gelu"]
    capsys.readouterr()
    assert merge(parts, "--name", "gelu", "mish") == cli.BAD_INPUT
    assert "no parts of mish in" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["lost", "cut short", "a folder lost"])
def test_a_part_that_is_not_whole_is_bad_input_and_nothing_is_written(parts, damage, tmp_path, capsys):
    victim = next(parts[1].glob("gelu-*/shard-*.npz"))
    if damage == "lost":
        victim.unlink()
    elif damage == "cut short":
        victim.write_bytes(victim.read_bytes()[:500])
    path = tmp_path / "merged.json"
    folders = [parts[0], parts[2]] if damage == "a folder lost" else parts
    assert merge(folders, "--json", str(path)) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "gelu: 1 of 4 results are missing (1): run" in error
    assert f"--state {parts[0]}" in error
    assert not path.exists()


def test_a_damaged_copy_gives_way_to_a_whole_one(parts, tmp_path):
    spare = tmp_path / "spare"
    shutil.copytree(parts[1], spare)
    victim = next(parts[1].glob("gelu-*/shard-*.npz"))
    victim.write_bytes(b"")
    assert merge([*parts, spare]) == cli.VIOLATED  # by the count alone, as above


@pytest.mark.parametrize("change", ["torch", "forward", "sources"])
def test_parts_of_other_code_or_machines_are_refused(parts, change, capsys, monkeypatch):
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
        words = "another torch, 2.13"
    elif change == "forward":
        # As a machine with another processor would have written it.
        for folder in [kept for part in parts for kept in part.iterdir()]:
            note = json.loads((folder / shards.NOTE).read_text())
            (folder / shards.NOTE).write_text(json.dumps(note | {"forward": "torch 2.13, CPU OTHER"}))
            folder.rename(folder.with_name(f"{folder.name[:-16]}{'0' * 16}"))
        words = "another forward, torch 2.13, CPU OTHER, and not"
    else:
        monkeypatch.setattr(shards, "sources", lambda target: [])
        words = "other sources of invref"
    assert merge(parts) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_stale_results_beside_whole_ones_do_no_harm(parts, monkeypatch):
    for folder in parts:
        kept = next(folder.glob("gelu-*"))
        shutil.copytree(kept, kept.with_name(f"gelu-float32-{'0' * 16}"))
    assert merge(parts) == cli.VIOLATED  # by the count alone


def test_parts_of_a_layer_that_is_not_known_here_do_no_harm_to_others(parts, capsys):
    other = parts[0] / f"swash-float32-{'0' * 16}"
    other.mkdir()
    (other / shards.NOTE).write_text('{"request": "swash"}')
    assert merge(parts) == cli.VIOLATED  # by the count alone
    capsys.readouterr()
    assert merge(parts, "--name", "swash") == cli.BAD_INPUT
    assert "unknown activation 'swash'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "note", ["", "[]", '{"request": 3}', '{"request": "--target os:abort"}', '{"request": "--all --what"}', "{"]
)
def test_a_note_that_says_nothing_of_ours_is_bad_input_and_imports_nothing(parts, note, capsys):
    next(parts[0].glob(f"gelu-*/{shards.NOTE}")).write_text(note)
    assert merge(parts) == cli.BAD_INPUT
    assert "copy the folder of the part again" in capsys.readouterr().err


def test_formulas_and_the_frameworks_own_are_merged(tmp_path):
    options = ["--dtype", "float32", "--state", str(tmp_path)]
    for what in (["--native", "gelu"], ["--formula", "x*tanh(softplus(x))"]):
        for i in (1, 2):
            cli.main(["gradient", *what, *options, "--shard", f"{i}/2"])
    requests = {json.loads(path.read_text())["request"] for path in tmp_path.glob(f"*/{shards.NOTE}")}
    assert requests == {"gelu --native", "--formula 'x*tanh(softplus(x))'"}
    path = tmp_path / "merged.json"
    assert merge([tmp_path], "--json", str(path)) == cli.VIOLATED  # by the count alone
    assert len(document.read(path)) == 2
    for record in document.read(path):
        assert {check.name for check in record.failures} == {"count"}


def test_an_empty_folder_a_missing_one_and_a_path_that_cannot_be_written(tmp_path, capsys):
    assert merge([tmp_path]) == cli.BAD_INPUT
    assert "no parts in" in capsys.readouterr().err
    assert merge([tmp_path / "nowhere"]) == cli.BAD_INPUT
    assert merge([tmp_path], "--json", str(tmp_path / "no" / "x.json")) == cli.BAD_INPUT
    assert "cannot write" in capsys.readouterr().err


def test_a_part_of_somebody_elses_layer_is_not_said_to_be_kept(tmp_path, capsys):
    what = ["gradient", "gelu", "--target", "torch.nn.functional:gelu", "--dtype", "float32", "--shard", "1/2"]
    cli.main([*what, "--state", str(tmp_path)])
    assert "is kept in" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_local_commands_of_the_guide_give_the_record_of_one_run(tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "verification-at-scale.md").read_text(encoding="utf-8")
    commands = guide.partition("## On one machine")[2].partition("```sh\n")[2].partition("```")[0]
    assert commands.count("invref-verify") == 2
    # Of the layers the quickest one.
    commands = commands.replace("gradient gelu", "gradient softsign")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["sh", "-euxc", commands], cwd=tmp_path, check=True, env={**os.environ, "PATH": path})
    (record,) = document.read(tmp_path / "gelu.json")
    assert (record.inputs, record.verdict) == (FLOAT32.finite_count, "exhausted")
    (committed,) = (r for r in COMMITTED if (r.activation, r.dtype) == ("softsign", "float32"))
    assert (record.worst_error, record.error_floor) == (committed.worst_error, committed.error_floor)
