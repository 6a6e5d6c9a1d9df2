"""Layers and models split over two processes: tensor parallelism and a pipeline, against the same parts in one process.

One process multiplies the same parts of the weights with the same kernels and adds up in the same order, so that the
bound on the difference is 0.
"""

from __future__ import annotations

import copy
import sys

import torch
from group import kept, processes, same, same_gradients, saves, tell
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import invref
from invref import functional as ours

WIDTH, WIDE, TOKENS = 32, 96, 24


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=WIDE))


def inputs(rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(TOKENS, WIDTH, generator=generator)


def by_parts(model: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the two processes compute, in one: halves of the middle, their products added."""
    weights = {name: [h.detach().clone().requires_grad_() for h in p.chunk(2, dim=1 if "down" in name else 0)]
               for name, p in model.named_parameters()}  # fmt: skip
    # Each layer of each process has an input of its own: gradients are added up over processes, and then over layers.
    own = {name: [x.clone().requires_grad_() for _ in range(2)] for name in ("gate", "up")}
    ys = []
    for half in range(2):
        gate, up = (functional.linear(own[n][half], weights[f"{n}_proj.weight"][half]) for n in own)
        ys.append(functional.linear(ours.silu(gate) * up, weights["down_proj.weight"][half]))
    y = ys[0] + ys[1]
    y.backward(dy)
    found = {n: torch.cat([h.grad for h in halves], dim=1 if "down" in n else 0) for n, halves in weights.items()}
    dx = [a.grad + b.grad for a, b in own.values()]
    return y.detach(), {**found, "x": dx[0] + dx[1]}


def tensors(local: bool) -> int:
    """local: whether layers give plain tensors on, or DTensors, which the activation then gets."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {
        "gate_proj": ColwiseParallel(use_local_output=local),
        "up_proj": ColwiseParallel(use_local_output=local),
        "down_proj": RowwiseParallel(),
    }
    x, dy = inputs()
    y_wanted, wanted = by_parts(mlp(), x, dy)
    native, model = (parallelize_module(mlp(), mesh, plan) for _ in range(2))
    done = invref.convert(model)
    assert sum(site.taken for site in done.sites) == 1, done
    seen: list[object] = []
    model.act_fn.register_forward_hook(lambda _module, given, out: seen.extend([given[0], out]))
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(dy)
    assert all(isinstance(t, DTensor) != local for t in seen)
    if not local:
        assert all(t.placements == (Shard(1),) for t in seen)
    same(y.detach(), y_wanted, "output")
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    same_gradients({**found, "x": leaf.grad}, wanted)
    before, _ = kept(lambda: native(x))
    after, _ = kept(lambda: model(x))
    # Gated: the input of the activation is kept by nothing else, its output by the product.
    saves(before, after, TOKENS * WIDE // 2, 4)
    return before - after


def sequence() -> int:
    """Norms on parts of the sequence, the middle on parts of the width, and DTensors all the way."""
    mesh = init_device_mesh("cpu", (2,))

    def block() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDE, bias=False), nn.GELU(),
                             nn.Linear(WIDE, WIDTH, bias=False))  # fmt: skip

    plan = {
        "0": SequenceParallel(sequence_dim=0, use_local_output=False),
        "1": [PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=False),
              ColwiseParallel(use_local_output=False)],
        "3": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }  # fmt: skip
    # Two styles for one module are applied one after the other.
    model, native = block(), block()
    for made in (model, native):
        for name, styles in plan.items():
            for style in styles if isinstance(styles, list) else [styles]:
                parallelize_module(made, mesh, {name: style})
    invref.convert(model)
    x, dy = inputs()
    results = []
    for made in (native, model):
        leaf = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        bytes_kept, y = kept(lambda made=made, leaf=leaf: made(leaf))
        assert y.placements == (Shard(0),)
        y.backward(distribute_tensor(dy, mesh, [Shard(0)]))
        results.append(
            (bytes_kept, y.full_tensor().detach(), leaf.grad.full_tensor(), made[3].weight.grad.full_tensor())
        )
    (before, y_native, dx_native, dw_native), (after, y, dx, dw) = results
    same(y, y_native, "output")
    same(dw, dw_native, "gradient behind the activation")
    # Before it torch's own gradient has errors of its own: an eps of float32 for each of the sum's WIDE terms and of
    # the layer norm's, of the size of the largest.
    error = float((dx - dx_native).abs().max() / dx_native.abs().max())
    assert error <= 2**-20 + 2 * WIDE * 2**-24, error
    saves(before, after, TOKENS * WIDE // 2, 4)
    return before - after


def pipeline() -> int:
    """Two stages, micro-batches through both, by two schedules; gradients are the means over micro-batches."""
    rank, parts = torch.distributed.get_rank(), 4

    def stages() -> list[nn.Module]:
        torch.manual_seed(3)
        made = [nn.Sequential(nn.Linear(WIDTH, WIDE), nn.GELU(), nn.Linear(WIDE, WIDTH), nn.SiLU()) for _ in range(2)]
        for stage in made:
            invref.convert(stage)
        return made

    x, wanted_output = inputs()
    one = nn.Sequential(*stages())
    outputs = []
    for piece, target in zip(x.chunk(parts), wanted_output.chunk(parts), strict=True):
        outputs.append(one(piece))
        functional.mse_loss(outputs[-1], target).backward()
    wanted = {name: p.grad / parts for name, p in one[rank].named_parameters()}
    for schedule in (ScheduleGPipe, Schedule1F1B):
        own = copy.deepcopy(stages()[rank])
        stage = PipelineStage(own, rank, 2, torch.device("cpu"))
        run = schedule(stage, parts, loss_fn=functional.mse_loss)
        if rank == 0:
            run.step(x)
        else:
            y = run.step(target=wanted_output)
            same(y.detach(), torch.cat(outputs).detach(), "output")
        same_gradients({name: p.grad for name, p in own.named_parameters()}, wanted)
    return 0


CHECKS = {
    "tensors": lambda: {"local": tensors(True), "placed": tensors(False)},
    "sequence": lambda: {"saved": sequence()},
    "pipeline": lambda: {"schedules": 2 + pipeline()},
}

if __name__ == "__main__":
    with processes():
        tell(**{name: CHECKS[name]() for name in sys.argv[1:]})
