"""What torch does to a function, done to every layer: one check for each transform and layer.

A check runs the transform and compares with the formula's own derivatives in float64, or bit for bit with what the
layer gives without the transform. It returns a verdict, and fails where a value is wrong: an error that says what is
not there is a verdict, a wrong value never is. Must not know how a layer does it.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import invref
from invref import layers
from invref.catalogue import ROWS
from invref.decoding import decode
from invref.engines import TORCH
from invref.errors import InvrefError
from invref.formats import BY_DTYPE
from invref.formulas import Formula

HOLDS, ERROR, THEIRS, ABSENT, NOT_RUN = "holds", "loud error", "torch's own too", "torch has none", "not run here"
ROUNDING = "but for float64, to 1e-15"
FORMULA = "x*erf(log(1+exp(x)))"
DTYPES = tuple(BY_DTYPE)
CLOSE = 1e-8
"""Float64 derivatives agree to sqrt(2^-53), about 1e-8, where the output has lost half the digits of the input: at a
turning point. Elsewhere to a few units of the last place."""
BACKEND = "aot_eager"
"""Traces forward and backward into graphs and runs them as they are: no compiler."""

Function = Callable[[Tensor], Tensor]


class WrongError(AssertionError):
    """A transform gave a wrong value."""


@dataclass(frozen=True, eq=False)
class Case:
    """A layer with its default arguments, torch's own beside it, and the formula with which both are compared."""

    name: str
    layer: Function
    native: Function
    formula: Formula
    module: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module] | None
    key: str | None

    def slope(self, x: Tensor, order: int = 1) -> Tensor:
        """The formula's derivative of that order, in float64."""
        return torch.as_tensor(self.formula.evaluate(x, TORCH, order), dtype=torch.float64).expand(x.shape)

    @property
    def inplace(self) -> Callable[..., Tensor] | None:
        """The layer, if it can overwrite its input because torch's can."""
        try:
            return self.layer if "inplace" in inspect.signature(self.layer).parameters else None
        except ValueError:
            return None  # torch's own, which has other functions for that.

    @cached_property
    def points(self) -> Tensor:
        """Twelve inputs, none at a break or turning point."""
        return torch.linspace(-4.0301, 4.0709, 12, dtype=torch.float64)


@cache
def case(name: str) -> Case:
    """A row of the catalogue, or the formula that stands for all others."""
    if name == "from_formula":
        made = invref.from_formula(FORMULA)
        # Its forward is its own: torch has none to compare it with.
        return Case(name, made, made, made.formula, made.module, None, made.key)
    row = ROWS[name]
    text = row.module if "(" in row.module else f"{row.module}()"

    def module() -> nn.Module:
        made: nn.Module = eval(f"invref.{text}", {"invref": invref})
        return made.float()

    theirs = (lambda: eval(f"nn.{text}", {"nn": nn})) if row.origin == "torch" else None
    return Case(name, row.layer, row.native, row.formula, module, theirs, row.key)


NAMES = (*ROWS, "from_formula")


def same(what: str, got: Tensor, expected: Tensor) -> None:
    """WrongError unless two tensors have equal bits, NaN of any kind counting as equal."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise WrongError(f"{what}: {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}")
    if not torch.equal(got.nan_to_num(0.5), expected.nan_to_num(0.5)) or not torch.equal(got.isnan(), expected.isnan()):
        raise WrongError(f"{what}: other bits, by up to {float((got - expected).abs().max()):.3g}")


def close(what: str, got: Tensor, expected: Tensor) -> None:
    """WrongError unless two float64 tensors agree as derivatives from an output can."""
    got, expected = got.detach(), expected.detach()
    if not torch.allclose(got, expected, rtol=10 * CLOSE, atol=CLOSE):
        raise WrongError(f"{what}: {float((got - expected).abs().max()):.3g} off")


LEARNT = ("prelu", "xielu")
"""Those that are torch's own computation in graphs and under transforms."""


def alike(this: Case, what: str, got: Tensor, expected: Tensor) -> None:
    """`same`; where one is torch's own gradient and the other decoded, to twice the error floor of its format.

    That is sqrt(2 f'' ulp(y*)) at the turning point, where f'' < 1 and |y*| < 1/4: half an ulp of y* is eps / 16.
    """
    if this.name not in LEARNT:
        same(what, got, expected)
    elif not torch.allclose(got, expected, rtol=4 * torch.finfo(got.dtype).eps, atol=torch.finfo(got.dtype).eps ** 0.5):
        raise WrongError(f"{what}: {float((got - expected).abs().max()):.3g} off")


