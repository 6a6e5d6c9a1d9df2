"""Small models of the shapes that people train, with their activations as modules.

Guarantees that a model is a function of its shape and seed alone, and that its every activation comes from the maker
given, so that arms differ in nothing else. Must not know arms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from verify import training_data as data

Kind = Literal["gelu", "gelu_tanh", "silu"]
MakeActivation = Callable[[Kind], nn.Module]
PATCH = 2
"""Pixels a side of a patch of an image of 8 x 8."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, what it is trained on, and for how long by default.

    classes: outputs where that is not what the data has; text: whether it reads characters.
    """

    activation: Kind
    width: int
    layers: int
    heads: int
    length: int
    batch: int
    steps: int
    rate: float
    text: bool = True
    causal: bool = True
    gated: bool = False
    patches: bool = False
    classes: int | None = None
    validation: int = 128

    def data(self) -> data.Data:
        """What the model is trained on."""
        return data.text(self.length, masked=not self.causal) if self.text else data.digits()


SHAPES = {
    "gpt": Shape("gelu_tanh", 64, 2, 4, 64, 16, 200, 3e-3),
    "bert": Shape("gelu", 64, 2, 4, 64, 16, 200, 3e-3, causal=False),
    "llama": Shape("silu", 64, 2, 4, 64, 16, 200, 3e-3, gated=True),
    "vit": Shape("gelu", 64, 2, 4, 16, 64, 200, 2e-3, text=False, causal=False, patches=True),
    "mlp": Shape("silu", 128, 3, 1, 1, 64, 300, 2e-3, text=False),
    "gpt2": Shape("gelu_tanh", 768, 12, 12, 512, 16, 600, 6e-4, classes=50257),
}
"""`gpt2` has the 124 million parameters of the published one, and wants a GPU."""


def build(shape: Shape, symbols: int, seed: int, make: MakeActivation) -> nn.Module:
    """The model with the weights of a seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Perceptron(shape, symbols, make) if shape.heads == 1 else Transformer(shape, symbols, make)


class Perceptron(nn.Module):
    """Linear layers and activations on flat images."""

    def __init__(self, shape: Shape, symbols: int, make: MakeActivation) -> None:
        super().__init__()
        widths = [64] + [shape.width] * shape.layers
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Linear(before, after), make(shape.activation)]
        self.body = nn.Sequential(*parts, nn.Linear(shape.width, symbols))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, symbols) of images (batch, 64)."""
        logits: Tensor = self.body(x)
        return logits


class Transformer(nn.Module):
    """Pre-norm attention and feed-forward blocks over characters or patches, with learned positions."""

    def __init__(self, shape: Shape, symbols: int, make: MakeActivation) -> None:
        super().__init__()
        self.shape = shape
        outputs = shape.classes or symbols
        # One number more than there are characters is the mask.
        self.embed: nn.Module = (
            nn.Linear(PATCH * PATCH, shape.width) if shape.patches else nn.Embedding(outputs + 1, shape.width)
        )
        self.positions = nn.Parameter(torch.randn(shape.length, shape.width) * 0.02)
        self.blocks = nn.ModuleList(Block(shape, make) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape.width, outputs, bias=False)
        if isinstance(self.embed, nn.Embedding):
            nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: (batch, length, outputs) of characters (batch, length), (batch, outputs) of images (batch, 64)."""
        if self.shape.patches:
            side = 8 // PATCH
            x = x.view(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(-1, side * side, PATCH * PATCH)
        h = self.embed(x) + self.positions
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        logits: Tensor = self.head(h.mean(dim=1) if self.shape.patches else h)
        return logits


class Block(nn.Module):
    """Attention, then a feed-forward part that is plain or gated."""

    def __init__(self, shape: Shape, make: MakeActivation) -> None:
        super().__init__()
        width, self.heads, self.causal = shape.width, shape.heads, shape.causal
        self.before, self.between = _norm(shape), _norm(shape)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # A gated part has three matrices where a plain one has two: two thirds of the width, rounded up to eights.
        wide = -(-8 * width // 3 // 8) * 8 if shape.gated else 4 * width
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)
        self.gate = nn.Linear(width, wide) if shape.gated else None
        self.activation = make(shape.activation)

    def forward(self, h: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        batch, length, width = h.shape
        q, k, v = self.qkv(self.before(h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = self.between(h)
        inner = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        result: Tensor = h + self.down(inner)
        return result


def _norm(shape: Shape) -> nn.Module:
    return nn.RMSNorm(shape.width) if shape.gated else nn.LayerNorm(shape.width)
