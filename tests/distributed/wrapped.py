"""Transformers' models converted and wrapped: the gradients of two processes are those of one, bit for bit.

One process computes what each of the two does, on the same part of the batch with the same kernels, and adds up in the
same order: a + b and b + a are the same number, and so are (a + b) / 2 and a / 2 + b / 2. The bound on the difference
is therefore 0.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from group import kept, processes, same_gradients, saves, tell
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import invref

BATCH, LENGTH, WIDE, LAYERS = 2, 16, 64, 2


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=WIDE,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=WIDE,
        max_position_embeddings=LENGTH, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config)


MODELS = {"bert": bert, "llama": llama}


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().train()


def part(rank: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(1, 50, (BATCH, LENGTH), generator=generator)


def loss(model: Callable[..., object], tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).last_hidden_state.float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name.removeprefix("module.")] = whole.float()
    return found


def alone(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The gradients of one part in one process, which are then forgotten."""
    loss(model, tokens).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def mean_of_both(model: nn.Module, steps: int = 1) -> dict[str, Tensor]:
    """What two processes find, by one: each adds up its steps, and then the two are halved and added."""
    sums: list[dict[str, Tensor]] = []
    for rank in (0, 1):
        every = [alone(model, part(rank, step)) for step in range(steps)]
        total = every[0]
        for more in every[1:]:
            total = {name: total[name] + more[name] for name in total}
        sums.append(total)
    return {name: sums[0][name] / 2 + sums[1][name] / 2 for name in sums[0]}


def check_bytes(name: str, wrap: Callable[[nn.Module], nn.Module], itemsize: int, rank: int) -> int:
    """Bytes saved by converting, on each process."""
    native, ours = wrap(made(name)), made(name)
    invref.convert(ours)
    ours = wrap(ours)
    before, _ = kept(lambda: loss(native, part(rank)))
    after, _ = kept(lambda: loss(ours, part(rank)))
    saves(before, after, LAYERS * BATCH * LENGTH * WIDE, itemsize, LAYERS)
    return before - after


def before_and_after(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A model converted before it is wrapped, and one after, each with a converted one of the same weights."""
    for order in ("before", "after"):
        model = made(name)
        one = copy.deepcopy(model)
        invref.convert(one)
        if order == "before":
            invref.convert(model)
        wrapped = wrap(model)
        if order == "after":
            invref.convert(wrapped)
        yield wrapped, one


def ddp(name: str, rank: int) -> int:
    for wrapped, one in before_and_after(name, DistributedDataParallel):
        for _ in range(2):  # The second step goes by buckets in the order found in the first.
            wrapped.zero_grad()
            loss(wrapped, part(rank)).backward()
            same_gradients(gradients(wrapped), mean_of_both(one))
    return check_bytes(name, DistributedDataParallel, 4, rank)


def accumulation(name: str, rank: int) -> int:
    model = made(name)
    invref.convert(model)
    one = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    for step in range(3):
        with wrapped.no_sync() if step < 2 else nullcontext():
            loss(wrapped, part(rank, step)).backward()
    same_gradients(gradients(wrapped), mean_of_both(one, steps=3))
    return 0


def layers(model: nn.Module) -> nn.ModuleList:
    return model.layers if hasattr(model, "layers") else model.encoder.layer


def sharded(model: nn.Module, **arguments: object) -> nn.Module:
    for layer in layers(model):
        fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


def fsdp(name: str, rank: int) -> int:
    for wrapped, one in before_and_after(name, sharded):
        loss(wrapped, part(rank)).backward()
        same_gradients(gradients(wrapped), mean_of_both(one))
    return check_bytes(name, sharded, 4, rank)


def fsdp_mixed(name: str, rank: int) -> int:
    """Parameters in bfloat16 while a layer runs, gradients added up in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = made(name)
    invref.convert(model)
    one = copy.deepcopy(model)
    for parameter in one.parameters():  # And no buffers, as FSDP has it.
        parameter.data = parameter.to(torch.bfloat16)
    wrapped = sharded(model, mp_policy=policy)
    loss(wrapped, part(rank)).backward()
    same_gradients(gradients(wrapped), mean_of_both(one))
    return check_bytes(name, lambda m: sharded(m, mp_policy=policy), 2, rank)


def checkpointing(name: str, rank: int) -> int:
    """Layers computed again in backward: nothing is kept inside them, and the gradients are the same."""
    model = made(name)
    invref.convert(model)
    one = copy.deepcopy(model)
    for layer in layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    before, _ = kept(lambda: loss(one, part(rank)))
    after, _ = kept(lambda: loss(model, part(rank)))
    assert after < before / 2, (before, after)
    wrapped = sharded(model)
    loss(wrapped, part(rank)).backward()
    same_gradients(gradients(wrapped), mean_of_both(one))
    return before - after


CHECKS = (ddp, accumulation, fsdp, fsdp_mixed, checkpointing)

if __name__ == "__main__":
    with processes() as number:
        chosen = [check for check in CHECKS if check.__name__ in sys.argv[1:]]
        tell(**{check.__name__: {model: check(model, number) for model in MODELS} for check in chosen})
