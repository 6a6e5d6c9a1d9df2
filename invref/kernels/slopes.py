"""Derivatives of the activations in float64, where tables and calibrations take the truth from.

Each takes float64 inputs of any shape and is written so that neither tail cancels or overflows: absolute errors stay
near 1e-16, thousands of times below what a 16-bit format resolves. At the infinities and NaN they give what the
framework's layer gives. Must not know outputs or codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def elu(x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    """Of scale * x for x > 0, else scale * alpha * expm1(input_scale * x)."""
    return torch.where(x > 0, scale, scale * alpha * input_scale * torch.exp(input_scale * x))


def gelu(x: Tensor) -> Tensor:
    """Of x * Phi(x)."""
    return torch.erfc(-x / math.sqrt(2)) / 2 + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(x: Tensor, scale: float = math.sqrt(2 / math.pi)) -> Tensor:
    """Of x * sigmoid(2 u) with u = scale * (x + 0.044715 x^3)."""
    u = scale * x * (1 + 0.044715 * x * x)
    inner = 2 * scale * (1 + 3 * 0.044715 * x * x)
    return torch.sigmoid(2 * u) * (1 + x * inner * torch.sigmoid(-2 * u))


def silu(x: Tensor, scale: float = 1.0) -> Tensor:
    """Of x * sigmoid(scale * x)."""
    return torch.sigmoid(scale * x) * (1 + scale * x * torch.sigmoid(-scale * x))


def mish(x: Tensor) -> Tensor:
    """Of x * tanh(softplus(x))."""
    gate = torch.tanh(torch.nn.functional.softplus(x))
    return gate + x * torch.sigmoid(x) * (1 - gate * gate)


def softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    """Of log(1 + exp(beta x)) / beta, and of x where beta * x is above the threshold."""
    return torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x))


def softsign(x: Tensor) -> Tensor:
    """Of x / (1 + |x|); NaN at the infinities, where the framework divides one by the other."""
    return torch.where(x.isinf(), torch.nan, (1 + x.abs()) ** -2)


def hardswish(x: Tensor) -> Tensor:
    """Of 0 up to -3, x from 3 on, and x * (x + 3) / 6 between."""
    return torch.where(x <= -3, 0.0, torch.where(x > 3, 1.0, x / 3 + 0.5))


def relu2(x: Tensor) -> Tensor:
    """Of relu(x)^2."""
    return torch.where(x <= 0, 0.0, 2 * x)


def laplace(x: Tensor, mu: float, sigma: float) -> Tensor:
    """Of the normal distribution function with mean mu and deviation sigma."""
    z = (x - mu) / sigma
    return torch.exp(-z * z / 2) / (sigma * math.sqrt(2 * math.pi))


def sqrtsoftplus(x: Tensor) -> Tensor:
    """Of sqrt(softplus(x)), with softplus(x) = x above 20 as the framework has it."""
    # On the left sigmoid and softplus are both exp(x), which underflows before its root does.
    root = torch.sqrt(torch.nn.functional.softplus(x))
    return torch.where(x < -40, torch.exp(x / 2) / 2, torch.where(x > 20, 1.0, torch.sigmoid(x)) / (2 * root))


def xielu(x: Tensor, positive: float, negative: float, beta: float, eps: float) -> Tensor:
    """Of xIELU with effective slopes `positive` and `negative`; NaN at -inf, where its forward is inf - inf."""
    left = torch.where(x > eps, beta - negative, beta + negative * torch.expm1(x))
    return torch.where(x > 0, 2 * positive * x + beta, torch.where(x > -torch.inf, left, torch.nan))


# Second derivatives, by the names of the first ones. At a break they give what the side that owns it has, and 0 at the
# infinities and where float64 has nothing left.

FAR = 1e4
"""Beyond, every second derivative of a gate has vanished, while powers of x could still overflow."""


def elu_curve(x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    """Of scale * x for x > 0, else scale * alpha * expm1(input_scale * x)."""
    return torch.where(x > 0, 0.0, scale * alpha * input_scale * input_scale * torch.exp(input_scale * x))


def gelu_curve(x: Tensor) -> Tensor:
    """Of x * Phi(x)."""
    x = x.clamp(-FAR, FAR)
    return (2 - x * x) * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu_tanh_curve(x: Tensor, scale: float = math.sqrt(2 / math.pi)) -> Tensor:
    """Of x * sigmoid(2 u) with u = scale * (x + 0.044715 x^3)."""
    x = x.clamp(-FAR, FAR)
    u = scale * x * (1 + 0.044715 * x * x)
    first, second = 2 * scale * (1 + 3 * 0.044715 * x * x), 2 * scale * 6 * 0.044715 * x
    gate = torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)
    return gate * (2 * first + x * (second - torch.tanh(u) * first * first))


def silu_curve(x: Tensor, scale: float = 1.0) -> Tensor:
    """Of x * sigmoid(scale * x)."""
    x = (scale * x).clamp(-FAR, FAR)
    return scale * torch.sigmoid(x) * torch.sigmoid(-x) * (2 - x * torch.tanh(x / 2))


def mish_curve(x: Tensor) -> Tensor:
    """Of x * tanh(softplus(x))."""
    x = x.clamp(-FAR, FAR)
    gate, side = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    first = (1 - gate * gate) * side
    return first * (2 + x * (torch.sigmoid(-x) - 2 * gate * side))


def softplus_curve(x: Tensor, beta: float, threshold: float) -> Tensor:
    """Of log(1 + exp(beta x)) / beta, and of x where beta * x is above the threshold."""
    return torch.where(beta * x > threshold, 0.0, beta * torch.sigmoid(beta * x) * torch.sigmoid(-beta * x))


def softsign_curve(x: Tensor) -> Tensor:
    """Of x / (1 + |x|); 0 at 0, where it jumps."""
    return -2 * torch.sign(x) * (1 + x.abs()) ** -3


def hardswish_curve(x: Tensor) -> Tensor:
    """Of 0 up to -3, x from 3 on, and x * (x + 3) / 6 between."""
    return torch.where((x > -3) & (x <= 3), torch.full_like(x, 1 / 3), 0.0)


def tanhshrink_curve(x: Tensor) -> Tensor:
    """Of x - tanh(x)."""
    x = x.clamp(-FAR, FAR)
    return 2 * torch.tanh(x) * (4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x))


def laplace_curve(x: Tensor, mu: float, sigma: float) -> Tensor:
    """Of the normal distribution function with mean mu and deviation sigma."""
    z = ((x - mu) / sigma).clamp(-FAR, FAR)
    return -z * torch.exp(-z * z / 2) / (sigma * sigma * math.sqrt(2 * math.pi))


def sqrtsoftplus_curve(x: Tensor) -> Tensor:
    """Of sqrt(softplus(x)), with softplus(x) = x above 20 as the framework has it."""
    root, gate = torch.sqrt(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    middle = gate * torch.sigmoid(-x) / (2 * root) - gate * gate / (4 * root * root * root)
    return torch.where(x < -40, torch.exp(x / 2) / 4, torch.where(x > 20, -(x.clamp(min=20) ** -1.5) / 4, middle))


def xielu_curve(x: Tensor, positive: float, negative: float, eps: float) -> Tensor:
    """Of xIELU with effective slopes `positive` and `negative`."""
    return torch.where(x > 0, 2 * positive, torch.where(x > eps, 0.0, negative * torch.exp(x.clamp(max=0))))
