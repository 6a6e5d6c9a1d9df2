"""What a model keeps for backward, how long its step takes and what it needs at most, natively, with ours, and with the
ways to save memory that users have already.

Guarantees that all contestants run the same model on the same batch, that bytes are counted in unique storages
(`invref.storages`), and that a contestant that fails has a line that says why. Must not know how results are shown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import invref
from invref.planning import Plan, called
from invref.storages import counting
from verify import speed_clock, speed_stats
from verify.speed_compile import quiet, reason

NATIVE, PLANNED, FORCED, FUNCTIONS = "native", "invref, as planned", "invref, all that can be", "invref.inverted()"
CHECKPOINT = "checkpoint: activation + next linear"
AROUND = "checkpoint: the module around the activation"
COMPILED, BUDGETED = "torch.compile", "torch.compile, budget 0.5"
OURS = (NATIVE, PLANNED, FORCED, FUNCTIONS)
PEERS = (CHECKPOINT, AROUND, COMPILED, BUDGETED)
BUDGET = 0.5


@dataclass(frozen=True)
class Line:
    """One contestant: bytes kept for backward, seconds of a step (20, 50 and 80 %), its ratio to native's, the peak.

    kept and peak are in bytes, peak on a GPU only: what a step takes at most beside what was there before.
    """

    name: str
    kept: int | None = None
    seconds: tuple[float, float, float] | None = None
    ratio: tuple[float, float, float] | None = None
    peak: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """One model in one format."""

    model: str
    dtype: str
    device: str
    batch: int
    length: int
    dropout: bool
    parameters: int
    plan: dict[str, Any]
    lines: tuple[Line, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of `to_json`."""
        return cls(**{**data, "lines": tuple(Line(**line) for line in data["lines"])})

    def line(self, name: str) -> Line | None:
        """A contestant's line, None where it did not take part."""
        return next((line for line in self.lines if line.name == name), None)


@dataclass(frozen=True)
class Case:
    """A model with its example, and the plan for it."""

    model: nn.Module
    example: Any
    plan: Plan

    def step(self, around: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any]) -> Callable[[], None]:
        """Forward and backward inside a context, gradients thrown away."""

        def run() -> None:
            with around():
                output = called(call, self.example)
            _loss(output).backward()
            self.model.zero_grad(set_to_none=True)

        return run


def measure(case: Case, names: tuple[str, ...], seconds: float, device: torch.device) -> tuple[Line, ...]:
    """A line for each contestant named; native is the measure of all."""
    facts: dict[str, tuple[int, int | None]] = {}
    runs: dict[str, Callable[[], None]] = {}
    notes: dict[str, str] = {}
    with quiet():
        for name in names:
            try:
                around, call = contestant(name, case)
                step = case.step(around, call)
                step()
                facts[name] = _kept(case, around, call), _peak(step, device)
                runs[name] = step
            except Exception as error:  # whatever it is: the line must say so, and the others go on
                notes[name] = reason(error)
                case.model.zero_grad(set_to_none=True)
        times = speed_clock.interleaved(runs, speed_clock.clock(str(device)), seconds * len(runs)) if seconds else None
    lines = []
    for name in names:
        if name in notes:
            lines.append(Line(name, note=notes[name]))
            continue
        kept, peak = facts[name]
        if times is None:
            lines.append(Line(name, kept, peak=peak))
            continue
        spread = speed_stats.spread(times.seconds[name])
        ratio = speed_stats.ratio(times.seconds[name], times.seconds[NATIVE])
        lines.append(Line(name, kept, _three(spread), _three(ratio), peak))
    return tuple(lines)


