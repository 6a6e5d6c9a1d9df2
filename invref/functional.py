"""The layers as functions, with torch.nn.functional's and transformers' names and arguments.

Forward is the framework's own, bit for bit. For backward only the very tensor returned is kept, whose storage the next
layer keeps anyway, and a few packed bits per element (`invref.catalogue` lists how many); the gradient is decoded from
them. Must not know formulas.

relu, tanh and sigmoid are torch's own, which keep nothing but their output already: they take what torch takes, integer
tensors included, and can be differentiated twice.

The others take tensors of any shape, keep strides as torch keeps them, and raise InputError for tensors that are not
bfloat16, float16, float32 or float64. `inplace` overwrites the input; where torch refuses that, as for leaves that
require a gradient, its RuntimeError comes before anything is written. At x = +inf, -inf and NaN the gradient is what
torch's vector code gives, unless a finite input has the same output and side bits: then it is that one's, and finite.

torch's transforms pass, in eager mode and in graphs (docs/transforms.md has every cell): torch.func's, forward mode,
second derivatives; a third raises TwiceError. Where bits alone are kept (hardsigmoid, leaky_relu with a slope below 0,
hardtanh and threshold with parameters that take a bit) the gradient is a constant to autograd unless the incoming one
is not, which is right: the second derivative is 0. Compiled and exported graphs carry the layer as an operator, those
of torch.fx as a call of `of_key`.
"""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor, is_grad_enabled, strided
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as own
from torch.nn.functional import relu as relu
from torch.overrides import handle_torch_function

from invref import layers, native, operators
from invref.autograd import functorch_active, recorded, tracked, wants_gradient
from invref.decoding import Forward
from invref.errors import FormulaError
from invref.formats import BY_DTYPE
from invref.inputs import checked, into_graph, modes, recording
from invref.kernels.dispatch import PLAIN
from invref.parametric import prelu as prelu
from invref.parametric import xielu as xielu
from invref.placements import is_split, locally

sigmoid = torch.sigmoid
tanh = torch.tanh


def _apply(name: str, x: Tensor, forward: Forward, arguments: tuple[float, ...] = (), inplace: bool = False) -> Tensor:
    # What training calls most comes first, and calls no functions, which take longer than what they ask.
    if (
        type(x) in PLAIN
        and x.requires_grad
        and x.dtype in BY_DTYPE
        and x.layout is strided
        and not (x.is_nested or inplace or functorch_active() or forward_ad._current_level >= 0)
        and is_grad_enabled()
        and not (is_compiling() or modes())
    ):
        return recorded(x, forward, layers.get(layers.key_of(name, arguments) if arguments else name), False)[0]
    if recording(x):
        y: Tensor = handle_torch_function(of_key, (x,), x, layers.key_of(name, arguments), inplace)
        return y
    checked(name, x)
    if type(x) is not Tensor and is_split(x):
        return _apply_locally(name, x, forward, arguments, inplace)
    if into_graph():
        return operators.inverted(x, forward, name, arguments, inplace)
    return tracked(x, forward, layers.get(layers.key_of(name, arguments)), inplace) if wants_gradient(x) else forward(x)


def of_key(input: Tensor, key: str, inplace: bool = False) -> Tensor:  # noqa: A002
    """The layer of a key of `invref.layers`, by which graphs of torch.fx call it; FormulaError for an unknown one."""
    name, arguments = layers.of(key)
    if is_compiling():
        return operators.inverted(input, None, name, arguments, inplace)
    if layers.is_formula(key):
        activation: Forward = importlib.import_module("invref.custom").activation(key)
        y = activation(input)
        return input.copy_(y) if inplace else y
    forward = layers.get(key).forward
    return _apply(name, input, partial(_overwritten, forward) if inplace else forward, arguments, inplace)


def _overwritten(forward: Forward, x: Tensor) -> Tensor:
    return x.copy_(forward(x))


def _apply_locally(name: str, x: Tensor, forward: Forward, arguments: tuple[float, ...], inplace: bool) -> Tensor:
    def local(part: Tensor) -> Tensor:
        return _apply(name, part.clone() if inplace else part, forward, arguments, inplace)

    y = locally(name, local, x, inplace=inplace)
    # A part written in place would be another tensor to autograd than the whole is.
    return x.copy_(y) if inplace else y


