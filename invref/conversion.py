"""Swap the activation modules of a model for ours, in place, and back.

Guarantees that a module swapped is the very same object afterwards, with its parameters, hooks, names, flags and state:
its class alone changes, to a subclass of what it was, and that `undo` gives it back; that each was tried before
(`invref.recognize`); and that what is left native is named with the reason. Must not know how modules are recognised.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from invref.errors import InputError
from invref.recognize import ALREADY, TRANSFORMERS, Recognised, is_ours, recognised

FUNCTIONS = frozenset({
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish",
    "prelu", "relu6", "selu", "silu", "softplus", "softshrink", "softsign", "tanhshrink", "threshold",
})  # fmt: skip
"""torch's functions that `invref.inverted` catches."""
REMEDY = "run the model inside `with invref.inverted():`"


@dataclass(frozen=True)
class Swap:
    """A module by the first of its names, its class before, and its class after."""

    name: str
    module: nn.Module
    own: type[nn.Module]
    made: type[nn.Module]


@dataclass(frozen=True)
class Site:
    """One module, or one function that a module holds, and what became of it.

    name: of the first place where it is, as `named_modules` has it; names: of all places; what: its type; formula: what
    it computes; bits: kept per element beside the output, None where nothing was taken; taken: whether this conversion
    swaps it, or would if it were no dry run; why: why not, where it is not taken, with the remedy if there is one.
    """

    name: str
    names: tuple[str, ...]
    what: str
    formula: str
    bits: int | None
    taken: bool
    why: str


