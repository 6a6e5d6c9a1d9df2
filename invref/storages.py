"""What a model keeps for backward, counted in unique storages and not in tensors: a view keeps all of its storage.

Guarantees that each storage counts once, with all of its bytes, whatever keeps it how often, that storages of
parameters and buffers are left out, and that counting changes neither the model nor what it computes. Must not know
activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

OUTSIDE = ""
"""The name of the model itself, and of what is kept outside of any module."""


@dataclass
class Storage:
    """One storage kept for backward: its bytes, and which modules, by name, keep it how often."""

    bytes: int
    keepers: dict[str, int] = field(default_factory=dict)


@dataclass
class Kept:
    """What was kept while `counting`.

    storages: by a number of their own, in the order in which they were first kept.
    """

    storages: list[Storage] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes of all storages kept."""
        return sum(storage.bytes for storage in self.storages)

    def of(self, name: str) -> list[Storage]:
        """The storages that a module, by its name, keeps, those of its submodules not among them."""
        return [storage for storage in self.storages if name in storage.keepers]

    def alone(self, names: frozenset[str]) -> int:
        """Bytes of the storages that nothing but the modules of these names keeps."""
        return sum(storage.bytes for storage in self.storages if storage.keepers.keys() <= names)


@contextmanager
def counting(model: nn.Module | None = None, but: tuple[Tensor, ...] = ()) -> Iterator[Kept]:
    """Counts what operations inside keep for backward; the result is complete at the end.

    A tensor kept is noted for the innermost module of `model` whose forward is running, by its name in
    `named_modules`. Parameters and buffers of the model, and the tensors `but`, do not count. What an inner context of
    `torch.autograd.graph.saved_tensors_hooks` takes is not seen; activation checkpointing takes what it computes again.
    """
    kept = Kept()
    left_out = {at for tensor in (*_owned(model), *but) for at, _ in parts(tensor)}
    names: Mapping[int, str] = {id(module): name for name, module in model.named_modules()} if model else {}
    # Holding the storages keeps their addresses from being given to others.
    known: dict[int, tuple[Storage, Any]] = {}
    running: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        for at, storage in parts(tensor):
            if at in left_out or not storage.nbytes():
                continue
            if at not in known:
                known[at] = Storage(storage.nbytes()), storage
                kept.storages.append(known[at][0])
            keepers = known[at][0].keepers
            name = running[-1] if running else OUTSIDE
            keepers[name] = keepers.get(name, 0) + 1
        # Not itself: an operation that keeps its output would keep itself alive by it.
        return tensor.detach()

    def enter(module: nn.Module, _inputs: Any) -> None:
        if id(module) in names:
            running.append(names[id(module)])

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if id(module) in names and running:
            running.pop()

    handles = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ) if model else ()  # fmt: skip
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()


def parts(tensor: Tensor) -> list[tuple[int, torch.UntypedStorage]]:
    """The storages behind a tensor, each with its address: more than one where a subclass wraps several tensors."""
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        # A DTensor names its mesh among its parts.
        return [part for piece in inner if isinstance(piece, Tensor) for part in parts(piece)]
    if tensor.layout != torch.strided or tensor.is_nested:
        pieces = [tensor.values()] if tensor.is_nested else _sparse(tensor)
        return [part for piece in pieces for part in parts(piece)]
    storage = tensor.untyped_storage()
    return [(storage._cdata, storage)]


def _sparse(tensor: Tensor) -> list[Tensor]:
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor.values()]


def _owned(model: nn.Module | None) -> list[Tensor]:
    return [] if model is None else [*model.parameters(), *model.buffers()]
