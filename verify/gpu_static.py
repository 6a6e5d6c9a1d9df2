"""`python -m verify.gpu_static`: the GPU kernels compiled ahead of time, without a GPU, and what their code says.

Writes reports/gpu-static.md and .json: the same sources and the same Triton give the same bytes. Guarantees that what
is compiled is what `invref.kernels.gpu` launches for full blocks: the same options, 16-byte aligned tensors. Must not
know how a listing is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from invref.formats import FORMATS
from invref.kernels import gpu
from verify import gpu_static_listing
from verify.document import write_text
from verify.exits import BAD_INPUT, PASSED

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
REPORTS = Path(__file__).parents[1] / "reports"

HEADING = """# The GPU kernels' code

The Triton kernels of `invref/kernels/gpu_kernels.py`, compiled ahead of time without a GPU (Triton {triton}), as they
are launched for full blocks of 1,024 elements. `backward` and `pack` serve every rational decoder; of 16-bit formats,
`by_table` serves every layer. A thread works on 8 elements. Registers are a thread's (vector registers on gfx942).
Spills are bytes and instructions of local memory. Loads and stores are the widths in bytes of a thread's global
accesses: 16 for the tensors, 1 for the side bits, and of `by_table` 4 for each element's gate.
Instructions are counted in the listing from entry to exit, divided by 8; those of guarded side paths in between
count, too. "fused" is whether the compiler may fuse products with sums: in `forward` alone, as the others' bits are
those of `naive`; of it, a device takes the variant that has torch's bits there, or neither. The code says
nothing about time, and this table claims nothing about it.

| kernel | activation | format | fused | target | registers | spills | loads | stores | instructions per element |
| --- | --- | --- | --- | --- | ---: | ---: | --- | --- | ---: |
"""


@dataclass(frozen=True)
class Case:
    """One kernel for one target; activation: "any", or the name of a fused forward's."""

    kernel: str
    activation: str
    fmt: str
    fusion: bool
    target: str


def cases(targets: Iterable[str] = TARGETS) -> Iterator[Case]:
    """Everything the table has a row for."""
    for target, kernel, fmt in product(targets, ("pack", "backward"), POINTERS):
        yield Case(kernel, "any", fmt, False, target)
    for target, fmt in product(targets, ("bfloat16", "float16")):
        yield Case("by_table", "any", fmt, False, target)
    for target, name, fmt, fusion in product(targets, gpu.OWN, POINTERS, (False, True)):
        yield Case("forward", name, fmt, fusion, target)


def code(case: Case, masked: bool = False, direct: bool = True) -> dict[str, Any]:
    """What Triton makes of a case, its stages from "ttir" to "cubin" or "amdgcn".

    masked: for a block that is not full; direct: with the division and root that are launched on NVIDIA's processors.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from invref.kernels import gpu_kernels

    nvidia = case.target.startswith("sm_")
    backend, warp = ("cuda", 32) if nvidia else ("hip", 64)
    target = GPUTarget(backend, int(case.target[3:]) if nvidia else case.target, warp)
    kernel = getattr(gpu_kernels, case.kernel)
    constants: dict[str, Any] = {"WIDTH": gpu.WIDTHS[FORMATS[case.fmt].dtype], "MASKED": masked}
    if case.kernel == "forward":
        constants["NAME"] = case.activation
    if case.kernel == "backward":
        constants |= {"DIRECT": nvidia and direct, "LOWEST": 0}
    if case.kernel == "by_table":
        constants["SIDES"] = 2
    pointer = POINTERS[case.fmt]
    kinds = {"x_at": pointer, "y_at": pointer, "dy_at": pointer, "dx_at": pointer, "bits_at": "*u8"}
    kinds |= {"lowest_at": "*fp32", "lowest_first": "i32", "table_at": "*fp32"}
    if case.kernel == "by_table":
        kinds["y_at"] = "*i16"
    kinds |= {"first": "i32", "n": "i32", "threshold": "fp32", **dict.fromkeys(constants, "constexpr")}
    shapes: dict[str, Any] = {"scalars": ("fp32",) * 9, "segments": ("fp32",) * 36}
    signature = {name: shapes.get(name) or kinds[name] for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name.endswith("_at")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    chosen = gpu.options(backend, warp, case.fusion)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return dict(triton.compile(source, target=target, options=chosen).asm)


def measured(case: Case, masked: bool = False) -> dict[str, Any]:
    """A case's row."""
    made = code(case, masked)
    if case.target.startswith("sm_"):
        listing = gpu_static_listing.nvidia(_dump(made["cubin"], "-res-usage"), _dump(made["cubin"], "-sass"))
    else:
        listing = gpu_static_listing.amd(made["amdgcn"])
    return {**asdict(case), **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(listing).items()}}


def sass(case: Case, direct: bool = True) -> list[str]:
    """The instructions of a case for an NVIDIA processor."""
    return gpu_static_listing.instructions(_dump(code(case, direct=direct)["cubin"], "-sass"))


def _dump(cubin: bytes, option: str) -> str:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(triton: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page."""
    return HEADING.format(triton=triton) + "".join(_row(row) for row in rows)


def _row(row: dict[str, Any]) -> str:
    element = row["instructions"] / gpu.BITS
    loads, stores = (" + ".join(map(str, row[key])) for key in ("loads", "stores"))
    cells = (
        row["kernel"],
        row["activation"],
        row["fmt"],
        "yes" if row["fusion"] else "no",
        row["target"],
        row["registers"],
        row["spills"],
        loads,
        stores,
        f"{element:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def main() -> int:
    """Compiles everything and writes both files."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu_static: interpreted kernels cannot be compiled: unset TRITON_INTERPRET", file=sys.stderr)
        return BAD_INPUT
    if find_spec("triton") is None:
        print("gpu_static: needs Triton to compile its kernels: pip install triton", file=sys.stderr)
        return BAD_INPUT
    wanted = list(cases())
    rows = []
    for case in wanted:
        rows.append(measured(case))
        if sys.stderr.isatty():
            print(f"\r{len(rows)} of {len(wanted)}", end="", file=sys.stderr, flush=True)
    triton = version("triton")
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_text(REPORTS / "gpu-static.json", f'{{"triton": "{triton}", "rows": [\n{lines}\n]}}\n')
    write_text(REPORTS / "gpu-static.md", table(triton, rows))
    return PASSED


if __name__ == "__main__":
    sys.exit(main())
