"""The layers as modules, with torch.nn's names and arguments; what they guarantee stands in `invref.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from invref import functional


class GELU(torch.nn.GELU):
    """torch.nn.GELU that keeps its output and one bit per element for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """GELU of a tensor of any shape."""
        return functional.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU that keeps its output and one bit per element for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """SiLU of a tensor of any shape."""
        return functional.silu(input, inplace=self.inplace)
