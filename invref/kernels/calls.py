"""Machine code called from Python with numbers: in a tenth of a microsecond, where ctypes takes one.

The function that does it is machine code itself, one for all kernels: it writes its arguments one after another into
memory and calls a kernel with their address, without the interpreter lock, in this thread or in torch's OpenMP. Must
not know what kernels do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import llvmlite.binding as llvm
import torch

from invref.kernels.machine import at_work, made

Call = Callable[..., None]
"""(address of a kernel, run, runs, its other arguments: 64-bit integers) -> None.

With runs = 0 so many threads of OpenMP as `run` says are at work, which ask it who they are: the kernel's arguments are
run, runs, the addresses of the functions to ask, and the others.
"""

FASTCALL = 0x80
"""METH_FASTCALL of Python's C interface: arguments come as an array of objects and its length."""
PYTHON = ("PyLong_AsLongLong", "PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef")
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""OpenMP's parallel region, and what tells a thread its number and theirs, as GNU has them."""

TEXT = """
declare i64 @PyLong_AsLongLong(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_IncRef(ptr)
@_Py_NoneStruct = external global i8
declare void @GOMP_parallel(ptr, ptr, i32, i32)
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()

define ptr @kernel(ptr %self, ptr %objects, i64 %count) {
begin:
  %room = add i64 %count, 1
  %words = alloca i64, i64 %room
  %first = load ptr, ptr %objects
  %address = call i64 @PyLong_AsLongLong(ptr %first)
  %code = inttoptr i64 %address to ptr
  br label %head
head:
  %i = phi i64 [ 1, %begin ], [ %next, %body ]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %body, label %end
body:
  %next = add i64 %i, 1
  %from = getelementptr ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %from
  %word = call i64 @PyLong_AsLongLong(ptr %object)
  %early = icmp ult i64 %i, 3
  %place = select i1 %early, i64 -1, i64 1
  %index = add i64 %i, %place
  %to = getelementptr i64, ptr %words, i64 %index
  store i64 %word, ptr %to
  br label %head
end:
  %number = getelementptr i64, ptr %words, i64 2
  store ptr @omp_get_thread_num, ptr %number
  %total = getelementptr i64, ptr %words, i64 3
  store ptr @omp_get_num_threads, ptr %total
  %own = load i64, ptr %words
  %threads = trunc i64 %own to i32
  %at = getelementptr i64, ptr %words, i64 1
  %runs = load i64, ptr %at
  %parallel = icmp eq i64 %runs, 0
  %state = call ptr @PyEval_SaveThread()
  br i1 %parallel, label %many, label %one
many:
  call void @GOMP_parallel(ptr %code, ptr %words, i32 %threads, i32 0)
  br label %done
one:
  call void %code(ptr %words)
  br label %done
done:
  call void @PyEval_RestoreThread(ptr %state)
  call void @Py_IncRef(ptr @_Py_NoneStruct)
  ret ptr @_Py_NoneStruct
}
"""


def _text(wide: bool) -> str:
    return TEXT


class _Definition(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p),
    ]  # fmt: skip


@cache
def openmp() -> tuple[int, ...] | None:
    """The addresses of torch's `OPENMP`, if it has that."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        return tuple(_address(getattr(library, name)) for name in OPENMP)
    except (OSError, AttributeError):
        return None


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


@cache
def caller() -> Call:
    """The function that calls kernels; with runs = 0 only where there is OpenMP."""
    symbols = {name: _address(getattr(ctypes.pythonapi, name)) for name in PYTHON}
    symbols |= zip(OPENMP, openmp() or (id(None),) * len(OPENMP), strict=True)
    with at_work:
        for name, address in {**symbols, "_Py_NoneStruct": id(None)}.items():
            llvm.add_symbol(name, address)
    definition = _Definition(b"kernel", made(_text), FASTCALL, None)
    _definitions.append(definition)
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.argtypes, new.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p), ctypes.py_object
    call: Call = new(ctypes.addressof(definition), None, None)
    return call


_definitions: list[_Definition] = []
"""What a function of Python's looks into as long as it lives."""
