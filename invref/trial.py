"""Whether a module computes what a class of ours computes in its place, found out by trying both on the same numbers.

Guarantees that outputs are compared bit for bit, for every number of the 16-bit formats and on a grid with landmarks in
float32 and float64, and gradients, those of parameters too, up to rounding; and that a copy is tried, on the CPU: the
module, its parameters and the random numbers stay as they are, and no hook runs. Must not know types of modules.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from invref.formats import BY_DTYPE

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
"""The formats in which a module is tried; gradients are compared in float32 and float64."""
PATTERNS = 1 << 15
"""Of numbers of either sign in a 16-bit format: as many as torch works on in one thread."""

Call = Callable[..., Tensor]


def untried(module: nn.Module) -> str:
    """Why a module cannot be tried; empty where it can."""
    if "forward" in vars(module):
        placed = "_hf_hook" in vars(module)
        return "its forward was replaced on the instance: " + (
            "convert before accelerate places the model" if placed else "delete that, or leave it native"
        )
    if getattr(module, "_xielu_cuda_obj", None) is not None:
        return "it calls a CUDA kernel of its own, from the package xielu"
    held = [*module.parameters(), *module.buffers()]
    if any(p.is_meta for p in held):
        return "its parameters have no numbers yet: convert once they do"
    if any(p.layout != torch.strided or type(p.data) is not Tensor for p in held):
        return "its parameters are split over processes, or no plain tensors: convert before wrapping the model"
    return ""


def differs(module: nn.Module, made: type[nn.Module], name: str) -> str:
    """How a module differs from our class in its place; empty where it does not."""
    with _undisturbed():
        for dtype in DTYPES:
            mine = copied(module, dtype)
            why = _outputs_differ(dtype, mine, made)
            if not why and dtype not in HALVES:
                why = _gradients_differ(dtype, mine, made)
            if why:
                return f"does not compute {name}: {why}"
    return ""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Undoes what contexts of the user change about tensors, and gives random numbers back at the end."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch._C.DisableTorchFunction(),
    ):
        yield


def copied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module with the same attributes, its parameters and buffers copied to the CPU in `dtype`."""
    kind = type(module)
    made: nn.Module = kind.__new__(kind)
    state = {name: copy.copy(v) if isinstance(v, dict | list | set) else v for name, v in vars(module).items()}
    state["_parameters"] = {name: _copy(p, dtype) for name, p in module._parameters.items()}
    state["_buffers"] = {name: _copy(b, dtype) for name, b in module._buffers.items()}
    vars(made).update(state)
    return made


