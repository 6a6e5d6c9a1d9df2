"""Trains all arms from one seed: same weights, same batches, other gradients of the activations.

Guarantees that native goes first and every other arm is compared with its very weights, and that a model is trained
in float32 weights, under autocast where the format is a shorter one. Must not know what counts as equal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from verify import training_arms as arms
from verify.training_data import IGNORED, Batch, Data
from verify.training_models import Shape, build
from verify.training_record import Run, Seed, Step

MARKS = 10
"""How often parameters are compared on the way."""
WARM_UP = 0.1
"""The share of steps over which the rate rises from 0; then it falls to 0 as a cosine does."""
DECAY = 0.01
CLIP = 1.0
"""Weight decay, and the norm that gradients are clipped to."""
AT_ONCE = 64
"""Validation windows that a model sees at a time."""
Told = Callable[[int, int], None]
Tensors = list[Tensor]


@dataclass
class Trainer:
    """One model, with what it is trained on.

    `told` hears (steps done, steps in all) of a seed, over all arms.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    steps: int
    told: Told = lambda _done, _total: None
    data: Data = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.shape.data()

    def seed(self, seed: int, chosen: tuple[str, ...]) -> Seed:
        """All arms from a seed; native is trained whether or not it is among those chosen."""
        start = time.monotonic()
        marks = tuple(sorted({round(self.steps * (i + 1) / MARKS) for i in range(MARKS)} - {0}))
        native, path = self._trained(arms.NATIVE, seed, marks, None, 0, len(chosen))
        first, last = self._weights(seed), path[-1]
        # Two batches that training does not draw from this seed's own sequence of random numbers.
        batch, other = self.data.batches(-1 - seed, self.shape.batch, 2)
        beside = [self._gradient(arms.NATIVE, seed, weights, batch, self.dtype) for weights in (first, last)]
        runs = []
        for place, arm in enumerate(chosen):
            losses, distances, loss, accuracy = (
                native
                if arm == arms.NATIVE
                else self._trained(arm, seed, marks, path, place * self.steps, len(chosen))[0]
            )
            steps = [self._beside(arm, seed, weights, batch, theirs)
                     for weights, theirs in zip((first, last), beside, strict=True)]  # fmt: skip
            runs.append(Run(arm, steps[0], steps[1], losses, distances, loss, accuracy))
        exact = self._gradient(arms.NATIVE, seed, first, batch, torch.float32)
        short = self._gradient(arms.NATIVE, seed, first, batch, torch.bfloat16)
        elsewhere = self._gradient(arms.NATIVE, seed, first, other, torch.float32)
        return Seed(seed, marks, compared(short, exact).difference, compared(elsewhere, exact).difference,
                    time.monotonic() - start, tuple(runs))  # fmt: skip

    def model(self, arm: str, seed: int) -> nn.Module:
        """An arm's model at a seed's first weights."""
        make = arms.maker(arm, seed * len(arms.ARMS) + arms.ARMS.index(arm), self.device)
        return build(self.shape, self.data.symbols, seed, make).to(self.device)

    def _trained(
        self, arm: str, seed: int, marks: tuple[int, ...], beside: list[Tensors] | None, done: int, arms_: int
    ) -> tuple[tuple[tuple[float, ...], tuple[float, ...], float, float], list[Tensors]]:
        model = self.model(arm, seed)
        optimizer = torch.optim.AdamW(model.parameters(), self.shape.rate, weight_decay=DECAY)
        losses, distances, path = [], [], []
        for step, batch in enumerate(self.data.batches(seed, self.shape.batch, self.steps)):
            for group in optimizer.param_groups:
                group["lr"] = self.shape.rate * rate(step, self.steps)
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(model, batch, self.dtype)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
            if step + 1 in marks:
                weights = [p.detach().clone() for p in model.parameters()]
                if beside is None:
                    path.append(weights)
                    distances.append(0.0)
                else:
                    distances.append(distance(weights, beside[len(distances)]))
            self.told(done + step + 1, self.steps * arms_)
        return (tuple(losses), tuple(distances), *self._validated(model)), path

    def _validated(self, model: nn.Module) -> tuple[float, float]:
        inputs, labels = self.data.validation(self.shape.validation)
        total, right, count = 0.0, 0, 0
        with torch.no_grad():
            for x, wanted in zip(inputs.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
                logits = self._logits(model, x, self.dtype)
                flat = wanted.to(self.device).flatten()
                total += functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum").item()
                right += int((logits.argmax(1) == flat).sum())
                count += int((flat != IGNORED).sum())
        return total / count, right / count

    def _logits(self, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits: Tensor = model(x.to(self.device))
        return logits.float().flatten(0, -2)

    def _loss(self, model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
        x, labels = batch
        wanted = labels.to(self.device).flatten()
        return functional.cross_entropy(self._logits(model, x, dtype), wanted, ignore_index=IGNORED)

    def _weights(self, seed: int) -> Tensors:
        return [p.detach().clone() for p in self.model(arms.NATIVE, seed).parameters()]

    def _gradient(self, arm: str, seed: int, weights: Tensors, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
        model = self.model(arm, seed)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(value)
        self._loss(model, batch, dtype).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    def _beside(self, arm: str, seed: int, weights: Tensors, batch: Batch, native: dict[str, Tensor]) -> Step:
        if arm == arms.NATIVE:
            return Step(0.0, 0.0, "", 0.0)
        return compared(self._gradient(arm, seed, weights, batch, self.dtype), native)


def rate(step: int, steps: int) -> float:
    """The share of the full rate at a step, counted from 0."""
    warm = WARM_UP * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def distance(ours: Tensors, theirs: Tensors) -> float:
    """The norm of the difference over the norm of theirs, all tensors taken as one vector."""
    apart = math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True)))
    return apart / math.sqrt(sum(float(b.double().square().sum()) for b in theirs))


def compared(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Step:
    """One gradient beside another, both float64 by parameter; NaN comes out as NaN."""
    worst, name = 0.0, ""
    for key, b in theirs.items():
        size, apart = float(b.norm()), float((ours[key] - b).norm())
        relative = apart / size if size else (0.0 if apart == 0 else math.inf)
        if not relative <= worst:
            worst, name = relative, key
            if math.isnan(relative):
                break
    a, b = (torch.cat([grads[key].flatten() for key in theirs]) for grads in (ours, theirs))
    # 1 - cos is half the squared distance of the unit vectors, which does not cancel.
    lost = float((a / a.norm() - b / b.norm()).square().sum()) / 2
    return Step(float((a - b).norm() / b.norm()), worst, name, -lost)
