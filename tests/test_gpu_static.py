"""The kernels compiled ahead of time: the committed table, and what the code must show."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version

import pytest

from invref.kernels import gpu
from verify import gpu_static, gpu_static_listing

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NVIDIA = tuple(target for target in gpu_static.TARGETS if target.startswith("sm_"))
OPERATIONS = {"root": 2, "quotient": 4}
"""Fused multiply-adds of the direct square root and division."""


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((gpu_static.REPORTS / "gpu-static.json").read_text())


def test_the_table_has_every_kernel_on_every_target_and_the_page_shows_it(committed):
    keys = [gpu_static.Case(*(row[key] for key in gpu_static.Case.__annotations__)) for row in committed["rows"]]
    assert keys == list(gpu_static.cases())
    # Three formats of all kernels but by_table, which serves the two of 16 bits.
    assert len(keys) == len(gpu_static.TARGETS) * (3 * (2 + 2 * len(gpu.OWN)) + 2)
    page = (gpu_static.REPORTS / "gpu-static.md").read_text()
    assert page == gpu_static.table(committed["triton"], committed["rows"])


def test_nothing_spills_or_goes_by_shared_memory_and_every_tensor_by_16_bytes(committed):
    for row in committed["rows"]:
        vectors = 2 if row["fmt"] == "float32" else 1
        tensors = [16] * vectors
        loads, stores = {
            "pack": (tensors, [1]),
            "forward": (tensors, [1, *tensors]),
            "backward": ([1, *tensors, *tensors], tensors),
            "by_table": ([1, *[4] * gpu.BITS, *tensors, *tensors], tensors),
        }[row["kernel"]]
        assert (row["loads"], row["stores"]) == (loads, stores), row
        assert (row["spills"], row["shared"]) == (0, 0), row
        # 65,536 registers a multiprocessor: with 80 a thread, six programs of 128 threads stay resident.
        assert row["registers"] <= 80, row


def test_no_product_is_fused_where_naive_fuses_none(committed):
    for row in committed["rows"]:
        if row["kernel"] == "backward" and row["target"] in NVIDIA:
            assert row["fused"] == gpu.BITS * sum(OPERATIONS.values()), row
        if row["kernel"] in ("pack", "by_table"):
            assert row["fused"] == 0, row


def held(cases: list[gpu_static.Case], committed: dict) -> None:
    assert committed["triton"] == version("triton"), "the table is that of another Triton: python -m verify.gpu_static"
    rows = {gpu_static.Case(*(row[key] for key in gpu_static.Case.__annotations__)): row for row in committed["rows"]}
    for case in cases:
        assert gpu_static.measured(case) == rows[case], case


@needs_triton
def test_the_committed_figures_are_those_of_this_code(committed):
    held([c for c in gpu_static.cases() if c.activation in ("any", "gelu") and not c.fusion], committed)


@needs_triton
@pytest.mark.slow
def test_all_committed_figures_are_those_of_this_code(committed):
    held(list(gpu_static.cases()), committed)


@needs_triton
@pytest.mark.parametrize("target", gpu_static.TARGETS)
def test_blocks_that_are_not_full_do_not_spill_either(target):
    for kernel, name in (("pack", "any"), ("backward", "any"), ("forward", "mish")):
        for fmt in gpu_static.POINTERS:
            assert gpu_static.measured(gpu_static.Case(kernel, name, fmt, False, target), masked=True)["spills"] == 0


@needs_triton
@pytest.mark.parametrize("kernel", ["pack", "backward", "forward"])
def test_blocks_are_found_with_64_bits_and_lanes_with_32(kernel):
    name = "silu" if kernel == "forward" else "any"
    made = gpu_static.code(gpu_static.Case(kernel, name, "bfloat16", False, "sm_90"))["ttir"]
    kinds = Counter(re.findall(r"tt\.addptr .* : (.*?) loc", made))
    assert kinds.keys() == {
        "!tt.ptr<i8>, i64",
        "!tt.ptr<bf16>, i64",
        "tensor<128x!tt.ptr<i8>>, tensor<128xi32>",
        "tensor<128x8x!tt.ptr<bf16>>, tensor<128x8xi32>",
    }


@needs_triton
@pytest.mark.parametrize("target", NVIDIA)
def test_bfloat16_is_rounded_by_the_hardware_and_nothing_else_is_flushed(target):
    ptx = gpu_static.code(gpu_static.Case("backward", "any", "bfloat16", False, target))["ptx"]
    operations = set(re.findall(r"^\s+([a-z][a-z0-9]*\.[\w.]*f32[\w.]*)", ptx, re.MULTILINE))
    assert operations & {"cvt.rn.bf16x2.f32", "cvt.rn.bf16.f32"}
    assert {o for o in operations if "approx" in o or "ftz" in o} == {"rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32"}
    arithmetic = {o.split(".")[0] for o in operations} & {"add", "sub", "mul", "fma", "div", "sqrt"}
    assert arithmetic == {"add", "sub", "mul", "fma"}
    assert all(o.split(".")[1] == "rn" for o in operations if o.split(".")[0] in arithmetic)


ROOT = r"""
MUFU\.RSQ (?P<r>R\d+), (?P<x>R\d+)
(?:.*\n)*?FMUL\.FTZ (?P<s>R\d+), (?P=x), (?P=r)
FMUL\.FTZ (?P<h>R\d+), (?P=r), 0\.5
FFMA (?P<e>R\d+), -(?P=s), (?P=s), (?P=x)
FFMA R\d+, (?P=e), (?P=h), (?P=s)
"""
QUOTIENT = r"""
FFMA (?P<a>R\d+), -(?P<q>R\d+), (?P<r>R\d+), 1
FFMA (?P<i>R\d+), (?P=r), (?P=a), (?P=r)
FFMA (?P<t>R\d+), (?P<p>R\d+), (?P=i), RZ
FFMA (?P<e>R\d+), -(?P=q), (?P=t), (?P=p)
FFMA R\d+, (?P=i), (?P=e), (?P=t)
"""


@needs_triton
@pytest.mark.parametrize("target", NVIDIA)
def test_the_direct_root_and_quotient_are_what_the_compiler_does_itself_behind_its_guards(target):
    guarded = gpu_static.sass(gpu_static.Case("backward", "any", "float32", False, target), direct=False)
    text = "\n" + "\n".join(re.sub(r"\.reuse", "", line) for line in guarded) + "\n"
    assert re.search(ROOT, text), "square root"
    assert re.search(QUOTIENT, text), "division"


@needs_triton
def test_interpreted_kernels_are_refused():
    command = [sys.executable, "-m", "verify.gpu_static"]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
    assert "Traceback" not in result.stderr


USAGE = "Function backward:\n  REG:50 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:584"
SASS = """
        /*0000*/                   LDG.E.128 R4, [R4.64] ;    /* 0x0 */
                                                              /* 0x1 */
        /*0010*/              @!P0 LDG.E.U8 R2, [R2.64] ;     /* 0x0 */
        /*0020*/                   LDG.E R2, [R2.64] ;        /* 0x0 */
        /*0030*/             @!UP0 FFMA R1, -R2, R2, R4 ;     /* 0x0 */
        /*0040*/                   FFMA2 R2, R2, R2, R4 ;     /* 0x0 */
        /*0050*/                   LDL R2, [R1] ;             /* 0x0 */
        /*0060*/               @P0 EXIT ;                     /* 0x0 */
        /*0070*/                   STG.E.64 [R6.64], R4 ;     /* 0x0 */
        /*0080*/                   EXIT ;                     /* 0x0 */
        /*0090*/                   FFMA R1, R2, R2, R4 ;      /* 0x0 */
"""


def test_a_listing_is_read_up_to_its_exit_and_local_memory_counts_as_spilled():
    found = gpu_static_listing.nvidia(USAGE, SASS)
    assert found == gpu_static_listing.Listing(50, 1, 0, (1, 4, 16), (8,), 9, 3)


AMD = """
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tglobal_load_ubyte v5, v6, s[0:1]
\tv_pk_fma_f32 v[0:1], v[0:1], v[2:3], v[4:5]
\tv_fma_f32 v0, v1, v2, v3
\tglobal_store_byte v5, v6, s[0:1]
\tbuffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen
\ts_endpgm
\tv_fma_f32 v0, v1, v2, v3
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 4
    .sgpr_spill_count: 2
    .vgpr_count:     9
    .vgpr_spill_count: 1
"""


def test_amds_assembly_is_read_likewise():
    assert gpu_static_listing.amd(AMD) == gpu_static_listing.Listing(9, 7, 0, (1, 16), (1, 16), 8, 3)
    with pytest.raises(ValueError, match="global_load_lds_unheard"):
        gpu_static_listing.amd(AMD.replace("global_load_ubyte", "global_load_lds_unheard"))
