"""The first call of a layer in a process: with nothing compiled before, and with the cache that a first one left.

Run as a program it is that process: it imports torch and invref alone, gives torch's own layer the first turn, calls
ours twice, and prints the seconds of each, and of importing invref, as JSON. What torch does once for all layers is not
counted as ours; loading the compiler is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

N = 1 << 16
"""Elements: enough for the kernels that large tensors use."""
TRIES = 3
DEADLINE = 300
"""Seconds after which a process that should take a few is given up."""


def seconds(
    module: str, dtype: str, device: str, threads: int, tries: int = TRIES, n: int = N
) -> dict[str, list[float]]:
    """Seconds of first calls, forward and backward, in fresh processes: "cold", "warm" and "torch"; and of "import".

    module: the call in `invref.nn` that makes the layer, as in "GELU()". Each try has an empty cache folder of its own,
    used twice.
    """
    found: dict[str, list[float]] = {"cold": [], "warm": [], "torch": [], "import": []}
    for _ in range(tries):
        with tempfile.TemporaryDirectory(prefix="invref-") as folder:
            places = {"TRITON_CACHE_DIR": folder, "INVREF_CACHE": folder}
            for state in ("cold", "warm"):
                told = _process([module, dtype, device, str(threads), str(n)], places)
                found[state].append(told["invref"])
                for name in ("torch", "import"):
                    found[name].append(told[name])
    return found


def _process(arguments: list[str], places: Mapping[str, str]) -> dict[str, float]:
    # Here, because the process that is started must import torch before anything of ours.
    from invref.errors import InvrefError

    command = [sys.executable, "-m", "verify.speed_first", *arguments]
    environment = {**os.environ, **places}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=DEADLINE, check=False, encoding="utf-8"
        )
    except subprocess.TimeoutExpired:
        raise InvrefError(f"the first call of {arguments[0]} took more than {DEADLINE} seconds") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise InvrefError(f"the first call of {arguments[0]} failed: {lines[-1]}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def main(module: str, dtype: str, device: str, threads: int, n: int) -> dict[str, float]:
    """Seconds that importing invref takes, of torch's first call, of ours, and of our second."""
    import torch

    start = time.perf_counter()
    import invref

    told = {"import": time.perf_counter() - start}
    torch.set_num_threads(threads)
    x = torch.randn(n).to(device, getattr(torch, dtype)).requires_grad_()
    # The text is from the catalogue.
    layer = eval(module, vars(invref.nn))
    for name, function in (("torch", torch.nn.functional.gelu), ("invref", layer), ("again", layer)):
        start = time.perf_counter()
        torch.autograd.grad(function(x).sum(), x)
        if device != "cpu":
            torch.cuda.synchronize(device)
        told[name] = time.perf_counter() - start
    return told


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))))
