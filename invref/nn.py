"""The layers as modules, with the names and arguments of torch.nn and of transformers' activations.

Each subclasses torch's where torch has one, so that its arguments, state and repr are torch's; what they guarantee
stands in `invref.functional`. ReLU, Tanh and Sigmoid are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import ReLU as ReLU
from torch.nn import Sigmoid as Sigmoid
from torch.nn import Tanh as Tanh

from invref import functional
from invref.errors import FormulaError


class GELU(nn.GELU):
    """torch.nn.GELU that keeps its output and one bit per element for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """GELU of a tensor of any shape."""
        return functional.gelu(input, approximate=self.approximate)


class SiLU(nn.SiLU):
    """torch.nn.SiLU that keeps its output and one bit per element for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """SiLU of a tensor of any shape."""
        return functional.silu(input, inplace=self.inplace)


class Mish(nn.Mish):
    """torch.nn.Mish that keeps its output and one bit per element for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Mish of a tensor of any shape."""
        return functional.mish(input, inplace=self.inplace)


class Hardswish(nn.Hardswish):
    """torch.nn.Hardswish that keeps its output and one bit per element for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Hardswish of a tensor of any shape."""
        return functional.hardswish(input, inplace=self.inplace)


class ELU(nn.ELU):
    """torch.nn.ELU that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """ELU of a tensor of any shape."""
        return functional.elu(input, alpha=self.alpha, inplace=self.inplace)


class SELU(nn.SELU):
    """torch.nn.SELU that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """SELU of a tensor of any shape."""
        return functional.selu(input, inplace=self.inplace)


class CELU(nn.CELU):
    """torch.nn.CELU that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """CELU of a tensor of any shape."""
        return functional.celu(input, alpha=self.alpha, inplace=self.inplace)


class Softplus(nn.Softplus):
    """torch.nn.Softplus that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Softplus of a tensor of any shape."""
        return functional.softplus(input, beta=self.beta, threshold=self.threshold)


class Softsign(nn.Softsign):
    """torch.nn.Softsign that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Softsign of a tensor of any shape."""
        return functional.softsign(input)


class LogSigmoid(nn.LogSigmoid):
    """torch.nn.LogSigmoid that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """LogSigmoid of a tensor of any shape."""
        return functional.logsigmoid(input)


class Tanhshrink(nn.Tanhshrink):
    """torch.nn.Tanhshrink that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Tanhshrink of a tensor of any shape."""
        return functional.tanhshrink(input)


class LeakyReLU(nn.LeakyReLU):
    """torch.nn.LeakyReLU that keeps its output, or one bit per element, for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """LeakyReLU of a tensor of any shape."""
        return functional.leaky_relu(input, negative_slope=self.negative_slope, inplace=self.inplace)


class Hardtanh(nn.Hardtanh):
    """torch.nn.Hardtanh that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Hardtanh of a tensor of any shape."""
        return functional.hardtanh(input, min_val=self.min_val, max_val=self.max_val, inplace=self.inplace)


class ReLU6(nn.ReLU6):
    """torch.nn.ReLU6 that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """ReLU6 of a tensor of any shape."""
        return functional.relu6(input, inplace=self.inplace)


class Hardsigmoid(nn.Hardsigmoid):
    """torch.nn.Hardsigmoid that keeps one bit per element for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Hardsigmoid of a tensor of any shape."""
        return functional.hardsigmoid(input, inplace=self.inplace)


class Hardshrink(nn.Hardshrink):
    """torch.nn.Hardshrink that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Hardshrink of a tensor of any shape."""
        return functional.hardshrink(input, lambd=self.lambd)


class Softshrink(nn.Softshrink):
    """torch.nn.Softshrink that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Softshrink of a tensor of any shape."""
        return functional.softshrink(input, lambd=self.lambd)


class Threshold(nn.Threshold):
    """torch.nn.Threshold that keeps its output, or one bit per element, for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Threshold of a tensor of any shape."""
        return functional.threshold(input, threshold=self.threshold, value=self.value, inplace=self.inplace)


class PReLU(nn.PReLU):
    """torch.nn.PReLU that keeps its output for backward instead of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """PReLU of a tensor of any shape."""
        return functional.prelu(input, self.weight)


class QuickGELUActivation(nn.Module):
    """transformers' `quick_gelu` that keeps its output and one bit per element for backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """x * sigmoid(1.702 x), of a tensor of any shape."""
        return functional.quick_gelu(input)


class NewGELUActivation(nn.Module):
    """transformers' `gelu_new` that keeps its output and one bit per element for backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The tanh form of GELU, composed, of a tensor of any shape."""
        return functional.gelu_new(input)


class FastGELUActivation(nn.Module):
    """transformers' `gelu_fast` that keeps its output and one bit per element for backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The tanh form of GELU with a rounded constant, of a tensor of any shape."""
        return functional.gelu_fast(input)


class LaplaceActivation(nn.Module):
    """transformers' `laplace` that keeps its output for backward."""

    def forward(self, input: Tensor, mu: float = 0.707107, sigma: float = 0.282095) -> Tensor:  # noqa: A002
        """The normal distribution function of mean mu and deviation sigma, of a tensor of any shape."""
        return functional.laplace(input, mu, sigma)


class ReLUSquaredActivation(nn.Module):
    """transformers' `relu2` that keeps its output for backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The square of relu, of a tensor of any shape."""
        return functional.relu2(input)


class SqrtSoftplusActivation(nn.Module):
    """transformers' `sqrtsoftplus` that keeps its output for backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The square root of softplus, of a tensor of any shape."""
        return functional.sqrtsoftplus(input)


class ClippedGELUActivation(nn.Module):
    """transformers' clipped GELU (`gelu_10` for -10 and 10) that keeps its output and one bit per element."""

    def __init__(self, min: float, max: float) -> None:  # noqa: A002
        if min > max:
            raise FormulaError(f"min={min} is above max={max}: exchange them")
        super().__init__()
        self.min = min
        self.max = max

    def forward(self, x: Tensor) -> Tensor:
        """GELU clipped to [min, max], of a tensor of any shape."""
        return functional.gelu_10(x, self.min, self.max)


class XIELUActivation(nn.Module):
    """transformers' `xielu` that keeps its output and two bits per element; both slopes are learnt."""

    beta: Tensor
    eps: Tensor

    def __init__(
        self,
        alpha_p_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta: float = 0.5,
        eps: float = -1e-6,
        dtype: torch.dtype = torch.bfloat16,
        with_vector_loads: bool = False,
    ) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(_raw(alpha_p_init, dtype))
        self.alpha_n = nn.Parameter(_raw(alpha_n_init - beta, dtype))
        self.register_buffer("beta", torch.tensor(beta, dtype=dtype))
        self.register_buffer("eps", torch.tensor(eps, dtype=dtype))
        self.with_vector_loads = with_vector_loads

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """xIELU of a tensor of any shape."""
        return functional.xielu(input, self.alpha_p, self.alpha_n, self.beta, self.eps)


def _raw(slope: float, dtype: torch.dtype) -> Tensor:
    """The parameter, of shape (1,), whose softplus is the slope."""
    return torch.log(torch.expm1(torch.tensor(slope, dtype=dtype))).unsqueeze(0)
