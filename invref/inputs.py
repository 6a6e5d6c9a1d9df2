"""What a layer is called with: whether it can be served, and who is looking on.

Must not know layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invref.errors import InputError
from invref.formats import BY_DTYPE, FORMATS

modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many modes of torch's dispatcher are on, of which kernels that are called by address know nothing."""
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def checked(name: str, x: Tensor) -> None:
    """InputError unless x is a tensor of one of the formats."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} takes a tensor, not {type(x).__name__}: wrap it in torch.tensor(...)")
    if x.layout != torch.strided or x.is_nested:
        raise InputError(f"{name} takes dense tensors, not {x.layout}: convert with x.to_dense() or to_padded_tensor()")
    if x.dtype not in BY_DTYPE:
        raise InputError(f"{name} takes {', '.join(FORMATS)}, not {x.dtype}: convert with x.float() first")


def into_graph() -> bool:
    """Whether what is called goes into a graph: of torch.compile and torch.export, or of make_fx."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXY) is not None


def recording(*inputs: Any) -> bool:
    """Whether some are no tensors but record what is done to them, as torch.fx's proxies do."""
    return any(not isinstance(x, Tensor) and hasattr(x, "__torch_function__") for x in inputs)
