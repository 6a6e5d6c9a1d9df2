"""Machine code: where it comes from, on which threads it runs, and that it does so wherever Python does."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from invref.decoders import load
from invref.kernels import cpu, cpu_kernels, machine
from invref.kernels import runs as runs_module


def program(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


GRADIENTS = """
import torch, invref
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    x = torch.linspace(-3, 3, 1001).to(dtype).requires_grad_()
    invref.functional.silu(x).sum().backward()
    print(x.grad.double().sum().item(), x.grad.double().square().sum().item())
"""


PLAIN = """
from invref.kernels import machine
machine.processor = lambda: ("x86-64", "")
machine.has = lambda feature: False
"""


def test_without_openmp_threads_of_its_own_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(400_000)
    y, dy = torch.nn.functional.silu(x), torch.randn(400_000)
    before = torch.get_num_threads()
    handed: list[int] = []
    hand_out = runs_module._hand_out
    monkeypatch.setattr(runs_module, "_hand_out", lambda runs: (handed.append(len(runs)), hand_out(runs)))
    try:
        results = []
        for openmp in (runs_module.openmp(), None):
            monkeypatch.setattr(runs_module, "openmp", lambda found=openmp: found)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(cpu.on_cells(load("silu"))(dy, y, cpu.packer(-1.27, torch.float32)(x)))
    finally:
        torch.set_num_threads(before)
    assert handed[-2:] == [3, 3]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is GNU's on Linux alone")
def test_machine_code_runs_on_the_threads_of_torch() -> None:
    code = """
import threading, torch
from invref.decoders import load
from invref.kernels import cpu
torch.set_num_threads(2)
x = torch.randn(400_000)
cpu.on_cells(load("silu"))(x, torch.nn.functional.silu(x), cpu.packer(-1.27, torch.float32)(x))
print(threading.active_count())
"""
    assert program(code) == "1"


def test_a_forked_child_decodes_on_threads_of_its_own() -> None:
    # In the child torch itself must not run in parallel: its OpenMP does not survive a fork.
    code = """
import os, torch
from invref.decoders import load
from invref.kernels import cpu
torch.set_num_threads(2)
x = torch.randn(400_000)
y, dy = torch.nn.functional.silu(x), torch.ones_like(x)
work = lambda: cpu.on_cells(load("silu"))(dy, y, cpu.packer(-1.27, torch.float32)(x)).numpy()
expected = work()
pid = os.fork()
if pid == 0:
    os._exit(0 if (work() == expected).all() else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "0", done.stderr


def test_machine_code_from_the_cache_is_that_of_these_sources_and_this_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVREF_CACHE", str(tmp_path))
    written: list[str] = []

    def write(wide: bool, fmt: str) -> str:
        written.append(fmt)
        return cpu_kernels.pack(wide, fmt)

    machine.made(write, "float32")
    machine.made(write, "float32")
    assert written == ["float32"]
    machine.made(write, "float16")
    assert written == ["float32", "float16"]
    monkeypatch.setattr(machine, "SOURCES", machine.SOURCES[1:])
    machine.made(write, "float32")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "processor", lambda: ("x86-64", ""))
        machine.made(write, "float32")
    assert written[2:] == ["float32", "float32"]
    for entry in tmp_path.glob("*.json"):
        entry.write_text(entry.read_text()[:-20])
    machine.made(write, "float32")
    assert written[4:] == ["float32"]


def test_the_sources_of_machine_code_are_all_that_kernels_import() -> None:
    folder = Path(machine.__file__).parents[1]
    wanted, found = [f"kernels/{name}.py" for name in ("binned_kernels", "calls", "cpu_kernels", "machine")], set()
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            text = (folder / name).read_text()
            modules = re.findall(r"^from invref\.([.\w]+) import", text, re.M)
            wanted += [f"{module.replace('.', '/')}.py" for module in modules]
    # What keeps and what reports has no part in what the code is.
    assert found - {"errors.py", "formats.py"} == set(machine.SOURCES)


def test_where_there_is_no_place_for_a_cache_it_compiles_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert program(GRADIENTS, INVREF_CACHE=str(tmp_path / "file" / "below")) == program(GRADIENTS)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for the least of x86-64")
def test_a_processor_without_wide_vectors_and_half_conversions_gives_the_same_bits(tmp_path: Path) -> None:
    assert program(PLAIN + GRADIENTS, INVREF_CACHE=str(tmp_path)) == program(GRADIENTS)


def test_backward_runs_while_the_interpreter_shuts_down() -> None:
    code = """
import atexit, torch, invref
torch.set_num_threads(2)
def last():
    x = torch.ones(300_000, requires_grad=True)
    invref.functional.silu(x).backward(torch.ones(300_000))
    print(bool((x.grad == x.grad[0]).all()))
atexit.register(last)
"""
    assert program(code) == "True"


def test_threads_that_wait_for_work_raise_errors_in_the_caller_and_hold_nothing() -> None:
    class Held:
        pass

    held = Held()
    alive = weakref.ref(held)
    calls: list[str] = []

    def fail(thing: Held) -> None:
        calls.append("failed")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runs_module._hand_out([partial(calls.append, "here"), partial(fail, held), partial(calls.append, "there")])
    assert sorted(calls) == ["failed", "here", "there"]
    del held
    gc.collect()
    assert alive() is None
    # They go on waiting, and take the next work.
    runs_module._hand_out([partial(calls.append, "again")] * 3)
    assert calls.count("again") == 3


def test_a_shutting_down_interpreter_runs_everything_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(runs_module, "_crew", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    calls: list[int] = []
    runs_module._hand_out([partial(calls.append, i) for i in range(4)])
    assert calls == [0, 1, 2, 3]


FORKS = """
import os, signal, sys, threading, time
from invref import cache
from invref.kernels import cpu_kernels, machine
cache.load = lambda *_: None
def compile():
    while True:
        machine.made(cpu_kernels.table, "bfloat16", 1)
threading.Thread(target=compile, daemon=True).start()
for _ in range(5):
    time.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        machine.made(cpu_kernels.pack, "float32")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_process_may_be_forked_while_another_thread_compiles(tmp_path: Path) -> None:
    assert program(FORKS, INVREF_CACHE=str(tmp_path)).split() == ["0"] * 5