class Conversion:
    """What `convert` did: prints as a table, and undoes itself.

    sites: all that was found, in the order of `named_modules`. Undoing twice does no harm.
    """

    def __init__(self, sites: tuple[Site, ...], swaps: list[Swap], dry_run: bool) -> None:
        self.sites = sites
        self._swaps = swaps
        self._done = not dry_run
        self._state = "would run" if dry_run else "run"

    def undo(self) -> None:
        """Gives every module its class back; whatever else has changed since stays, as trained parameters do.

        InputError, with nothing undone, where a module's class was changed by others meanwhile.
        """
        if not self._done:
            return
        for swap in self._swaps:
            if type(swap.module) not in (swap.own, swap.made):
                now = type(swap.module).__name__
                raise InputError(f"cannot undo: a {swap.own.__name__} has become a {now} since: undo that first")
        for swap in self._swaps:
            swap.module.__class__ = swap.own
        if self._swaps:
            self._state, self._swaps = "ran, until undone,", []

    @contextmanager
    def for_now(self, names: Collection[str]) -> Iterator[None]:
        """Of a dry run: a context in which the modules of these names are swapped, without another trial."""
        chosen = [swap for swap in self._swaps if swap.name in names]
        _swap(chosen)
        try:
            yield
        finally:
            for swap in chosen:
                swap.module.__class__ = swap.own

    def __str__(self) -> str:
        if not self.sites:
            return "no activations that invref knows"
        rows = [("where", "what", "formula", "bits", "")]
        for site in self.sites:
            where = (site.name or "(model)") + (f" and {len(site.names) - 1} more" if len(site.names) > 1 else "")
            bits = "" if site.bits is None else str(site.bits)
            rows.append((where, site.what, site.formula, bits, _became(site)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
        count = sum(site.taken or site.why == ALREADY for site in self.sites)
        total = f"{count} of {len(self.sites)} {self._state} backward from their output"
        return "\n".join([*(line.rstrip() for line in lines), total])

    __repr__ = __str__


def _became(site: Site) -> str:
    if site.taken:
        return "inverted"
    return site.why if site.why == ALREADY else f"native: {site.why}"


def convert(
    model: nn.Module,
    *,
    activations: bool = True,
    dry_run: bool = False,
    only: Iterable[str] | None = None,
    subclasses: bool = False,
    force: bool = False,
) -> Conversion:
    """Swaps every activation module of `model` that invref knows by its type and its numbers, in place.

    activations: False swaps nothing; dry_run: find out and change nothing; only: names of modules, as in
    `named_modules`, to which it is confined, with all that is inside them; subclasses: try subclasses of known types,
    too; force: swap also before a dropout, where nothing is gained. `print` the result for what became of each module;
    `invref.plan` measures what it saves.

    Before or after wrapping in DistributedDataParallel, `fully_shard` or PEFT alike. InputError for a model that
    torch.compile has already, and for names that the model has not.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"convert takes a torch.nn.Module, not {type(model).__name__}: give it the model itself")
    found = list(_places(model))
    _refuse_compiled(found)
    wanted = None if only is None else _wanted(found, only)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dropped = set() if force else {id(module) for module in _before_dropout(model)}
    sites: list[Site] = []
    swaps: list[Swap] = []
    for module, names in found:
        sites += _functions(module, names[0])
        seen = recognised(module, subclasses, dtype) if activations else None
        if seen is None:
            continue
        reason = _reason(seen, module, wanted, dropped)
        bits, taken = (None, False) if reason else (seen.bits, True)
        sites.append(Site(names[0], names, type(module).__name__, seen.formula, bits, taken, reason))
        if seen.type is not None and taken:
            swaps.append(Swap(names[0], module, type(module), seen.type))
    done = Conversion(tuple(sites), swaps, dry_run)
    if not dry_run:
        _swap(swaps)
    return done


def _swap(swaps: list[Swap]) -> None:
    """All or nothing: a class whose instances are laid out otherwise, as by __slots__, cannot be taken."""
    for at, swap in enumerate(swaps):
        try:
            swap.module.__class__ = swap.made
        except TypeError as error:
            for earlier in swaps[:at]:
                earlier.module.__class__ = earlier.own
            raise InputError(f"cannot swap a {swap.own.__name__}: {error}: leave it out by only=[...]") from error


def _reason(seen: Recognised, module: nn.Module, wanted: set[int] | None, dropped: set[int]) -> str:
    if seen.why or seen.type is None:
        return seen.why
    if wanted is not None and id(module) not in wanted:
        return "not among those asked for"
    if id(module) in dropped:
        return "a dropout follows, after which nothing keeps the output: force=True swaps it all the same"
    return ""


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every module once, with all names under which it is found, in the order of `named_modules`."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    inside: set[int] = set()

    def enter(module: nn.Module, name: str) -> None:
        # A module that holds one of those that it is in has no end of names.
        if id(module) in inside:
            return
        found.setdefault(id(module), (module, []))[1].append(name)
        inside.add(id(module))
        for own, child in module._modules.items():
            if child is not None:
                enter(child, f"{name}.{own}" if name else own)
        inside.remove(id(module))

    enter(model, "")
    return ((module, tuple(names)) for module, names in found.values())


def _wanted(found: list[tuple[nn.Module, tuple[str, ...]]], only: Iterable[str]) -> set[int]:
    """Ids of the modules of these names, and of all that is inside them."""
    if isinstance(only, str):
        raise InputError(f"only takes several names, not a text: use only=[{only!r}]")
    modules = {name: module for module, names in found for name in names}
    asked = list(only)
    if missing := sorted(set(asked) - modules.keys()):
        raise InputError(f"the model has no module {missing[0]!r}: names are those of model.named_modules()")
    return {id(inner) for name in asked for inner in modules[name].modules()}


def _refuse_compiled(found: list[tuple[nn.Module, tuple[str, ...]]]) -> None:
    for module, names in found:
        where = f"the module {names[0]!r}" if names[0] else "the model"
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(f"too late: {where} is compiled already: convert before torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"too late: {where} is a script already: convert before torch.jit")


def _before_dropout(model: nn.Module) -> Iterator[nn.Module]:
    """What has a dropout right after it in a Sequential, whatever Sequentials these two are nested in."""
    for module in model.modules():
        if type(module) is nn.Sequential:
            steps = list(_steps(module))
            for one, following in pairwise(steps):
                if isinstance(following, nn.modules.dropout._DropoutNd):
                    yield one


def _steps(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a Sequential calls one after the other, those that do nothing left out."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _steps(child)
    elif not (type(module) is nn.Identity or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0)):
        yield module


def _functions(module: nn.Module, name: str) -> Iterator[Site]:
    """The activation functions that a module holds instead of modules: its type may call them."""
    if type(module).__module__ in (TRANSFORMERS, nn.GELU.__module__) or is_ours(module):
        return  # The function of an activation module, which is a site of its own.
    for attribute, value in vars(module).items():
        function = value.func if isinstance(value, partial) else value
        if not isinstance(function, types.FunctionType | types.BuiltinFunctionType):
            continue
        called = function.__name__
        if called in FUNCTIONS and getattr(nn.functional, called, None) is function:
            place = f"{name}.{attribute}" if name else attribute
            yield Site(place, (place,), "function", called, None, False, f"a function, not a module: {REMEDY}")