# Smooth gates, with one turning point: one side bit.


def gelu(input: Tensor, approximate: str = "none") -> Tensor:  # noqa: A002
    """GELU, x * Phi(x) ("none") or its tanh form ("tanh"); FormulaError for another `approximate`.

    Source: D. Hendrycks and K. Gimpel, arXiv 1606.08415.
    """
    if approximate == "none":
        return _apply("gelu", input, own.gelu)
    if approximate == "tanh":
        return _apply("gelu_tanh", input, native.gelu_tanh)
    raise FormulaError(f"approximate={approximate!r} is unknown: use 'none' or 'tanh'")


def silu(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """SiLU or swish, x * sigmoid(x). Source: S. Elfwing, E. Uchibe and K. Doya, arXiv 1702.03118."""
    return _apply("silu", input, partial(own.silu, inplace=True) if inplace else own.silu, (), inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """Mish, x * tanh(softplus(x)). Source: D. Misra, arXiv 1908.08681."""
    return _apply("mish", input, partial(own.mish, inplace=True) if inplace else own.mish, (), inplace)


def quick_gelu(input: Tensor) -> Tensor:  # noqa: A002
    """x * sigmoid(1.702 x), transformers' `quick_gelu`. Source: D. Hendrycks and K. Gimpel, arXiv 1606.08415."""
    return _apply("quick_gelu", input, native.quick_gelu)


def gelu_new(input: Tensor) -> Tensor:  # noqa: A002
    """The tanh form of GELU composed of single operations, transformers' `gelu_new`: another rounding than `gelu`.

    Source: D. Hendrycks and K. Gimpel, arXiv 1606.08415.
    """
    return _apply("gelu_new", input, native.gelu_new)


def gelu_fast(input: Tensor) -> Tensor:  # noqa: A002
    """The tanh form of GELU with sqrt(2 / pi) rounded to 0.7978845608, transformers' `gelu_fast`.

    Source: D. Hendrycks and K. Gimpel, arXiv 1606.08415.
    """
    return _apply("gelu_fast", input, native.gelu_fast)


def gelu_10(input: Tensor, min: float = -10.0, max: float = 10.0) -> Tensor:  # noqa: A002
    """GELU clipped to [min, max], transformers' `gelu_10`.

    FormulaError for NaN, and for a min above -0.17 or a max below 9, where an output does not tell whether it was
    clipped.
    Source: H. Wu, P. Judd, X. Zhang, M. Isaev and P. Micikevicius, arXiv 2004.09602.
    """
    return _apply("gelu_10", input, partial(native.gelu_10, min=min, max=max), (min, max))


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """Hard swish, x * relu6(x + 3) / 6. Source: A. Howard et al., arXiv 1905.02244."""
    return _apply("hardswish", input, partial(own.hardswish, inplace=inplace), (), inplace)


# Exponential units: no side bit, unless alpha is below 0.


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:  # noqa: A002
    """ELU, x above 0 and alpha * (exp(x) - 1) below; one side bit where alpha is below 0.

    The gradient is y + alpha, whose error grows with |alpha|: FormulaError for an |alpha| above 1024, infinite or NaN.
    Source: D. Clevert, T. Unterthiner and S. Hochreiter, arXiv 1511.07289.
    """
    return _apply("elu", input, partial(own.elu, alpha=alpha, inplace=inplace), (alpha,), inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """SELU. Source: G. Klambauer, T. Unterthiner, A. Mayr and S. Hochreiter, arXiv 1706.02515."""
    return _apply("selu", input, partial(own.selu, inplace=inplace), (), inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:  # noqa: A002
    """CELU, x above 0 and alpha * (exp(x / alpha) - 1) below; FormulaError for alpha = 0, infinite or NaN.

    Source: J. T. Barron, arXiv 1704.07483.
    """
    return _apply("celu", input, partial(own.celu, alpha=alpha, inplace=inplace), (alpha,), inplace)


# Monotone and smooth: no side bit.


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:  # noqa: A002
    """Softplus, log(1 + exp(beta * x)) / beta, and x where beta * x is above the threshold.

    One side bit for a threshold below 20, where outputs of both parts coincide; FormulaError for a beta that is 0,
    infinite or NaN.
    Source: C. Dugas, Y. Bengio, F. Belisle, C. Nadeau and R. Garcia, NIPS 2000.
    """
    return _apply("softplus", input, partial(own.softplus, beta=beta, threshold=threshold), (beta, threshold))


def sqrtsoftplus(input: Tensor) -> Tensor:  # noqa: A002
    """The square root of softplus, transformers' `sqrtsoftplus`, with which a router scores its experts."""
    return _apply("sqrtsoftplus", input, native.sqrtsoftplus)


def softsign(input: Tensor) -> Tensor:  # noqa: A002
    """Softsign, x / (1 + |x|). Source: J. Turian, J. Bergstra and Y. Bengio, NAACL 2009."""
    return _apply("softsign", input, own.softsign)


def logsigmoid(input: Tensor) -> Tensor:  # noqa: A002
    """The logarithm of the logistic sigmoid, log(1 / (1 + exp(-x)))."""
    return _apply("logsigmoid", input, own.logsigmoid)


def tanhshrink(input: Tensor) -> Tensor:  # noqa: A002
    """x - tanh(x), flat at 0."""
    return _apply("tanhshrink", input, own.tanhshrink)


def laplace(input: Tensor, mu: float = 0.707107, sigma: float = 0.282095) -> Tensor:  # noqa: A002
    """The normal distribution function of mean mu and deviation sigma, transformers' `laplace`.

    FormulaError for sigma = 0 and for infinite parameters or NaN. Source: X. Ma et al., arXiv 2209.10655.
    """
    return _apply("laplace", input, partial(native.laplace, mu=mu, sigma=sigma), (mu, sigma))


def relu2(input: Tensor) -> Tensor:  # noqa: A002
    """The square of relu, transformers' `relu2`; one side bit in float16, where small squares underflow.

    Source: D. So et al., arXiv 2109.08668.
    """
    return _apply("relu2", input, native.relu2)


# Derivatives of few values: no side bit where the output tells them, else one bit and no output.


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:  # noqa: A002
    """x above 0 and negative_slope * x below; a slope below 0 keeps one bit an element instead of the output.

    Source: A. Maas, A. Hannun and A. Ng, ICML 2013 workshop on deep learning for audio, speech and language.
    """
    forward = partial(own.leaky_relu, negative_slope=negative_slope, inplace=inplace)
    return _apply("leaky_relu", input, forward, (negative_slope,), inplace)


def hardtanh(
    input: Tensor,  # noqa: A002
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    """x clipped to [min_val, max_val], with gradient 0 at the bounds; bounds between 16-bit numbers take one bit.

    Source: R. Collobert, PhD thesis, Universite Paris 6, 2004.
    """
    forward = partial(own.hardtanh, min_val=min_val, max_val=max_val, inplace=inplace)
    return _apply("hardtanh", input, forward, (min_val, max_val), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """x clipped to [0, 6]. Source: A. Krizhevsky, Convolutional deep belief networks on CIFAR-10, 2010."""
    return _apply("relu6", input, partial(own.relu6, inplace=inplace), (), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """relu6(x + 3) / 6; keeps one bit an element instead of the output. Source: A. Howard et al., arXiv 1905.02244."""
    forward = partial(own.hardsigmoid, inplace=inplace)
    return _apply("hardsigmoid", input, forward, (), inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:  # noqa: A002
    """x outside [-lambd, lambd], 0 inside; FormulaError for NaN, with which torch's vector and scalar code differ.

    Source: D. L. Donoho and I. M. Johnstone, Biometrika 81, 1994.
    """
    return _apply("hardshrink", input, partial(own.hardshrink, lambd=lambd), (lambd,))


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:  # noqa: A002
    """x brought nearer to 0 by lambd, 0 inside [-lambd, lambd]; FormulaError for a lambd below 0.

    Source: D. L. Donoho, IEEE Transactions on Information Theory 41, 1995.
    """
    return _apply("softshrink", input, partial(own.softshrink, lambd=lambd), (lambd,))


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:  # noqa: A002
    """x above the threshold, `value` elsewhere; a value above it, or NaN, keeps a bit an element and no output."""
    forward = partial(own.threshold, threshold=threshold, value=value, inplace=inplace)
    return _apply("threshold", input, forward, (threshold, value), inplace)
