"""What is verified: the table of our layers, each with its formula and the framework's own layer beside it.

Guarantees that a target is found by name or that the error lists the names. Must not know how anything is checked.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as native

from invref import formulas
from invref.errors import InputError
from invref.formulas import Formula

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A layer to verify: elementwise, differentiable, and meant to compute `formula`.

    `native` is the framework's own layer, whose forward `layer` must repeat bit for bit; `label` says what `layer` is
    and `forward` which kernel computes y, since the error floor belongs to that kernel.
    """

    name: str
    formula: Formula
    layer: Layer
    native: Layer
    label: str
    forward: str
    foreign: bool = False
    """Whether `layer` was not written here: its sources are unknown, and it may keep what it likes for backward."""


def _ours(function: str, **arguments: str) -> Layer:
    def layer(x: Tensor) -> Tensor:
        # Imported at the first call: the table of names must not load the kernels.
        y: Tensor = getattr(importlib.import_module("invref.functional"), function)(x, **arguments)
        return y

    return layer


def _gelu_tanh(x: Tensor) -> Tensor:
    return native.gelu(x, approximate="tanh")


def _row(name: str, layer: Layer, native_layer: Layer, call: str) -> Target:
    forward = f"torch {torch.__version__} {call}, CPU {torch.backends.cpu.get_cpu_capability()}"
    return Target(name, formulas.get(name), layer, native_layer, f"invref.functional.{call}", forward)


TARGETS = {
    target.name: target
    for target in (
        _row("gelu", _ours("gelu"), native.gelu, "gelu"),
        _row("gelu_tanh", _ours("gelu", approximate="tanh"), _gelu_tanh, 'gelu(approximate="tanh")'),
        _row("silu", _ours("silu"), native.silu, "silu"),
    )
}


def resolve(names: Iterable[str]) -> list[Target]:
    """The targets with these names, in order; an unknown name raises InputError that lists the names there are."""
    try:
        return [TARGETS[name] for name in names]
    except KeyError as error:
        raise InputError(f"unknown activation {error.args[0]!r}: use one of {', '.join(TARGETS)}") from None


def external(name: str, path: str) -> Target:
    """Anyone's implementation, `path` = "module:callable", held to the formula and the forward of the target `name`."""
    (target,) = resolve([name])
    module, _, attribute = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # As `python -m` does it: the installed command finds modules of the folder it is run in, too.
        sys.path.insert(0, str(Path.cwd()))
    try:
        layer = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot load target {path!r} ({error}): write it as module:callable") from error
    return replace(target, layer=layer, label=path, foreign=True)


def torch_itself(name: str) -> Target:
    """The framework's own layer as the target: what the verifier says of it is the baseline of ours."""
    (target,) = resolve([name])
    return replace(target, layer=target.native, label=target.label.replace("invref.", "torch.nn.", 1))
