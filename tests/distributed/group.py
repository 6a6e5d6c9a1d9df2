"""What the programs share that tests start by torchrun: two processes, and sameness that both must find."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from invref.storages import counting

PROCESSES = 2


@contextmanager
def processes() -> Iterator[int]:
    """The number of this process among the two; what it does is the same run to run."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    try:
        assert dist.get_world_size() == PROCESSES
        yield dist.get_rank()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    """The same numbers, bit for bit but for the sign of a zero."""
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    assert found.dtype == wanted.dtype, (what, found.dtype, wanted.dtype)
    apart = (found.double() - wanted.double()).abs().max() if found.numel() else 0
    assert torch.equal(found, wanted), f"{what}: up to {float(apart):.3g} apart"


def same_gradients(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same gradients by name; some of them are not 0."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        same(found[name], gradient, name)
    assert any(bool(gradient.any()) for gradient in wanted.values())


def kept(run: Callable[[], Any], model: Any = None) -> tuple[int, Any]:
    """Bytes of the storages that `run` keeps for backward, and what it returns."""
    with counting(model) as storages:
        result = run()
    return storages.total, result


def saves(native: int, inverted: int, elements: int, itemsize: int, sites: int = 1) -> None:
    """Each site's input is not kept any more, and a bit an element is, in blocks of 64 bytes."""
    assert inverted <= native - elements * itemsize + elements // 8 + 64 * sites, (native, inverted)


def tell(**facts: Any) -> None:
    """Prints facts for the test, once."""
    if dist.get_rank() == 0:
        json.dump(facts, sys.stdout)
        print(flush=True)