def _copy(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    made = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
    return nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made


def landmarks(module: nn.Module) -> Tensor:
    """Where a module may change its formula: the numbers among its arguments, their ratios, and usual places: (n,)."""
    numbers = [float(v) for v in vars(module).values() if isinstance(v, int | float) and math.isfinite(v)]
    ratios = [a / b for a, b in itertools.permutations(numbers, 2) if b]
    usual = [0.0, 0.5, 1.0, 3.0, 6.0, 10.0, 20.0, 0.7517916, 1.2784645, 1.1924489]
    marks = torch.tensor([*numbers, *ratios, *usual], dtype=torch.float64, device="cpu")
    return torch.cat([marks, -marks])


def evenly() -> Tensor:
    """Inputs at which gradients are compared: (n,)."""
    return torch.linspace(-14, 14, 2241, dtype=torch.float64, device="cpu") + 0.0031415927


def grids(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs at which outputs are compared: every number of a 16-bit format, else landmarks with neighbours: (n,)."""
    if dtype in HALVES:
        numbers = torch.arange(PATTERNS, dtype=torch.int16, device="cpu")
        return numbers.view(dtype), (numbers - PATTERNS).view(dtype)
    marks = landmarks(module).to(dtype)
    infinite = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype, device="cpu")
    beside = [marks.nextafter(infinite[at]) for at in (0, 1)]
    sizes = torch.logspace(-38, 30, 69, dtype=torch.float64, device="cpu").to(dtype)
    return (torch.cat([evenly().to(dtype), marks, *beside, sizes, -sizes, infinite]),)


def _outputs_differ(dtype: torch.dtype, module: nn.Module, made: type[nn.Module]) -> str:
    for numbers in grids(module, dtype):
        x = _shaped(module, numbers)
        # Without a gradient to compute in 16-bit formats: the decoder's tables are not made for that.
        with torch.set_grad_enabled(dtype not in HALVES):
            (y, _), (y_ours, _) = (tried(forward, module, x) for forward in (type(module).forward, made.forward))
        if y.shape != y_ours.shape or y.dtype != y_ours.dtype:
            return f"its output is {y.dtype} {tuple(y.shape)} and not {y_ours.dtype} {tuple(y_ours.shape)}"
        same = (y == y_ours) & (y.signbit() == y_ours.signbit()) | (y.isnan() & y_ours.isnan())
        if not same.all():
            return _told(dtype, x, "output", y, y_ours, same)
    return ""


def _gradients_differ(dtype: torch.dtype, module: nn.Module, made: type[nn.Module]) -> str:
    # Far out torch's own gradients overflow to NaN, or underflow, where ours do not; at jumps each has its own idea.
    x = evenly()
    x = x[(x[:, None] - landmarks(module)).abs().amin(1) > 1e-4].to(dtype)
    x = _shaped(module, x)
    (_, gradients), (_, gradients_ours) = (tried(f, module, x, True) for f in (type(module).forward, made.forward))
    bound = bound_of(module, dtype)
    dx, dx_ours = gradients[0].double(), gradients_ours[0].double()
    same = (dx - dx_ours).abs() <= bound * dx.abs().clamp(min=1)
    if not same.all():
        return _told(dtype, x, "gradient", dx, dx_ours, same)
    for theirs, made_ours in zip(gradients[1:], gradients_ours[1:], strict=True):
        # Sums over all inputs of terms that grow as x^2 at most.
        if not bool(((theirs - made_ours).abs() <= bound * float((1 + x * x).sum())).all()):
            return f"the gradients of its parameters are {theirs.tolist()} and not {made_ours.tolist()}"
    return ""


def bound_of(module: nn.Module, dtype: torch.dtype) -> float:
    """How far gradients may be apart, relative to those above 1: sqrt(eps / 2), 2^-12 in float32, and 2^-22.

    Near a turning point, y = y* + f'' (x - x*)^2 / 2, an output that is off by one unit in its last place, at most
    eps / 4 for |y*| < 1/2, hides a gradient of sqrt(2 |f''| eps / 4). With |f''| <= 1 this is the bound; f'' of layers
    with arguments grows as the largest of them. Elsewhere errors are of the size of eps. The largest found over all
    inputs is 1.4e-4 in float32 (reports/gradient.json). Some of torch's kernels multiply by up to three constants that
    they hold in float32 even for float64 tensors: 3 * 2^-24 < 2^-22.
    """
    held = [float(p.detach().abs().max()) for p in module.parameters()]
    numbers = [abs(v) for v in vars(module).values() if isinstance(v, int | float)]
    return math.sqrt(torch.finfo(dtype).eps / 2) * max(1.0, *held, *numbers) + 2**-22


def _told(dtype: torch.dtype, x: Tensor, what: str, values: Tensor, values_ours: Tensor, same: Tensor) -> str:
    at = (~same).flatten().nonzero()[0]
    found, wanted, place = (float(t.flatten()[at]) for t in (values, values_ours, x.expand_as(values)))
    where = f"at x = {place:g}" + ("" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}")
    return f"{where} its {what} is {found:.9g} and not {wanted:.9g}"


def _shaped(module: nn.Module, x: Tensor) -> Tensor:
    """x as the module takes it: channels are axis 1 of PReLU's."""
    channels = module.weight.numel() if isinstance(module, nn.PReLU) else 1
    return x if channels == 1 else x[:, None].repeat(1, channels)


def tried(forward: Call, module: nn.Module, x: Tensor, backward: bool = False) -> tuple[Tensor, list[Tensor]]:
    """y, and with `backward` the gradients by x and by the parameters, of a module that may be spoilt for it."""
    leaf = x.clone().requires_grad_()
    y = forward(module, leaf * 1)
    if not backward:
        return y.detach(), []
    # Incoming gradients of several sizes and signs, all powers of two: nothing is rounded by them.
    dy = torch.tensor([1.0, -0.5, 2.0], dtype=y.dtype, device="cpu").repeat(len(x) // 3 + 1)[: len(x)]
    dy = dy.view(-1, *[1] * (y.dim() - 1)).expand_as(y)
    dx, *others = torch.autograd.grad(y, [leaf, *module.parameters()], dy, materialize_grads=True)
    return y.detach(), [dx / dy, *others]


def bits_kept(module: nn.Module, made: type[nn.Module], dtype: torch.dtype) -> int | None:
    """Bits per element that our class keeps beside the output or instead of it, in a dtype."""
    if dtype not in BY_DTYPE:
        return None
    x = _shaped(module, torch.linspace(-4, 4, 1 << 13, dtype=torch.float64, device="cpu").to(dtype))
    packed: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            packed.append(tensor.numel())
        return tensor.detach()

    with _undisturbed(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tried(made.forward, copied(module, dtype), x)
    return round(8 * sum(packed) / x.numel())