def gradient(f: Callable[[Tensor], Any], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx in eager mode."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = f(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def _inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (2 * x).to(dtype), dy.to(dtype)


# Compiled and exported


@contextmanager
def _fresh() -> Iterator[None]:
    """Compiles from scratch, and says nothing about what is not optimised."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def _compiled(this: Case, dynamic: bool) -> str:
    shapes = [(6, 10), (4, 3, 2, 5)] if not dynamic else [(6, 10), (5, 7), (9, 4), (4, 3, 2, 5)]
    with _fresh():
        compiled = torch.compile(this.layer, fullgraph=True, dynamic=dynamic, backend=BACKEND)
        for shape in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                x, dy = _inputs(dtype, *shape)
                if len(shape) == 4:
                    x = x.to(memory_format=torch.channels_last)
                (y, dx), (y_eager, dx_eager) = gradient(compiled, x, dy), gradient(this.layer, x, dy)
                same("output", y, y_eager)
                if y.stride() != x.stride():
                    raise WrongError("another layout than that of x")
                alike(this, "gradient", dx, dx_eager)
    return HOLDS


def compile_static(this: Case) -> str:
    """torch.compile(fullgraph=True, dynamic=False): outputs and gradients have eager mode's bits."""
    return _compiled(this, dynamic=False)


def compile_dynamic(this: Case) -> str:
    """The same with dynamic=True, over several shapes and layouts."""
    return _compiled(this, dynamic=True)


def export(this: Case) -> str:
    """torch.export, strict and not: the program, saved and loaded, gives the module's outputs and gradients."""
    module = this.module()
    for strict in (True, False):
        with _fresh():
            inner = nn.Sequential(nn.Linear(5, 4), module, nn.Linear(4, 3))
            x, dy = _inputs(torch.float32, 6, 5)[0], _inputs(torch.float32, 6, 3)[1]
            rows = torch.export.Dim("rows")
            program = torch.export.export(inner, (x[:3],), dynamic_shapes=({0: rows},), strict=strict)
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            buffer.seek(0)
            loaded = torch.export.load(buffer).module()
            (y, dx), (y_eager, dx_eager) = gradient(loaded, x, dy), gradient(inner, x, dy)
            same("output", y, y_eager)
            alike(this, "gradient", dx, dx_eager)
    return HOLDS


def graph_module(this: Case) -> str:
    """torch.fx.symbolic_trace: the graph, in a pickle, copied and traced again, is the layer; bit for bit."""
    inner = nn.Sequential(nn.Linear(5, 4), _Called(this.layer) if this.name not in LEARNT else this.module())
    inner.append(this.module())
    x, dy = _inputs(torch.float32, 6, 5)[0], _inputs(torch.float32, 6, 4)[1]
    expected = gradient(inner, x, dy)
    traced = torch.fx.symbolic_trace(inner)
    for other in (traced, pickle.loads(pickle.dumps(traced)), torch.fx.symbolic_trace(copy.deepcopy(traced))):
        for got, wanted in zip(gradient(other, x, dy), expected, strict=True):
            same("traced", got, wanted)
    return HOLDS


class _Called(nn.Module):
    """A layer that is called as a function."""

    def __init__(self, layer: Function) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer of x."""
        return self._layer(x)


def autocast(this: Case) -> str:
    """torch.autocast on the CPU: the dtype and bits of torch's layer, and the gradient of the tensor that it saw."""
    for narrow in (torch.bfloat16, torch.float16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, dy = _inputs(dtype, 50, 3)
            with torch.autocast("cpu", dtype=narrow):
                y = this.layer(x)
                expected = this.native(x)
                leaf = x.clone().requires_grad_()
                tracked = this.layer(leaf)
            same("output", y, expected)
            same("output with a gradient", tracked.detach(), expected)
            seen = tracked.dtype
            (dx,) = torch.autograd.grad(tracked, leaf, dy.to(seen))
            same("gradient", dx, gradient(this.layer, x.to(seen), dy.to(seen))[1].to(dtype))
    for dtype in DTYPES:
        x, dy = _inputs(dtype, 50, 3)
        leaf = x.clone().requires_grad_()
        y = this.layer(leaf)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (dx,) = torch.autograd.grad(y, leaf, dy)
        same("backward under autocast", dx, gradient(this.layer, x, dy)[1])
    return HOLDS


# torch.func


def vmap_(this: Case) -> str:
    """vmap over every axis, twice nested, and random places for the result's axis."""
    x = torch.stack([this.points, this.points.flip(0)]).view(2, 3, 4)
    expected = this.layer(x)
    for axis in (0, 1, 2):
        for out in (0, 1, 2):
            got = vmap(this.layer, in_dims=axis, out_dims=out)(x)
            close("output", got.movedim(out, axis), expected)
    close("nested", vmap(vmap(this.layer, in_dims=1, out_dims=1), in_dims=1, out_dims=1)(x), expected)
    return HOLDS


def grad_(this: Case) -> str:
    """torch.func.grad, of the layer and through vmap."""
    x = this.points
    close("grad", grad(lambda v: this.layer(v).sum())(x), this.slope(x))
    squares = grad(lambda v: this.layer(v).square().sum())
    close("with a chain", squares(x), 2 * this.slope(x, 0) * this.slope(x))
    batch = x.view(3, 4)
    through = grad(lambda v: vmap(this.layer, in_dims=1)(v).sum())
    close("through vmap", through(batch), this.slope(batch))
    return HOLDS


def per_sample(this: Case) -> str:
    """vmap of grad, in every format: where the outputs have the same bits, so have the gradients."""
    for dtype in DTYPES:
        x, _ = _inputs(dtype, 5, 37)
        y, dx = gradient(this.layer, x, torch.ones_like(x))
        for axis in (0, 1):
            got = vmap(grad(lambda v: this.layer(v).sum()), in_dims=axis, out_dims=axis)(x)
            known = vmap(this.layer, in_dims=axis, out_dims=axis)(x) == y
            alike(this, "gradient of a sample", got[known], dx[known])
    return HOLDS


def vjp_(this: Case) -> str:
    """torch.func.vjp, its result called twice."""
    x, dy = this.points, this.points.flip(0)
    y, back = vjp(this.layer, x)[:2]
    close("output", y, this.slope(x, 0))
    for _ in range(2):
        close("gradient", back(dy)[0], dy * this.slope(x))
    return HOLDS


def jvp_(this: Case) -> str:
    """torch.func.jvp, alone and through vmap."""
    x, tangent = this.points, this.points.flip(0)
    y, dy = jvp(this.layer, (x,), (tangent,))[:2]
    close("output", y, this.slope(x, 0))
    close("tangent", dy, tangent * this.slope(x))
    several = vmap(lambda t: jvp(this.layer, (x,), (t,))[1])(torch.stack([tangent, x]))
    close("tangents", several, torch.stack([tangent, x]) * this.slope(x))
    return HOLDS


def jacobian(this: Case) -> str:
    """jacrev and jacfwd, alone and under vmap."""
    x = this.points
    expected = torch.diag(this.slope(x))
    batch = x.view(4, 3)
    for transform in (jacrev, jacfwd):
        close(transform.__name__, transform(this.layer)(x), expected)
        close(f"vmap of {transform.__name__}", vmap(transform(this.layer))(batch), torch.diag_embed(this.slope(batch)))
    return HOLDS


def hessian_(this: Case) -> str:
    """hessian, both orders of jacrev and jacfwd, jacrev twice, and under vmap."""
    x = this.points

    def of(v: Tensor) -> Tensor:
        return this.layer(v).square().sum()

    def expected(v: Tensor) -> Tensor:
        return torch.diag_embed(2 * (this.slope(v).square() + this.slope(v, 0) * this.slope(v, 2)))

    close("hessian", hessian(of)(x), expected(x))
    close("jacrev of jacrev", jacrev(jacrev(of))(x), expected(x))
    close("jacrev of jacfwd", jacrev(jacfwd(of))(x), expected(x))
    batch = x.view(3, 4)
    close("vmap of hessian", vmap(hessian(of))(batch), expected(batch))
    return HOLDS


# Autograd


def forward_mode(this: Case) -> str:
    """torch.autograd.forward_ad, with and without a gradient to compute as well, and the tangent of a gradient."""
    x, tangent = this.points, this.points.flip(0)
    for tracked in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(tracked), tangent)
            close("tangent", forward_ad.unpack_dual(this.layer(dual)).tangent, tangent * this.slope(x))
    with forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        dual = forward_ad.make_dual(leaf, tangent)
        (dx,) = torch.autograd.grad(this.layer(dual).square().sum(), dual, create_graph=True)
        second = 2 * (this.slope(x).square() + this.slope(x, 0) * this.slope(x, 2))
        close("tangent of the gradient", forward_ad.unpack_dual(dx).tangent, tangent * second)
    return HOLDS


def double_backward(this: Case) -> str:
    """gradgradcheck in float64, and a gradient penalty against the formula's second derivative."""
    x = this.points.clone().requires_grad_()
    if not torch.autograd.gradcheck(this.layer, (x,)) or not torch.autograd.gradgradcheck(this.layer, (x,)):
        raise WrongError("gradgradcheck")
    (dx,) = torch.autograd.grad(this.layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    f, f1, f2 = (this.slope(this.points, order) for order in range(3))
    close("penalty", second, 2 * (2 * f * f1) * 2 * (f1.square() + f * f2))
    return HOLDS


def _checkpointed(this: Case, reentrant: bool) -> str:
    for dtype in DTYPES:
        x, dy = _inputs(dtype, 9, 70)
        expected = gradient(this.layer, x, dy)
        leaf = x.clone().requires_grad_()
        y = checkpoint(this.layer, leaf, use_reentrant=reentrant)
        y.backward(dy)
        assert leaf.grad is not None
        same("output", y.detach(), expected[0])
        same("gradient", leaf.grad, expected[1])
    return HOLDS


def checkpoint_(this: Case) -> str:
    """Activation checkpointing, not re-entrant."""
    return _checkpointed(this, reentrant=False)


def checkpoint_reentrant(this: Case) -> str:
    """Activation checkpointing, re-entrant."""
    return _checkpointed(this, reentrant=True)


def saved_hooks(this: Case) -> str:
    """saved_tensors_hooks: save_on_cpu, and copies of another layout, leave the gradient as it is."""
    for dtype in DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x, dy = _inputs(dtype, 3, 4, 5, 6)
            x = x.to(memory_format=layout)
            expected = gradient(this.layer, x, dy)[1]
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t)
            for context in (torch.autograd.graph.save_on_cpu(), hooks):
                with context:
                    same("gradient", gradient(this.layer, x, dy)[1], expected)
    return HOLDS


def cuda_graphs(this: Case) -> str:
    """Forward and backward captured as CUDA graphs and replayed on other numbers."""
    if not torch.cuda.is_available():
        return NOT_RUN
    for dtype in DTYPES:
        x, dy = (t.cuda() for t in _inputs(dtype, 40, 70))
        gradient(this.layer, x, dy)
        graphed = torch.cuda.make_graphed_callables(this.layer, (torch.zeros_like(x).requires_grad_(),))
        for got, expected in zip(gradient(graphed, x, dy), gradient(this.layer, x, dy), strict=True):
            same("replayed", got, expected)
    return HOLDS


# Bits


def deterministic(this: Case) -> str:
    """Run to run, with one to three threads, and under deterministic algorithms: the same bits for the same y."""
    threads = torch.get_num_threads()
    for dtype in DTYPES:
        n = 300_001 if dtype.itemsize < 8 else 70_001
        x, dy = _inputs(dtype, n)
        x.requires_grad_()
        y = this.layer(x)

        def back(y: Tensor = y, x: Tensor = x, dy: Tensor = dy) -> Tensor:
            return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

        first = back()
        same("again", back(), first)
        same("another call", gradient(this.layer, x, dy)[1], first)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                same(f"{count} threads", back(), first)
            torch.use_deterministic_algorithms(True)
            same("deterministic algorithms", back(), first)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(threads)
    return HOLDS


def placed(this: Case) -> str:
    """Wherever an element stands, however the tensor is aligned and strided: for the same x, y and dy the same dx."""
    exact = True
    for dtype in DTYPES:
        x, dy = _inputs(dtype, 3_000)
        y, dx = gradient(this.layer, x, dy)
        for start, stop, step in ((1, 3000, 1), (3, 1500, 1), (0, 3000, 3), (7, 2999, 2), (5, 12, 1), (2900, 2901, 1)):
            part = slice(start, stop, step)
            if this.key is None:
                # torch's own gradient, or a learnt layer's: compared where its forward has given the same output.
                y_part, dx_part = gradient(this.layer, x[part], dy[part])
                known = y_part == y[part]
            else:
                layer = layers.get(this.key)
                packed = layer.scheme(dtype, x.device).pack(x[part].contiguous())
                dx_part = decode(dy[part], y[part], packed, layer.scheme, None)
                known = torch.ones_like(dx_part, dtype=torch.bool)
            if dtype == torch.float64 and not torch.equal(dx_part[known], dx[part][known]):
                exact = False
                if not torch.allclose(dx_part[known], dx[part][known], rtol=1e-15, atol=1e-15):
                    raise WrongError("float64 differs by more than a few units of the last place")
            else:
                same(f"{dtype} {start}:{stop}:{step}", dx_part[known], dx[part][known])
    return HOLDS if exact else ROUNDING


# Modules


def modules(this: Case) -> str:
    """pickle and deepcopy give the same module; its state and repr are torch's, with which it swaps states."""
    module = this.module()
    x, dy = _inputs(torch.float32, 7, 9)
    expected = gradient(module, x, dy)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    for other in copies:
        for got, wanted in zip(gradient(other, x, dy), expected, strict=True):
            same("copy", got, wanted)
    if this.theirs is not None:
        theirs = this.theirs()
        if repr(module) != repr(theirs) or list(module.state_dict()) != list(theirs.state_dict()):
            raise WrongError(f"another repr or state than {theirs!r}")
        theirs.load_state_dict(module.state_dict())
        module.load_state_dict(theirs.state_dict())
    return HOLDS


def inplace(this: Case) -> str:
    """inplace=True overwrites x; the gradient has the same bits, under vmap, grad and compile too."""
    call = this.inplace
    if call is None:
        return ABSENT

    def overwriting(v: Tensor) -> Tensor:
        buffer = v * 1
        y = call(buffer, inplace=True)
        if not torch.compiler.is_compiling() and buffer is not y and not torch.equal(buffer, y):
            raise WrongError("x was not overwritten")
        return y

    for dtype in DTYPES:
        x, dy = _inputs(dtype, 8, 70)
        expected = gradient(this.layer, x, dy)
        for got, wanted in zip(gradient(overwriting, x, dy), expected, strict=True):
            same("in place", got, wanted)
    x = this.points
    close("grad", grad(lambda v: overwriting(v).sum())(x), this.slope(x))
    close("vmap of grad", vmap(grad(lambda v: call(v * 1, inplace=True).sum()))(x.view(3, 4)).view(-1), this.slope(x))
    close("jvp", jvp(lambda v: call(v * 1, inplace=True), (x,), (x,))[1], x * this.slope(x))
    with _fresh():
        compiled = torch.compile(overwriting, fullgraph=True, backend=BACKEND)
        close("compiled", gradient(compiled, x, torch.ones_like(x))[1], this.slope(x))
    return HOLDS


@dataclass(frozen=True)
class Cell:
    """A column of the matrix: its title and its check, which returns a verdict or raises."""

    title: str
    check: Callable[[Case], str]


CELLS = (
    Cell("compile", compile_static),
    Cell("compile, dynamic", compile_dynamic),
    Cell("export", export),
    Cell("torch.fx", graph_module),
    Cell("autocast (CPU)", autocast),
    Cell("vmap", vmap_),
    Cell("grad", grad_),
    Cell("vmap of grad", per_sample),
    Cell("vjp", vjp_),
    Cell("jvp", jvp_),
    Cell("jacobian", jacobian),
    Cell("hessian", hessian_),
    Cell("forward mode", forward_mode),
    Cell("double backward", double_backward),
    Cell("checkpoint", checkpoint_),
    Cell("checkpoint, re-entrant", checkpoint_reentrant),
    Cell("saved-tensor hooks", saved_hooks),
    Cell("CUDA graphs", cuda_graphs),
    Cell("deterministic", deterministic),
    Cell("any place", placed),
    Cell("modules", modules),
    Cell("in place", inplace),
)


def verdict(cell: Cell, this: Case) -> str:
    """What a check says of a layer; WrongError where a value is wrong.

    An error of ours that says what is not there is loud; an error of torch's own is "torch's own too" where its own
    layer, put through the same check, raises it as well.
    """
    try:
        return cell.check(this)
    except WrongError:
        raise
    except InvrefError:
        return ERROR
    except (RuntimeError, NotImplementedError) as error:
        theirs = Case(this.name, this.native, this.native, this.formula, this.theirs or this.module, None, None)
        try:
            cell.check(theirs)
        except WrongError:
            pass
        except (RuntimeError, NotImplementedError):
            return THEIRS
        raise WrongError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
