"""What is verified: the catalogue's layers, each with its formula and the framework's own layer beside it.

Guarantees that a target is found by name or that the error lists the names. Must not know how anything is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from invref.catalogue import ROWS, Row
from invref.errors import InputError
from invref.formulas import Formula
from invref.kernels.scheme import Scheme

Layer = Callable[[Tensor], Tensor]

Role = Literal["row", "formula", "foreign", "native"]
"""A layer of the catalogue; one made from a formula; anyone's, whose sources are unknown; the framework's, measured."""

OWN = "torch's own"
"""The kind of a scheme that hands the gradient to the framework, which keeps the output already."""


@dataclass(frozen=True)
class Target:
    """A layer to verify: elementwise, differentiable, and meant to compute `formula`.

    `native` is the framework's own layer, whose forward a row must repeat bit for bit; `label` says what `layer` is and
    `forward` which kernel computes y, since the error floor belongs to that kernel. `codes` are the side codes of the
    pieces of f, from the left, where the layer keeps its output and those; None where it may keep what it likes. With
    `gradient`, a formula whose values the gradient is meant to have, it need not be f'; with `known` false nothing is
    known of the forward. `by_formula` says that a foreign layer is held to the values of a formula, rounded once, since
    `native` then is that formula evaluated step by step and proves nothing. `options` are the words of the command line
    that choose this target, and `device` is the kind of device that it runs on.
    """

    name: str
    formula: Formula
    layer: Layer
    native: Layer
    label: str
    forward: str
    role: Role = "row"
    codes: tuple[int, ...] | None = None
    scheme: Callable[[torch.dtype], Scheme] | None = None
    gain: str = ""
    gradient: Formula | None = None
    known: bool = True
    by_formula: bool = False
    options: str = ""
    device: str = "cpu"

    @property
    def foreign(self) -> bool:
        """Whether `layer` was not written here: it may keep what it likes for backward."""
        return self.role == "foreign"

    def decoder(self, dtype: torch.dtype) -> str:
        """What gives the gradient, in two or three words."""
        return self.scheme(dtype).kind if self.scheme else self.role

    def bits(self, dtype: torch.dtype) -> int:
        """Side bits per element."""
        if self.scheme:
            return self.scheme(dtype).bits
        return (max(self.codes, default=0)).bit_length() if self.codes else 0

    def own(self, dtype: torch.dtype) -> bool:
        """Whether the gradient is the framework's, so that there is no decoder to hold to a floor."""
        return self.decoder(dtype) == OWN

    def held(self, dtype: torch.dtype) -> bool:
        """Whether the layer is held to the error floor of the pair (y, side code)."""
        return self.codes is not None and self.role != "native" and not self.own(dtype)


def of_row(row: Row) -> Target:
    """A row of the catalogue as a target."""
    forward = f"{row.origin} {torch.__version__} {row.call}, CPU {torch.backends.cpu.get_cpu_capability()}"
    return Target(
        row.name,
        row.formula,
        row.layer,
        row.native,
        f"invref.functional.{row.call}",
        forward,
        codes=row.codes,
        scheme=row.scheme,
        gain=row.gain,
        options=row.name,
    )


class _Targets(Mapping[str, Target]):
    """The catalogue's rows as targets, made when asked for: a table of names must not load decoders."""

    def __init__(self) -> None:
        self._made: dict[str, Target] = {}

    def __getitem__(self, name: str) -> Target:
        if name not in self._made:
            self._made[name] = of_row(ROWS[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ROWS)

    def __len__(self) -> int:
        return len(ROWS)


TARGETS: Mapping[str, Target] = _Targets()


def resolve(names: Iterable[str]) -> list[Target]:
    """The targets with these names, in order; an unknown name raises InputError that lists the names there are."""
    try:
        return [TARGETS[name] for name in names]
    except KeyError as error:
        raise InputError(f"unknown activation {error.args[0]!r}: use one of {', '.join(TARGETS)}") from None


def torch_itself(name: str) -> Target:
    """The framework's own layer in place of ours, held to what ours is: the baseline."""
    (target,) = resolve([name])
    row = ROWS[name]
    label = f"torch.nn.functional.{row.call}" if row.origin == "torch" else f"{row.origin} {row.call}"
    return replace(target, layer=target.native, label=label, scheme=None)


def native_of(name: str) -> Target:
    """The framework's own layer to be measured: its errors are told, and held to nothing."""
    return replace(torch_itself(name), role="native", codes=None, gain="", options=f"{name} --native")
