"""Every kernel compiles for every GPU, spills nothing on Hopper and uses its tensor cores."""

from __future__ import annotations

import functools
import os
import types
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles: runs without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from mal_kernels._triton import aot

MODULES = aot.kernel_modules()
OTHERS = [target for target in aot.TARGETS if target != "sm_90"]
# spill instructions allowed: other versions of Triton allocate registers a little differently
SPILLS = 0 if triton.__version__.startswith("3.6.") else 64


@functools.cache
def reports(name, target, every=False):
    # the first pinned size; with `every` all, and all that autotuning may choose
    chosen = every
    with mock.patch.dict(os.environ, MAL_AUTOTUNE=str(int(chosen))):
        return aot.reports(MODULES[name], target, at_most=None if chosen else 1)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in OTHERS)]
)
def test_compiles(target, name, every):
    # the sizes were chosen for Hopper
    for report in reports(name, target, every and target == "sm_90"):
        assert report.shared <= aot.SHARED_BYTES[target], report
        assert not report.int32_offsets, report
        assert not report.narrow_dots or report.mma, f"no tensor cores: {report}"
        assert not report.rewritten, f"a wgmma under way may read what is written: {report}"
        if target == "sm_90":
            assert report.spills <= SPILLS, report


@pytest.mark.slow
def test_every_kernel_has_an_example():
    compiled = {report.kernel for name in MODULES for report in reports(name, "sm_90", True)}
    assert compiled >= set().union(*map(aot.kernels_of, MODULES.values()))


# without it Triton 3.9 warns that its default will change
FUSED = {"enable_fp_fusion": True}


# --- planted faults -------------------------------------------------------------------------------


@triton.jit
def int32_kernel(p_x, stride, N: tl.constexpr):
    o = tl.program_id(0) * stride + tl.arange(0, N)
    tl.store(p_x + o, 1.0)


@triton.jit
def square_kernel(p_x, N: tl.constexpr):
    o = tl.arange(0, N)[:, None].to(tl.int64) * N + tl.arange(0, N)
    x = tl.load(p_x + o)
    tl.store(p_x + o, tl.dot(x, x, input_precision="ieee"))


def one_report(launch):
    (report,) = aot.reports(types.SimpleNamespace(EXAMPLES={"planted": launch}), "sm_90")
    return report


def test_the_checks_see_planted_faults():
    x = torch.empty(4096, device="meta")
    assert one_report(lambda: int32_kernel[(1,)](x, 3, 16, **FUSED)).int32_offsets == ("p_x",)
    half = one_report(lambda: square_kernel[(1,)](x.half(), 32, **FUSED))
    full = one_report(lambda: square_kernel[(1,)](x, 32, **FUSED))
    assert half.spills == 0
    assert (
        one_report(lambda: square_kernel[(1,)](x, 32, num_warps=1, maxnreg=32, **FUSED)).spills > 0
    )
    assert (half.narrow_dots, half.mma > 0, full.narrow_dots, full.mma) == (1, True, 0, 0)
    with pytest.raises(RuntimeError, match="meta"):
        one_report(lambda: int32_kernel[(int(x.sum().item()),)](x, 3, 16, **FUSED))


SASS = """
  /*0100*/  HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
  /*0110*/  {} ;
  /*0120*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
  /*0130*/  MOV R4, R60 ;
"""


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("FADD R5, R60, R61", True),
        ("@!P0 MOV R7, R60", True),
        ("LDS.128 R0, [R60]", False),
        ("LDS.64 R6, [R60]", True),
        ("LDSM.16.M88.4 R4, [R60]", True),
        ("IMAD.WIDE R2, R60, R61, R62", False),
        ("IMAD.WIDE R3, R60, R61, R62", True),
        ("ISETP.GE.AND P0, PT, R4, R60, PT", False),
        ("STS [R4], R5", False),
        ("FADD R60, R4, R5", False),
    ],
)
def test_a_register_that_wgmma_still_reads(line, is_wrong):
    assert [*aot.rewritten_operands(SASS.format(line))] == [line] * is_wrong


def test_the_driver_is_put_back():
    active = triton.runtime.driver._active
    one_report(lambda: int32_kernel[(1,)](torch.empty(16, device="meta"), 3, 16, **FUSED))
    assert triton.runtime.driver._active is active
