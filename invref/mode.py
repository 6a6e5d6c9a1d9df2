"""`with invref.inverted():` catches activations that a model calls as functions, where there are no modules to swap.

Guarantees that a call it cannot take exactly as torch does, be it for its dtype, its arguments or an `out`, is torch's
own call, with torch's own errors. Must not know models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as own
from torch.overrides import TorchFunctionMode

from invref import functional
from invref.errors import FormulaError, InputError
from invref.formats import BY_DTYPE

_SAME = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu6 selu silu softplus "
    "softshrink softsign tanhshrink threshold"
)
"""Functions of torch.nn.functional that have ours of the same name and arguments."""

CAUGHT: dict[Any, Callable[..., Tensor]] = {
    **{getattr(own, name): getattr(functional, name) for name in _SAME.split()},
    torch.celu: functional.celu,
    torch.selu: functional.selu,
    torch.threshold: functional.threshold,
    Tensor.hardshrink: functional.hardshrink,
    Tensor.prelu: functional.prelu,
}
"""By torch's function: ours. relu, tanh and sigmoid keep their output already."""
for _name in ("elu_", "leaky_relu_", "hardtanh_", "celu_", "selu_", "threshold_"):
    _made = getattr(functional, _name[:-1])
    CAUGHT[getattr(own, _name)] = lambda *args, _made=_made, **named: _made(*args, **named, inplace=True)


class inverted(TorchFunctionMode):  # noqa: N801
    """A context in which torch's activation functions run backward from their output, in whatever model calls them.

    Like every torch function mode it holds for the thread that enters it, nests, and reaches modules that call
    torch.nn.functional, as torch.nn's do. What was computed inside may be differentiated outside. Calls with an integer
    tensor, an `out`, or arguments that no decoder serves are torch's own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        made = CAUGHT.get(func)
        if made is None or "out" in named or not args:
            # torch's functions may call others of themselves in the end: those are left to them.
            return func(*args, **named)
        if not (isinstance(args[0], Tensor) and args[0].dtype in BY_DTYPE and args[0].layout == torch.strided):
            return func(*args, **named)
        try:
            return made(*args, **named)
        except (FormulaError, InputError):
            return func(*args, **named)
