"""A target that runs on another device: inputs go there, outputs and gradients come back.

Guarantees that layer and framework run on the same device, and that the target says which, so that nothing measured on
one processor passes for another's. Must not know how anything is checked.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from invref import layers
from invref.catalogue import ROWS, SchemeOf
from invref.kernels.scheme import Scheme
from verify.devices import title
from verify.targets import Layer, Target


def moved(target: Target, device: torch.device) -> Target:
    """The target on a device; tensors of the processor go in and come out, also in backward."""
    return target if device.type == "cpu" else wrapped(target, device)


def wrapped(target: Target, device: torch.device) -> Target:
    """The same, also where the device is the processor."""
    forward = f"{target.forward.rpartition(', CPU')[0] or target.forward}, {title(device)}"
    return replace(
        target,
        layer=_there(target.layer, device),
        native=_there(target.native, device),
        scheme=_scheme(target, device),
        forward=forward,
        device=device.type,
        options=f"{target.options} --device {device.type}",
    )


def _there(layer: Layer, device: torch.device) -> Layer:
    def there(x: Tensor) -> Tensor:
        return layer(x.to(device)).to(x.device)

    return there


def _scheme(target: Target, device: torch.device) -> SchemeOf | None:
    """The scheme of a row on the device, where it differs by device; else what the target says."""
    row = ROWS[target.name] if target.role == "row" else None
    if row is None or row.key is None or target.scheme is None:
        return target.scheme
    key = row.key

    def scheme(dtype: torch.dtype) -> Scheme:
        return layers.get(key).scheme(dtype, device)

    return scheme