def contestant(name: str, case: Case) -> tuple[Callable[[], AbstractContextManager[Any]], Callable[..., Any]]:
    """The context in which a step runs, and what is called there: never `case.model` itself but for native."""
    if name == NATIVE:
        return nullcontext, case.model
    if name == FUNCTIONS:
        return invref.inverted, case.model
    model = _copy(case.model)
    if name in (PLANNED, FORCED):
        invref.convert(model, only=case.plan.names if name == PLANNED else None, force=True)
        return nullcontext, model
    if name in (CHECKPOINT, AROUND):
        for module, forward in list((_followed if name == CHECKPOINT else _around)(case, model)):
            module.forward = forward
        return nullcontext, model
    return nullcontext, _compiled(model, case.example, BUDGET if name == BUDGETED else None)


def _copy(model: nn.Module) -> nn.Module:
    """The same modules once more, with the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


Replacement = tuple[nn.Module, Callable[..., Any]]


def _sites(case: Case, model: nn.Module) -> list[nn.Module]:
    modules = dict(model.named_modules())
    return [modules[p.site.name] for p in case.plan.sites if p.site.taken and p.before]


def _followed(case: Case, model: nn.Module) -> Iterator[Replacement]:
    """Each activation whose output goes straight into another module: that module computes both under a checkpoint."""
    sites = _sites(case, model)
    found: dict[int, nn.Module] = {}
    outputs: dict[int, nn.Module] = {}
    kept: list[Tensor] = []

    def left(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module in sites and isinstance(output, Tensor):
            outputs[output.data_ptr()] = module
            kept.append(output)

    def entered(module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and list(module.parameters(recurse=False)):
            site = outputs.get(inputs[0].data_ptr())
            if site is not None and site is not module:
                found.setdefault(id(site), module)

    handles = [hook for m in model.modules()
               for hook in (m.register_forward_hook(left), m.register_forward_pre_hook(entered))]  # fmt: skip
    with torch.no_grad(), torch.random.fork_rng():
        called(model, case.example)
    for handle in handles:
        handle.remove()
    if not found:
        raise ValueError("no activation goes straight into a linear layer")
    for site in sites:
        linear = found.get(id(site))
        if linear is not None:
            whole = partial(_both, type(site).forward, site, type(linear).forward, linear)
            yield site, _same
            yield linear, partial(checkpoint, whole, use_reentrant=False)


def _same(x: Tensor) -> Tensor:
    return x


def _both(
    act: Callable[..., Tensor], site: nn.Module, linear: Callable[..., Tensor], after: nn.Module, x: Tensor
) -> Tensor:
    return linear(after, act(site, x))


def _around(case: Case, model: nn.Module) -> Iterator[Replacement]:
    """The innermost module around each activation, computed again in backward."""
    sites = _sites(case, model)
    parents = [m for m in model.modules() if any(child in sites for child in m.children())]
    if model in parents:
        raise ValueError("an activation is the model's own child: everything would be computed again")
    for parent in parents:
        yield parent, partial(checkpoint, partial(type(parent).forward, parent), use_reentrant=False)


def _compiled(model: nn.Module, example: Any, budget: float | None) -> Callable[..., Any]:
    from torch._functorch import config

    torch.compiler.reset()
    made: Callable[..., Any] = torch.compile(model, dynamic=False)
    with config.patch(activation_memory_budget=1.0 if budget is None else budget):
        _loss(called(made, example)).backward()
    model.zero_grad(set_to_none=True)
    return made


def _loss(output: Any) -> Tensor:
    """The model's own loss, or the mean of the squares of its first output."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss  # type: ignore[no-any-return]
    first = next(t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor) and t.is_floating_point())
    return first.float().square().mean()


def _plain(output: Any) -> Any:
    return list(output.values()) if isinstance(output, Mapping) else output


def _kept(case: Case, around: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any]) -> int:
    but = tuple(leaf for leaf in tree_leaves(case.example) if isinstance(leaf, Tensor))
    with around(), counting(but=(*case.model.parameters(), *case.model.buffers(), *but)) as kept:
        called(call, case.example)
    return kept.total


def _peak(step: Callable[[], None], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _three(spread: speed_stats.Spread) -> tuple[float, float, float]:
    return spread.low, spread.middle, spread.high
