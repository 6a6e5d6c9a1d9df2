"""torch.compile for comparisons: each compiled function is a compilation of its own, and a failure is a sentence.

Must not know what is compiled.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
LONGEST = 160


def compiled(function: Function, call: Callable[[Function], object], budget: float | None = None) -> Function:
    """`function` by torch.compile in one graph, compiled in forward and backward by one `call` of it.

    budget: the share of the activation memory that backward may have kept, 1 by default. `function` must be a Python
    function; its code is copied, because compilations are kept with the code and one made before would serve again.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    result: Function = torch.compile(own, fullgraph=True, dynamic=False)
    with quiet(), _budget(budget):
        call(result)
    return result


def _budget(budget: float | None) -> Any:
    if budget is None:
        return nullcontext()
    from torch._functorch import config

    return config.patch(activation_memory_budget=budget)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the compiler's remarks on standard error."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor", "torch._functorch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
