"""A whole step: linear layer, activation, linear layer, forward and backward, in every way a user could have it.

Guarantees that all contestants compute the same step from the same numbers, that memory is counted in storages, not in
tensors, and that a contestant that fails has a line that says why. Must not know how time is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from invref.catalogue import Row
from invref.storages import counting
from verify import speed_clock, speed_stats
from verify.speed_compile import Function, compiled, quiet, reason
from verify.speed_record import STEP_OURS, Timing

WIDTH, TOKENS, WIDER = 768, 2048, 4
BUDGET = 0.5
"""The share of the activation memory that torch.compile may keep, where it has a budget."""

EAGER = "torch, eager"
COMPILED, BUDGETED = "torch.compile", f"torch.compile, budget {BUDGET:g}"
CHECKPOINT = "torch, checkpoint"
OURS_COMPILED = "invref, torch.compile"


@dataclass(frozen=True)
class Step:
    """The numbers of a step: input (tokens, width), the two layers' weights and biases, the gradient coming in."""

    x: Tensor
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    dy: Tensor

    @classmethod
    def of(cls, width: int, tokens: int, dtype: torch.dtype, device: str = "cpu") -> Step:
        """Normal numbers, the same every time, with weights scaled so that the activation's inputs are normal."""
        generator = torch.Generator().manual_seed(width)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        wide = WIDER * width
        first = normal(wide, width, scale=width**-0.5), normal(wide, scale=0.1)
        second = normal(width, wide, scale=wide**-0.5), normal(width, scale=0.1)
        tensors = [normal(tokens, width), *first, *second]
        x, *weights = (tensor.requires_grad_() for tensor in tensors)
        return cls(x, (weights[0], weights[1]), (weights[2], weights[3]), normal(tokens, width))

    @property
    def parameters(self) -> list[Tensor]:
        """Weights and biases."""
        return [*self.first, *self.second]

    def double(self) -> Step:
        """The same numbers in float64."""
        x, *weights = (t.detach().double().requires_grad_() for t in (self.x, *self.parameters))
        return Step(x, (weights[0], weights[1]), (weights[2], weights[3]), self.dy.double())

    def gradients(self, forward: Function) -> list[Tensor]:
        """Of the input and of the parameters."""
        return list(torch.autograd.grad(forward(self.x), [self.x, *self.parameters], self.dy))

    def plain(self, activation: Callable[[Tensor], Tensor]) -> Function:
        """The step's forward with an activation."""
        first, second = self.first, self.second

        def forward(x: Tensor) -> Tensor:
            return functional.linear(activation(functional.linear(x, *first)), *second)

        return forward

    def checkpointed(self, activation: Callable[[Tensor], Tensor]) -> Function:
        """The same with activation and second layer computed again in backward."""
        first, second = self.first, self.second

        def rest(hidden: Tensor) -> Tensor:
            return functional.linear(activation(hidden), *second)

        return lambda x: checkpoint(rest, functional.linear(x, *first), use_reentrant=False)


def contestants(row: Row) -> dict[str, Callable[[Step], Function]]:
    """Each way to have the step with an activation: from its numbers to its forward, compiled where it is."""

    def compile_(layer: Callable[[Tensor], Tensor], step: Step, budget: float | None = None) -> Function:
        return compiled(step.plain(layer), step.gradients, budget)

    return {
        EAGER: lambda step: step.plain(row.native),
        COMPILED: partial(compile_, row.native),
        BUDGETED: partial(compile_, row.native, budget=BUDGET),
        CHECKPOINT: lambda step: step.checkpointed(row.native),
        STEP_OURS: lambda step: step.plain(row.layer),
        OURS_COMPILED: partial(compile_, row.layer),
    }


def measure(
    row: Row, tokens: int, dtype: str, device: str, threads: int, seconds: float, width: int = WIDTH
) -> list[Timing]:
    """A line per contestant; `seconds` for each."""
    step = Step.of(width, tokens, getattr(torch, dtype), device)
    exact = _exact(step, row)
    ready: dict[str, Function] = {}
    notes: dict[str, str] = {}
    facts: dict[str, tuple[int, float | None, float | None]] = {}
    for name, make in contestants(row).items():
        try:
            with quiet():
                forward = make(step)
                facts[name] = kept(step, forward), *errors(step.gradients(forward), exact)
            ready[name] = forward
        except Exception as error:  # whatever it is: the line must say so, and the others go on
            notes[name] = reason(error)
    del exact
    runs: Mapping[str, Callable[[], object]] = {n: partial(step.gradients, f) for n, f in ready.items()}
    times = speed_clock.interleaved(runs, speed_clock.clock(device), seconds * len(runs))
    rows = []
    for name in contestants(row):
        timing = partial(Timing, "step", row.name, dtype, device, threads, tokens, name)
        if name in notes:
            rows.append(timing(note=notes[name]))
            continue
        memory, input_error, weight_error = facts[name]
        finite = input_error is not None and weight_error is not None
        rows.append(timing(
            times.rounds, times.loops,
            seconds=speed_stats.spread(times.seconds[name]),
            ratio=speed_stats.ratio(times.seconds[name], times.seconds[EAGER]),
            note="" if finite else "a gradient is not finite",
            kept=memory, error_input=input_error, error_weight=weight_error, others=times.others,
        ))  # fmt: skip
    return rows


def kept(step: Step, forward: Function) -> int:
    """Bytes of the storages that the forward keeps for backward, each counted once, those of parameters left out."""
    with counting(but=tuple(step.parameters)) as found:
        forward(step.x)
    return found.total


def errors(gradients: list[Tensor], exact: list[Tensor]) -> tuple[float | None, float | None]:
    """The distances of the input's and of the first weight's gradient to the exact ones, relative to their norms.

    None for a gradient that is not finite throughout.
    """
    found = [float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients[:2], exact[:2], strict=True)]
    dx, dw = (error if math.isfinite(error) else None for error in found)
    return dx, dw


def _exact(step: Step, row: Row) -> list[Tensor]:
    double = step.double()
    return double.gradients(double.plain(row.native))
