"""Real data that ships with packages: characters of Python's own help topics, and scikit-learn's digits.

Guarantees that the same seed gives the same batches on any device, that nothing is downloaded, and that what is
validated on is never trained on. Must not know models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from invref.errors import MissingError

HELD_OUT = 10
"""One part in this many is kept for validation."""
MASKED = 0.15
"""The share of characters to guess where a text is read in both directions, as BERT has it."""
IGNORED = -100
"""The label of what is not to be guessed; torch's cross entropy leaves it out."""
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Text:
    """Windows of a text; a character's number is its place in the alphabet, and the number after the last is a mask."""

    train: Tensor
    held_out: Tensor
    symbols: int
    length: int
    masked: bool = False

    def batches(self, seed: int, size: int, steps: int) -> Iterator[Batch]:
        """Batches of windows from random places, inputs and labels (size, length)."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - self.length, (size,), generator=generator)
            yield self._windows(self.train, starts, generator)

    def validation(self, count: int) -> Batch:
        """The same `count` windows for everyone, spread over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - self.length - 1, count).long()
        return self._windows(self.held_out, starts, torch.Generator().manual_seed(0))

    def _windows(self, text: Tensor, starts: Tensor, generator: torch.Generator) -> Batch:
        windows = text[starts[:, None] + torch.arange(self.length + 1)]
        if not self.masked:
            return windows[:, :-1], windows[:, 1:]
        labels = windows[:, :-1]
        hidden = torch.rand(labels.shape, generator=generator) < MASKED
        return labels.masked_fill(hidden, self.symbols), labels.masked_fill(~hidden, IGNORED)


@dataclass(frozen=True)
class Images:
    """Grey images (n, 64) with values from 0 to 1, and the digits they show."""

    images: Tensor
    digits: Tensor
    held_images: Tensor
    held_digits: Tensor
    symbols: int = 10

    def batches(self, seed: int, size: int, steps: int) -> Iterator[Batch]:
        """Batches of images drawn at random, (size, 64) and (size,)."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.images), (size,), generator=generator)
            yield self.images[chosen], self.digits[chosen]

    def validation(self, _count: int) -> Batch:
        """All held-out images."""
        return self.held_images, self.held_digits


Data = Text | Images


def text(length: int, masked: bool = False) -> Text:
    """The help topics that Python ships, in order of their names; the last tenth is held out."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(whole)))}
    numbers = torch.tensor([alphabet[character] for character in whole])
    cut = len(numbers) - len(numbers) // HELD_OUT
    return Text(numbers[:cut], numbers[cut:], len(alphabet), length, masked)


def digits() -> Images:
    """scikit-learn's 1797 digits of 8 x 8 pixels; a tenth, drawn once, is held out."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingError("training on images needs scikit-learn: pip install 'invref[training]'") from error
    found = load_digits()
    images, labels = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = len(images) - len(images) // HELD_OUT
    kept, held = order[:cut], order[cut:]
    return Images(images[kept], labels[kept], images[held], labels[held])
