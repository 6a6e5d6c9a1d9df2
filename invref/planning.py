"""What converting a model saves, measured on an example: bytes kept for backward, site by site and in all.

Guarantees that the model comes back as it was (modules, hooks, parameters, buffers, gradients, random numbers), that a
site where nothing is gained is left native unless forced, and that a conversion by plan never keeps more than native.
Must not know activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from invref.conversion import Conversion, Site, convert
from invref.errors import InputError
from invref.storages import Kept, counting

MIB = 1 << 20


@dataclass(frozen=True)
class Planned:
    """One site: what it keeps natively that nothing else keeps, what it would keep converted, and the decision.

    before, after: bytes. Both can be 0 where others keep everything it keeps.
    """

    site: Site
    before: int
    after: int
    taken: bool
    why: str

    @property
    def saved(self) -> int:
        """Bytes that the site's own conversion saves; negative where it costs."""
        return self.before - self.after


@dataclass(frozen=True)
class Plan:
    """What to convert and what that saves; `convert` does it.

    native, planned, forced: bytes kept for backward of the example as it is, with the sites taken converted, and with
    all that can be; sites: all that `invref.convert` names, in the model's order.
    """

    model: nn.Module
    native: int
    planned: int
    forced: int
    sites: tuple[Planned, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The modules to convert, by name."""
        return tuple(planned.site.name for planned in self.sites if planned.taken)

    def convert(self, force: bool = False) -> Conversion:
        """Converts the sites taken, or with `force` all that can be, in place."""
        if force:
            return convert(self.model, force=True)
        return convert(self.model, only=self.names, force=True)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "native": self.native,
            "planned": self.planned,
            "forced": self.forced,
            "sites": [
                {
                    "name": p.site.name, "what": p.site.what, "formula": p.site.formula, "bits": p.site.bits,
                    "before": p.before, "after": p.after, "taken": p.taken, "why": p.why,
                }
                for p in self.sites
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        rows = [("where", "what", "bits", "native MiB", "inverted MiB", "")]
        for p in self.sites:
            sizes = (_mib(p.before), _mib(p.after)) if p.site.taken else ("", "")
            bits = "" if p.site.bits is None else str(p.site.bits)
            rows.append((p.site.name or "(model)", p.site.what, bits, *sizes, "taken" if p.taken else p.why))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
        change = f" ({self.planned / self.native - 1:+.1%})" if self.native else ""
        total = f"kept for backward: {_mib(self.native)} MiB native, {_mib(self.planned)} MiB as planned{change}"
        return "\n".join([*(line.rstrip() for line in lines), total])


def plan(model: nn.Module, example_inputs: Any) -> Plan:
    """Measures what converting `model` saves on an example, and decides site by site.

    example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments, on the model's
    device. The model runs forward a few times as it is, in the mode and under the autocast that it is in; nothing of it
    changes. InputError where nothing would be kept, as in a model whose every parameter is frozen.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"plan takes a torch.nn.Module, not {type(model).__name__}")
    native = measured(model, example_inputs)
    if not native.total:
        raise InputError(
            "nothing is kept for backward: no parameter or input requires a gradient (model.requires_grad_(True)?)"
        )
    dry = convert(model, dry_run=True, force=True)
    able = [site.name for site in dry.sites if site.taken]
    forced = _converted(model, example_inputs, able)
    planned = [_decided(site, native, forced) for site in dry.sites]
    chosen, least = _best(model, example_inputs, planned, native, forced)
    sites = tuple(
        p if not p.taken or p.site.name in chosen
        else replace(p, taken=False, why="together the sites would keep more than natively")
        for p in planned
    )  # fmt: skip
    return Plan(model, native.total, least, forced.total, sites)


def measured(model: nn.Module, example_inputs: Any) -> Kept:
    """What one forward of the model on the example keeps for backward; it leaves the model as it was.

    Tensors of the example do not count: who made them holds them anyway.
    """
    but = tuple(leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor))
    with _undisturbed(model), torch.enable_grad(), counting(model, but) as kept:
        called(model, example_inputs)
    return kept


def called(model: Callable[..., Any], example_inputs: Any) -> Any:
    """The model's output on an example as `plan` takes it."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def _converted(model: nn.Module, example_inputs: Any, names: Iterable[str]) -> Kept:
    done = convert(model, only=tuple(names), force=True)
    try:
        return measured(model, example_inputs)
    finally:
        done.undo()


def _decided(site: Site, native: Kept, forced: Kept) -> Planned:
    if not site.taken:
        return Planned(site, 0, 0, False, site.why)
    names = frozenset(site.names)
    before, after = native.alone(names), forced.alone(names)
    taken = after < before
    return Planned(site, before, after, taken, "" if taken else _reason(names, native, forced))


def _reason(names: frozenset[str], native: Kept, forced: Kept) -> str:
    """Why converting the modules of these names, which are one module, gains nothing."""
    ours = [storage for name in names for storage in native.of(name)]
    if not ours:
        return "keeps nothing: it did not run, or nothing before it requires a gradient"
    others = sorted({keeper for storage in ours for keeper in storage.keepers if keeper not in names})
    if others:
        return f"its input stays: {_named(others)} keeps it too, or another part of its storage"
    if any(storage.keepers.keys() <= names for name in names for storage in forced.of(name) if storage.bytes > 1):
        return "nothing else keeps its output: a dropout follows, or a layer whose weight is frozen"
    return "nothing is gained"


def _mib(count: int) -> str:
    return f"{count / MIB:.2f}"


def _named(names: list[str]) -> str:
    first = names[0] or "the model itself"
    return first if len(names) == 1 else f"{first} (and {len(names) - 1} more)"


def _best(
    model: nn.Module, example_inputs: Any, planned: list[Planned], native: Kept, forced: Kept
) -> tuple[frozenset[str], int]:
    """The names of the sites to take, and bytes kept then: those decided, if that keeps no more than native."""
    taken = frozenset(p.site.name for p in planned if p.taken)
    if not taken:
        return taken, native.total
    able = frozenset(p.site.name for p in planned if p.site.taken)
    total = forced.total if taken == able else _converted(model, example_inputs, taken).total
    return (taken, total) if total <= native.total else (frozenset(), native.total)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back buffers and random numbers, which a forward may change."""
    before: list[tuple[Tensor, Tensor]] = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
