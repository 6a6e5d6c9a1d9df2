"""Layers on tensors that are split over processes, as tensor parallelism has them: torch's DTensor.

Guarantees that every process works on its own part and that the result is placed as the input is, uneven parts and
those of several axes included; that nothing is gathered, but for sums not yet added up, which no activation can be
taken of; and that gradients of parameters are added up over the processes that share them. Must not know activations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from invref.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def is_split(x: Any) -> TypeGuard[DTensor]:
    """Whether x is split over processes. Where nothing has made such tensors, what they need is not imported."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def locally(
    name: str,
    function: Callable[..., Tensor],
    x: Tensor,
    *parameters: Tensor,
    channels: bool = False,
    inplace: bool = False,
) -> Tensor:
    """function(x, *parameters) of each process's own parts, for a pointwise function; placed as x.

    channels: whether the parameters have one number for each index of axis 1 of x, and not one for all; inplace:
    whether the result is to overwrite x. InputError where that cannot be, and where some of the tensors are split over
    processes and others are not.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(x, DTensor) or not all(isinstance(p, DTensor) and p.device_mesh == x.device_mesh
                                             for p in parameters):  # fmt: skip
        raise InputError(
            f"{name} takes an input and parameters on one mesh of processes: place them by distribute_tensor or "
            "distribute_module"
        )
    if inplace and any(p.is_partial() for p in x.placements):
        raise InputError(f"{name} cannot overwrite sums that are not yet added up: use inplace=False")
    placed = [Replicate() if p.is_partial() else p for p in x.placements]
    x = x.redistribute(placements=placed)
    own = [_own(p, placed, channels) for p in parameters]
    y = function(x.to_local(grad_placements=placed), *own)
    # As dense tensors come out of torch's own: in the order of memory of what went in.
    stride = torch.empty_like(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")).stride()
    return DTensor.from_local(y, x.device_mesh, placed, run_check=False, shape=x.shape, stride=stride)


def _own(parameter: Any, placed: list[Placement], channels: bool) -> Tensor:
    """What a process needs of a parameter; its gradient there is one term of the sum over the parts of x."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def beside(p: Placement) -> tuple[Placement, Placement]:
        if channels and p.is_shard(1):
            return Shard(0), Shard(0)
        return Replicate(), Replicate() if p.is_replicate() else Partial()

    wanted, gradient = zip(*map(beside, placed), strict=True)
    local: Tensor = parameter.redistribute(placements=wanted).to_local(grad_placements=gradient)
    return local
