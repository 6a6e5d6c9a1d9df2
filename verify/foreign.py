"""Layers that no one here wrote, and layers made from a formula, as targets.

A foreign target is `module:callable`: a function of a tensor, or a torch.nn.Module (class or instance), meant to
compute an activation of the catalogue, a formula, or (with a gradient formula of its own, as surrogate gradients
and straight-through estimators have) anything. An attribute `invref_codes`, a tuple with the side code of each piece of
the formula from the left, states that backward uses the output and that code alone: then it is held to the error floor.
Guarantees that what cannot be loaded is an InputError. Must not know how anything is checked.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invref import formulas
from invref.engines import TORCH
from invref.errors import InputError
from invref.formulas import Formula
from verify.targets import Layer, Target, resolve

CODES = "invref_codes"


def load(path: str) -> tuple[Layer, tuple[int, ...] | None]:
    """The layer at "module:callable", and the side codes that it states."""
    module, _, attribute = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # As `python -m` does it: the installed command finds modules of the folder it is run in, too.
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = reduce(getattr, attribute.split("."), importlib.import_module(module))
        layer = found() if isinstance(found, type) else found
        codes = getattr(layer, CODES, None)
        stated = None if codes is None else tuple(int(code) for code in codes)
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot load target {path!r} ({error}): write it as module:callable") from error
    if not callable(layer):
        raise InputError(f"the target {path!r} cannot be called: name a function or a torch.nn.Module")
    return _checked(_for_every_dtype(layer) if isinstance(layer, torch.nn.Module) else layer), stated


def external(path: str, *, name: str | None = None, formula: str | None = None, gradient: str | None = None) -> Target:
    """Anyone's implementation of the activation `name`, or of the text `formula`, with the gradient `gradient`."""
    layer, codes = load(path)
    words = [*([name] if name else []), f"--target {shlex.quote(path)}"]
    words += [f"--formula {shlex.quote(formula)}"] if formula else []
    words += [f"--gradient-formula {shlex.quote(gradient)}"] if gradient else []
    shared: dict[str, Any] = {"layer": layer, "label": path, "role": "foreign", "scheme": None, "gain": ""}
    meant = surrogate(gradient) if gradient else None
    if name:
        (row,) = resolve([name])
        target = replace(row, **shared, codes=codes, options=" ".join(words))
    elif formula or meant:
        read = surrogate if meant else formulas.define
        known = read(formula) if formula else None
        truth = known or meant
        assert truth is not None
        target = Target(
            _identifier(path), truth, native=plain(known, meant), forward=path, codes=codes, options=" ".join(words),
            known=known is not None, by_formula=True, **shared,
        )  # fmt: skip
    else:
        raise InputError(f"--target {path} needs what it computes: name an activation, or give --formula TEXT")
    if meant:
        native = plain(known_forward(target), meant)
        return replace(target, gradient=meant, codes=None, native=native, by_formula=True)
    return target


def known_forward(target: Target) -> Formula | None:
    """The formula of the forward where there is one."""
    return target.formula if target.known else None


def surrogate(text: str) -> Formula:
    """A formula whose values are what counts: steps and constants are allowed, as in straight-through estimators."""
    formula = Formula(text, text)
    return formula if all(branch.constant for branch in formula.branches) else formulas.define(text)


def from_text(text: str) -> Target:
    """Our own layer for any formula."""
    from invref.custom import from_formula  # loads the fitting code, which a run by name does without

    activation = from_formula(text)
    forward = f"float64 evaluation, rounded once; torch {torch.__version__}"
    return Target(
        f"{_identifier(text)}_{hashlib.sha256(activation.formula.text.encode()).hexdigest()[:6]}",
        activation.formula,
        activation,
        activation.native,
        "invref.from_formula",
        forward,
        role="formula",
        codes=activation.codes,
        scheme=activation.scheme,
        options=f"--formula {shlex.quote(text)}",
    )


def plain(formula: Formula | None, gradient: Formula | None = None) -> Layer:
    """The formula as anybody would write it, step by step in the tensor's own dtype: told beside a foreign target."""
    if gradient is None:
        assert formula is not None
        known = formula
        return lambda x: known.evaluate(x, TORCH).to(x.dtype)

    def layer(x: Tensor) -> Tensor:
        y: Tensor = _Surrogate.apply(x, formula, gradient)  # type: ignore[no-untyped-call]
        return y

    return layer


class _Surrogate(torch.autograd.Function):
    """A forward by one formula, a gradient by another; the identity where no forward is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, formula: Formula | None, gradient: Formula) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return _filled(formula.evaluate(x, TORCH), x) if formula else x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return dy * _filled(ctx.gradient.evaluate(x, TORCH), x), None, None


def _filled(value: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(value).to(x.dtype).expand_as(x).clone()


def _for_every_dtype(module: torch.nn.Module) -> Layer:
    """The module with a copy for each dtype that it meets, so that parameters match."""
    copies: dict[torch.dtype, torch.nn.Module] = {}

    def layer(x: Tensor) -> Tensor:
        if x.dtype not in copies:
            copies[x.dtype] = copy.deepcopy(module).to(x.dtype)
        y: Tensor = copies[x.dtype](x)
        return y

    return layer


def _checked(layer: Callable[[Tensor], Any]) -> Layer:
    """The layer with an error where its output is no tensor like its input."""

    def checked(x: Tensor) -> Tensor:
        y = layer(x)
        if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype):
            raise InputError("the target must return a tensor of its input's shape and dtype: wrap it in a function")
        return y

    return checked


def _identifier(text: str) -> str:
    """A short name that may stand in a file's name."""
    return re.sub(r"\W+", "_", text).strip("_")[:40] or "formula"
