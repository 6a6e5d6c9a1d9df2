"""What a layer keeps for backward and how the gradient comes back from it: the contract, and its general forms.

Guarantees that whatever a scheme keeps is flat and packed, that long tensors on the CPU are worked on in cache-sized
chunks, and that gradients are computed in float32 at least and rounded once. Must not know autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from invref.kernels import dispatch, sidebits
from invref.kernels.codes import CodeOf as CodeOf
from invref.kernels.dispatch import Decode

MOST_BITS = 4

Gradient = Callable[[Tensor, Tensor | None], Tensor]
"""(outputs (n,), side codes uint8 (n,) or None) -> the derivative (n,): float64 for float64 outputs, else float32."""


class Plain:
    """`pack` and `backward` of a scheme for contiguous tensors of any shape on the CPU, without further questions.

    Neither lazily negated, nor without memory, nor of a class of their own, of one shape and dtype, with the side codes
    that belong to them, `bits` an element. The output is kept; the incoming gradient may have any strides.
    """

    def __init__(
        self, dtype: torch.dtype, bits: int, pack: Callable[[Tensor], Tensor], make: Callable[[], Decode]
    ) -> None:
        """make: gives `decode` when that is first called."""
        self.dtype, self.bits, self.pack, self._make = dtype, bits, pack, make
        self.decode: Decode = self._first

    def _first(self, dy: Tensor, y: Tensor, packed: Tensor | None) -> Tensor:
        self.decode = self._make()
        return self.decode(dy, y, packed)


class Scheme(Protocol):
    """How one call of a layer stores what backward needs."""

    @property
    def bits(self) -> int:
        """Side bits per element, 0 to 4."""

    @property
    def keeps_output(self) -> bool:
        """Whether the output is kept; if not, the side bits alone give the gradient."""

    @property
    def kind(self) -> str:
        """The decoder in two or three words, as reports print it."""

    def pack(self, x: Tensor) -> Tensor | None:
        """The packed side codes of the inputs x in row-major order, any shape and strides; None without side bits."""

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """The gradient (n,) in the dtype of dy, from dy, the outputs (n,) if kept, and the bytes of `pack`.

        dy is read in row-major order, and may have any shape and strides.
        """


@dataclass(frozen=True)
class Tabled:
    """A derivative looked up: 16-bit outputs and their side codes have one entry each, calibrated on the forward.

    table: float32 (2**bits, 65536) for a device.
    """

    kind: str
    table: Callable[[torch.device], Tensor]
    bits: int = 0
    code_of: CodeOf | None = None
    keeps_output: bool = field(default=True, init=False)

    def pack(self, x: Tensor) -> Tensor | None:
        """The side codes of x, packed plane by plane."""
        return packed(self.code_of, self.bits, x)

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy times the entry, rounded once."""
        assert y is not None
        return dispatch.by_table(self.table(y.device), dy, y, packed, self.bits)


@dataclass(frozen=True)
class Coded:
    """Any derivative that plain tensor operations find from the output and a side code.

    dead: where it is 0, not even an infinite dy gets through.
    """

    kind: str
    gradient: Gradient
    bits: int = 0
    code_of: CodeOf | None = None
    dead: bool = False
    keeps_output: bool = field(default=True, init=False)

    def pack(self, x: Tensor) -> Tensor | None:
        """The side codes of x, packed plane by plane."""
        return packed(self.code_of, self.bits, x)

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy times the gradient, rounded once."""
        assert y is not None
        dy = dy.reshape(-1)
        dx = torch.empty_like(dy)
        for part, codes in parts(dy.numel(), packed, self.bits, dy.device):
            g = self.gradient(y[part], codes)
            wide = dy[part].to(g.dtype)
            dx[part] = (_kept_dead(wide, g) if self.dead else wide * g).to(dy.dtype)
        return dx


def _kept_dead(dy: Tensor, g: Tensor) -> Tensor:
    """dy * g, and 0 where g is 0 whatever dy is, as torch masks the gradient of what it has cut off."""
    return torch.where(g == 0, 0.0, dy * g)


@dataclass(frozen=True)
class BitsOnly:
    """A derivative that takes one of few values, told by the side code alone: the output is not kept."""

    values: tuple[float, ...]
    code_of: CodeOf
    bits: int = 1
    keeps_output: bool = field(default=False, init=False)
    kind: str = field(default="bits only", init=False)

    def pack(self, x: Tensor) -> Tensor | None:
        """The side codes of x, packed plane by plane."""
        return packed(self.code_of, self.bits, x)

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy times the value that the code stands for, rounded once."""
        dy = dy.reshape(-1)
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        values = torch.tensor(self.values, dtype=wide, device=dy.device)
        dx = torch.empty_like(dy)
        for part, codes in parts(dy.numel(), packed, self.bits, dy.device):
            assert codes is not None
            dx[part] = _kept_dead(dy[part].to(wide), values.index_select(0, codes.int())).to(dy.dtype)
        return dx


def packed(code_of: CodeOf | None, bits: int, x: Tensor) -> Tensor | None:
    """The packed side codes of inputs in row-major order; None where there are none."""
    if code_of is None or bits == 0:
        return None
    x = x.reshape(-1)
    planes = [sidebits.pack(code_of(x[part]), bits).view(bits, -1) for part, _ in parts(x.numel(), None, 0, x.device)]
    return planes[0].view(-1) if len(planes) == 1 else torch.cat(planes, 1).view(-1)


def parts(n: int, packed: Tensor | None, bits: int, device: torch.device) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices that cover n elements, cache-sized on the CPU, each with its unpacked side codes."""
    step = dispatch.CHUNK if device.type == "cpu" else max(n, 1)
    planes = None if packed is None else packed.view(bits, -1)
    for start in range(0, max(n, 1), step):
        part = slice(start, min(start + step, n))
        codes = None
        if planes is not None:
            first = start // sidebits.BITS
            length = part.stop - part.start
            codes = sidebits.unpack(planes[:, first : first + sidebits.size(length)].reshape(-1), length, bits)
        yield part, codes
