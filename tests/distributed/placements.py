"""Every layer on tensors split over two processes: the numbers of the whole tensor, placed as the input is."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from group import kept, processes, same, saves, tell
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn import functional as own

import invref
from invref import catalogue, functional
from invref.errors import InputError

MESHES = {
    (2,): [(Shard(0),), (Shard(1),), (Shard(-1),), (Replicate(),), (Partial(),)],
    (1, 2): [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Replicate(), Shard(1)), (Partial(), Shard(0))],
    (2, 1): [(Shard(1), Shard(0)), (Shard(0), Partial())],
}
SHAPES = ((6, 8), (5, 7), (1, 3), (0, 4), (3, 2, 5))

LAYERS = {name: row.layer for name, row in catalogue.ROWS.items() if not row.gain and name not in ("prelu", "xielu")}
"""Without torch's own, which have torch's own rules, and those with parameters."""
LAYERS["a formula"] = invref.from_formula("x*erf(log(1+exp(x)))")
EXACT = ("leaky_relu", "hardtanh", "hardshrink", "threshold")
"""Layers of which torch's vector and scalar code have the same bits, so that the whole has the parts'."""


def split(x: Tensor, mesh: object, placements: tuple[Placement, ...]) -> DTensor:
    """x split, its terms halved where the placement is a sum."""
    if not any(p.is_partial() for p in placements):
        return distribute_tensor(x, mesh, placements)
    whole = [Replicate() if p.is_partial() else p for p in placements]
    made = distribute_tensor(x, mesh, whole)
    count = 1
    for at, p in enumerate(placements):
        count *= mesh.size(at) if p.is_partial() else 1
    return DTensor.from_local(made.to_local() / count, mesh, placements, shape=x.shape, stride=x.stride())


def one_layer(name: str, x: Tensor, dy: Tensor, mesh: object, placements: tuple[Placement, ...]) -> None:
    """A part's numbers are those of that part alone: torch's own depend on where in a tensor an element is."""
    layer = LAYERS[name]
    part = split(x, mesh, placements).requires_grad_()
    wanted = tuple(Replicate() if p.is_partial() else p for p in part.placements)
    alone = part.detach().redistribute(placements=wanted).to_local().clone().requires_grad_()
    dy = distribute_tensor(dy, mesh, wanted)
    y_alone = layer(alone)
    y_alone.backward(dy.to_local())
    y = layer(part)
    assert isinstance(y, DTensor), name
    assert y.placements == wanted, (name, y.placements)
    like = own.relu(x)
    assert (y.shape, y.stride()) == (like.shape, like.stride()), (name, y.stride(), like.stride())
    what = f"{name} {tuple(x.shape)} {placements}"
    same(y.to_local().detach(), y_alone.detach(), f"{what}: output")
    if name in EXACT:
        same(y.full_tensor().detach(), layer(x), f"{what}: whole output")
    y.backward(dy)
    assert part.grad.placements == wanted, (what, part.grad.placements)
    same(part.grad.to_local(), alone.grad, f"{what}: gradient")
    with torch.no_grad():
        same(layer(part).to_local(), y_alone.detach(), f"{what}: without a gradient")


def layers() -> int:
    count = 0
    for shape, placements in MESHES.items():
        mesh = init_device_mesh("cpu", shape)
        cases = [*product((torch.float32,), SHAPES), (torch.bfloat16, (5, 7))]
        for name, (dtype, size), placement in product(LAYERS, cases, placements):
            torch.manual_seed(1)
            x, dy = torch.randn(size, dtype=dtype) * 3, torch.randn(size, dtype=dtype)
            one_layer(name, x, dy, mesh, placement)
            count += 1
    return count


def strides(mesh: object) -> None:
    x = torch.randn(6, 8).t()
    one_layer("gelu", x, torch.randn(6, 8).t(), mesh, (Shard(0),))
    one_layer("silu", torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last),
              torch.randn(2, 3, 4, 6), mesh, (Shard(1),))  # fmt: skip


def inplace(mesh: object) -> None:
    for placement in ((Shard(0),), (Replicate(),)):
        x, dy = torch.randn(5, 4), torch.randn(5, 4)
        whole = x.clone().requires_grad_()
        functional.silu(whole * 1, inplace=True).backward(dy)
        part = distribute_tensor(x, mesh, placement).requires_grad_()
        inner = part * 1
        y = functional.silu(inner, inplace=True)
        assert y is inner
        same(y.full_tensor(), own.silu(x), "in place")
        y.backward(distribute_tensor(dy, mesh, placement))
        same(part.grad.full_tensor(), whole.grad, "in place gradient")
    with pytest.raises(InputError, match="inplace=False"):
        functional.silu(split(torch.randn(4, 4), mesh, (Partial(),)), inplace=True)


def parameters(mesh: object) -> None:
    torch.manual_seed(2)
    for weights, placement, at in product((1, 7), ((Shard(0),), (Shard(1),), (Replicate(),)), (Replicate(), Shard(0))):
        x, dy = torch.randn(5, 7), torch.randn(5, 7)
        # Multiples of 2^-8 below 8, so that all their products and sums are exact.
        x, dy = ((256 * t).round().clamp(-2047, 2047) / 256 for t in (x, dy))
        w = 2.0 ** -torch.arange(weights) if weights > 1 else torch.tensor([0.5])
        whole, w_whole = x.clone().requires_grad_(), w.clone().requires_grad_()
        y_whole = own.prelu(whole, w_whole)
        y_whole.backward(dy)
        part = distribute_tensor(x, mesh, placement).requires_grad_()
        weight = distribute_tensor(w, mesh, (at,)).requires_grad_()
        y = functional.prelu(part, weight)
        same(y.full_tensor(), y_whole.detach(), "prelu")
        y.backward(distribute_tensor(dy, mesh, placement))
        same(part.grad.full_tensor(), whole.grad, "prelu gradient")
        same(weight.grad.full_tensor(), w_whole.grad, f"prelu weight {placement} {at}")
    with pytest.raises(InputError, match="distribute_module"):
        functional.prelu(part, w)
    with pytest.raises(InputError, match="distribute_module"):
        functional.prelu(x, weight)


def learnt_slopes(mesh: object) -> None:
    for placement in ((Shard(0),), (Shard(1),), (Replicate(),)):
        x, dy = torch.randn(5, 6), torch.randn(5, 6)
        raw = [torch.tensor([0.8]), torch.tensor([0.3])]
        whole, own_raw = x.clone().requires_grad_(), [r.clone().requires_grad_() for r in raw]
        y_whole = functional.xielu(whole, *own_raw)
        y_whole.backward(dy)
        part = distribute_tensor(x, mesh, placement).requires_grad_()
        placed = [distribute_tensor(r, mesh, (Replicate(),)).requires_grad_() for r in raw]
        # As distribute_module places buffers, too.
        beta = distribute_tensor(torch.tensor(0.5), mesh, (Replicate(),))
        y = functional.xielu(part, *placed, beta=beta)
        same(y.full_tensor(), y_whole.detach(), "xielu")
        y.backward(distribute_tensor(dy, mesh, placement))
        same(part.grad.full_tensor(), whole.grad, "xielu gradient")
        for found, wanted in zip(placed, own_raw, strict=True):
            # Sums of 30 terms below 8 in float64, rounded to float32; the parts' sums are rounded before they are
            # added, and their sum once more.
            error = float((found.grad.full_tensor() - wanted.grad).abs())
            assert error <= 4 * 2**-24 * 240, error


def saved_bytes(mesh: object) -> None:
    x = distribute_tensor(torch.randn(256, 512), mesh, (Shard(0),)).requires_grad_()
    weight = distribute_tensor(torch.randn(512, 8), mesh, (Replicate(),)).requires_grad_()

    def step(layer: object) -> Tensor:
        return layer(x * 1) @ weight

    native, _ = kept(lambda: step(own.gelu))
    ours, _ = kept(lambda: step(functional.gelu))
    saves(native, ours, 128 * 512, 4)


def compiled(mesh: object) -> None:
    x = distribute_tensor(torch.randn(6, 8), mesh, (Shard(0),)).requires_grad_()
    eager = functional.gelu(x)
    (dx,) = torch.autograd.grad(eager.sum(), x)
    made = torch.compile(functional.gelu, fullgraph=True, backend="aot_eager")
    y = made(x)
    assert y.placements == eager.placements
    same(y.full_tensor(), eager.full_tensor(), "compiled")
    same(torch.autograd.grad(y.sum(), x)[0].full_tensor(), dx.full_tensor(), "compiled gradient")


def modes(mesh: object) -> None:
    x = distribute_tensor(torch.randn(6, 8), mesh, (Shard(0),)).requires_grad_()
    with invref.inverted():
        y = own.gelu(x)
    assert y.placements == (Shard(0),)
    same(y.full_tensor(), own.gelu(x.full_tensor()), "by the mode")


if __name__ == "__main__":
    with processes():
        on = init_device_mesh("cpu", (2,))
        for check in (strides, inplace, parameters, learnt_slopes, saved_bytes, modes, compiled):
            torch.manual_seed(3)
            check(on)
        tell(cases=layers())
