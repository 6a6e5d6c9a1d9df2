"""The forwards that the layers repeat bit for bit: torch's own, and the composed ones of transformers' table.

Each function takes a tensor of any shape and dtype and is differentiable by autograd, which keeps what it keeps: this
is what a user has without invref. Operation by operation the same as in transformers 5.24.0's `activations` module,
where the name is from there. Must not know decoders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def gelu_tanh(x: Tensor) -> Tensor:
    """torch's GELU in its tanh form."""
    return functional.gelu(x, approximate="tanh")


def gelu_new(x: Tensor) -> Tensor:
    """The tanh form of GELU, composed: transformers' `gelu_new`."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    """The tanh form of GELU with a rounded constant, composed: transformers' `gelu_fast`."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_10(x: Tensor, min: float = -10.0, max: float = 10.0) -> Tensor:  # noqa: A002
    """GELU clipped to [min, max]: transformers' `gelu_10`."""
    return torch.clip(functional.gelu(x), min, max)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), composed: transformers' `quick_gelu`."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """The square of relu, composed: transformers' `relu2`."""
    return torch.square(functional.relu(x))


def laplace(x: Tensor, mu: float = 0.707107, sigma: float = 0.282095) -> Tensor:
    """The distribution function of a normal variable, composed: transformers' `laplace`."""
    z = (x - mu).div(sigma * math.sqrt(2.0))
    return 0.5 * (1.0 + torch.erf(z))


def sqrtsoftplus(x: Tensor) -> Tensor:
    """The root of softplus, composed: transformers' `sqrtsoftplus`."""
    return functional.softplus(x).sqrt()


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
    """xIELU from its raw parameters, composed: transformers' `xielu`."""
    positive = functional.softplus(alpha_p)
    negative = beta + functional.softplus(alpha_n)
    return torch.where(x > 0, positive * x * x + beta * x, (torch.expm1(torch.min(x, eps)) - x) * negative + beta * x)
