"""Machine code called from Python with numbers: in a tenth of a microsecond, where ctypes takes one.

The function that does it is machine code itself, one for all kernels: it writes its arguments one after another into
memory and calls a kernel with their address, without the interpreter lock. Must not know what kernels do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import llvmlite.binding as llvm

from invref.kernels.machine import made

Call = Callable[..., None]
"""(address of a kernel, its arguments: 64-bit integers) -> None."""

FASTCALL = 0x80
"""METH_FASTCALL of Python's C interface: arguments come as an array of objects and its length."""

TEXT = """
declare i64 @PyLong_AsLongLong(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_IncRef(ptr)
@_Py_NoneStruct = external global i8

define ptr @kernel(ptr %self, ptr %objects, i64 %count) {
begin:
  %others = sub i64 %count, 1
  %words = alloca i64, i64 %others
  %first = load ptr, ptr %objects
  %address = call i64 @PyLong_AsLongLong(ptr %first)
  %code = inttoptr i64 %address to ptr
  br label %head
head:
  %i = phi i64 [ 0, %begin ], [ %next, %body ]
  %more = icmp ult i64 %i, %others
  br i1 %more, label %body, label %end
body:
  %next = add i64 %i, 1
  %from = getelementptr ptr, ptr %objects, i64 %next
  %object = load ptr, ptr %from
  %word = call i64 @PyLong_AsLongLong(ptr %object)
  %to = getelementptr i64, ptr %words, i64 %i
  store i64 %word, ptr %to
  br label %head
end:
  %state = call ptr @PyEval_SaveThread()
  call void %code(ptr %words)
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
def caller() -> Call:
    """The function that calls kernels."""
    for name in ("PyLong_AsLongLong", "PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef"):
        llvm.add_symbol(name, ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value)
    llvm.add_symbol("_Py_NoneStruct", id(None))
    definition = _Definition(b"kernel", made(_text), FASTCALL, None)
    _definitions.append(definition)
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.argtypes, new.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p), ctypes.py_object
    call: Call = new(ctypes.addressof(definition), None, None)
    return call


_definitions: list[_Definition] = []
"""What a function of Python's looks into as long as it lives."""
