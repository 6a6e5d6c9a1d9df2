"""What else is publicly available for the same purpose, and whether it can run here.

Guarantees a line for every peer of an activation; one that is not installed or fails says so. Must not know how time is
taken.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from invref.catalogue import Row
from verify import speed_cases, speed_clock, speed_stats
from verify.speed_compile import compiled, quiet, reason
from verify.speed_record import OURS, THEIRS, Timing

Layer = Callable[[Tensor], Tensor]
SIZE = 1 << 20
"""Elements at which peers are compared: enough that calls cost nothing, and few enough for the slow ones."""


class _MissingError(Exception):
    """A peer that is not here."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to keep less: `make` gives its layer for a row, compiled for x and dy where it is."""

    name: str
    make: Callable[[Row, Tensor, Tensor], Layer]
    activations: tuple[str, ...] | None = None

    def serves(self, activation: str) -> bool:
        """Whether it has the activation at all."""
        return self.activations is None or activation in self.activations


def _compiled(row: Row, x: Tensor, dy: Tensor) -> Layer:
    def layer(x: Tensor) -> Tensor:
        return row.native(x)

    return compiled(layer, lambda function: torch.autograd.grad(function(x), x, dy))


def _checkpointed(row: Row, _x: Tensor, _dy: Tensor) -> Layer:
    return lambda x: checkpoint(row.native, x, use_reentrant=False)


def _imported(module: str, source: str, row: Row, _x: Tensor, _dy: Tensor) -> Layer:
    try:
        found: Layer = getattr(importlib.import_module(module), row.name)
    except ImportError:
        raise _MissingError(f"not installed: pip install {source}") from None
    return found


PEERS = (
    Peer("torch.compile", _compiled),
    Peer("checkpoint", _checkpointed),
    # The code of G. Novikov and I. Oseledets, arXiv 2407.15545.
    Peer("optiacts", partial(_imported, "optiacts", "git+https://github.com/PgLoLo/optiacts"), ("gelu", "silu")),
    # The code of G. Novikov and others, arXiv 2202.00441: the derivative in steps of few bits, in place of the output.
    Peer("fewbit", partial(_imported, "fewbit.functional", "git+https://github.com/skolai/fewbit (needs CMake)"),
         ("gelu", "silu")),
)  # fmt: skip


def measure(row: Row, n: int, dtype: str, device: str, threads: int, seconds: float) -> list[Timing]:
    """A line per peer, and one of invref beside them: each in turns with torch's own layer."""
    x, dy = speed_cases.inputs(n, getattr(torch, dtype), device)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(row.native(wide), wide, dy.double())
    rows = []
    ours = Peer(OURS, lambda row, _x, _dy: row.layer)
    for peer in (ours, *(peer for peer in PEERS if peer.serves(row.name))):
        timing = partial(Timing, "peer", row.name, dtype, device, threads, n, peer.name)
        try:
            with quiet():
                layer = peer.make(row, x, dy)
                (gradient,) = torch.autograd.grad(layer(x), x, dy)
                runs = {
                    peer.name: speed_cases.forward_backward(layer, x, dy),
                    THEIRS: speed_cases.forward_backward(row.native, x, dy),
                }
                times = speed_clock.interleaved(runs, speed_clock.clock(device), seconds)
        except _MissingError as missing:
            rows.append(timing(note=str(missing)))
        except Exception as error:  # whatever somebody else's code raises: its line says so
            rows.append(timing(note=reason(error)))
        else:
            lost = int((~gradient.isfinite()).sum())
            distance = None if lost else float((gradient.double() - exact).norm() / exact.norm())
            rows.append(timing(
                times.rounds, times.loops,
                seconds=speed_stats.spread(times.seconds[peer.name]),
                ratio=speed_stats.ratio(times.seconds[peer.name], times.seconds[THEIRS]),
                error_input=distance, others=times.others,
                note=f"{lost:,} of {n:,} gradients are not finite" if lost else "",
            ))  # fmt: skip
    return rows
