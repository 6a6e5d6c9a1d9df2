"""Machine code of kernels, by LLVM through llvmlite: compiled in a tenth of a second, and kept on disk (`cache`).

Guarantees that machine code from other sources, by another compiler or for another processor is never run; without a
place to write everything is compiled in each process; and that a process may be forked meanwhile. Must not know what
kernels do.
"""

from __future__ import annotations

import base64
import os
import platform
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from invref import cache as disk
from invref.kernels.vectors import NAME

SOURCES = (
    "bins.py", "decoders.py", "kernels/binned.py", "kernels/binned_kernels.py", "kernels/blocks.py", "kernels/calls.py",
    "kernels/cpu_kernels.py", "kernels/machine.py", "kernels/sidebits.py", "kernels/vectors.py",
)  # fmt: skip
"""What machine code is made from."""
Code = int
"""The address of a kernel, which takes that of its arguments."""
at_work = threading.RLock()
"""Held by whoever uses LLVM, and by a fork: a child would wait for ever for a thread that is not there."""
os.register_at_fork(before=at_work.acquire, after_in_parent=at_work.release, after_in_child=at_work.release)


@cache
def processor() -> tuple[str, str]:
    """The name of this machine's processor and what it can do, in LLVM's words."""
    with at_work:
        return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def has(feature: str) -> bool:
    """Whether the processor can do something, in LLVM's words."""
    return f"+{feature}" in processor()[1].split(",")


@cache
def converts_halves() -> bool:
    """Whether float16 is converted by the processor: x86 without F16C would need a library that is not there."""
    with at_work:
        triple = llvm.get_process_triple()
    return not triple.startswith(("x86", "i686")) or has("f16c")


def made(write: Callable[..., str], *parameters: Any) -> Code:
    """The kernel that write(wide, *parameters) gives in LLVM's language, from the cache or compiled.

    wide: whether the processor has AVX-512.
    """
    title = " ".join([f"{write.__module__}.{write.__qualname__}", *map(repr, parameters)])
    name = disk.key(
        "machine code", title, disk.hash_of("invref", SOURCES), llvmlite.__version__, platform.machine(), *processor()
    )
    with at_work:
        kept = disk.load(name)
        if kept is None:
            code = _compiled(write(has("avx512f"), *parameters))
            disk.store(name, base64.b64encode(code).decode())
        else:
            code = base64.b64decode(kept)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        address: Code = engine.get_function_address(NAME)
        return address


_engines: list[Any] = []
"""They own the code, for as long as the process lives."""


def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = processor()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(name, features, opt=3, jit=True)


def _compiled(text: str) -> bytes:
    """An object file of one function."""
    machine = _target()
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    # Vectors are written out already; what is left are copies of a block's end.
    options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code
