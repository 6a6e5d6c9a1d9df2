"""What converting a model saves, measured on an example: bytes kept for backward, site by site and in all.

Guarantees that the model comes back as it was (modules, hooks, parameters, buffers, gradients, training flags, random
numbers), also where its forward fails, that a site where nothing is gained is left native unless forced, and that a
conversion by plan never keeps more than native. Must not know activations.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
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
    device. The model runs forward up to three times, under the autocast that it is in, and for training: a model of
    which no module is in training mode, as `from_pretrained` gives it, is put into it meanwhile. Nothing of it changes.
    InputError where nothing would be kept, as in a model whose every parameter is frozen.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"plan takes a torch.nn.Module, not {type(model).__name__}: give it the model itself")
    _refuse_lazy(model)
    leaves = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if not any(tensor.requires_grad for tensor in (*model.parameters(), *leaves)):
        raise InputError(
            "nothing is kept for backward: no parameter or input requires a gradient (model.requires_grad_(True)?)"
        )
    dry = convert(model, dry_run=True, force=True)
    native = measured(model, example_inputs)

    def kept(names: Collection[str]) -> Kept:
        if not names:
            return native
        with dry.for_now(names):
            return measured(model, example_inputs)

    able = {site.name: frozenset(site.names) for site in dry.sites if site.taken}
    forced = kept(able)
    chosen = _gaining(able, native, forced)
    planned = forced if chosen == able.keys() else kept(chosen)
    if planned.total > native.total:
        chosen, planned = frozenset(), native
    sites = tuple(_planned(site, chosen, able, native, forced) for site in dry.sites)
    return Plan(model, native.total, planned.total, forced.total, sites)


def _refuse_lazy(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"{name} has no size yet: run the model forward once, then plan")


def _gaining(able: Mapping[str, frozenset[str]], native: Kept, forced: Kept) -> frozenset[str]:
    """The sites whose conversion keeps less, alone, or together with those that keep the same input."""
    found: set[str] = set()
    for group in _groups(able, native):
        gaining = {name for name in group if forced.alone(able[name]) < native.alone(able[name])}
        every = frozenset().union(*(able[name] for name in group))
        # One input that several sites keep goes only if all of them let go of it.
        found |= group if forced.alone(every) - native.alone(every) < _gain(gaining, able, native, forced) else gaining
    return frozenset(found)


def _gain(sites: Collection[str], able: Mapping[str, frozenset[str]], native: Kept, forced: Kept) -> int:
    """Bytes kept more by converting these sites, each by itself: negative where that gains."""
    return sum(forced.alone(able[name]) - native.alone(able[name]) for name in sites)


def _groups(able: Mapping[str, frozenset[str]], native: Kept) -> list[set[str]]:
    """The sites, those together that keep a storage which nothing but such sites keeps."""
    owner = {name: site for site, names in able.items() for name in names}
    groups = {site: {site} for site in able}
    for storage in native.storages:
        if storage.keepers.keys() <= owner.keys():
            joined = set().union(*(groups[owner[name]] for name in storage.keepers))
            groups |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in groups.values()}.values())


def measured(model: nn.Module, example_inputs: Any) -> Kept:
    """What one forward of the model on the example keeps for backward; it leaves the model as it was.

    Tensors of the example do not count: who made them holds them anyway. A model that is all in evaluation mode is put
    into training mode for it.
    """
    but = tuple(leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor))
    with _undisturbed(model), torch.inference_mode(False), torch.enable_grad(), counting(model, but) as kept:
        called(model, example_inputs)
    return kept


def called(model: Callable[..., Any], example_inputs: Any) -> Any:
    """The model's output on an example as `plan` takes it."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def _planned(
    site: Site, chosen: Collection[str], able: Mapping[str, frozenset[str]], native: Kept, forced: Kept
) -> Planned:
    if not site.taken:
        return Planned(site, 0, 0, False, site.why)
    names = able[site.name]
    before, after = native.alone(names), forced.alone(names)
    if site.name in chosen:
        return Planned(site, before, after, True, "")
    gains = after < before
    why = "together the sites would keep more than natively" if gains else _reason(names, native, forced)
    return Planned(site, before, after, False, why)


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


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """For training, and puts back flags, buffers and random numbers, all of which a forward may change."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(b, b.detach().clone()) for _, held in buffers for b in held.values() if b is not None]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    numbers = random.getstate(), numpy and numpy.random.get_state()
    if not any(flag for _, flag in flags):
        model.train()
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            random.setstate(numbers[0])
            if numpy:
                numpy.random.set_state(numbers[1])
            for module, flag in flags:
                module.training = flag
            for module, held in buffers:
                module._buffers.clear()
                module._buffers.update(held)
            with torch.no_grad():
                for buffer, value in values:
                    # What has not changed is not touched: an earlier graph may keep it.
                    if not buffer.is_meta and not torch.equal(buffer, value):
                        buffer.copy_(value)
