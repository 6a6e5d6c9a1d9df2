"""Devices by name: those that there are here.

Must not know what runs on them.
"""

from __future__ import annotations

import torch

from invref.errors import InputError


def named(name: str) -> torch.device:
    """The device "cpu", or a CUDA or ROCm device by number that there is; InputError for others."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}: use cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else 0
    if index >= count:
        there = f"{count} GPU{'s' * (count > 1)}" if count else "no GPU"
        raise InputError(f"torch {torch.__version__} finds {there} here, so there is no {name}: use --device cpu")
    return torch.device("cuda", index)


def title(device: torch.device) -> str:
    """What a device is, for people and for keys of kept results."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
