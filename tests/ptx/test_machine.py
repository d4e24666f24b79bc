"""The machine that runs PTX: small kernels by hand, right, and wrong with a fault each."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from mal_kernels.testing.ptx.decode import Decoder, NotDecoded
from mal_kernels.testing.ptx.flow import Jump, meeting_points
from mal_kernels.testing.ptx.machine import Geometry, Kernel, Schedule
from mal_kernels.testing.ptx.source import Source

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: PTX is not run", allow_module_level=True)

SCHEDULES = [
    *(Schedule("early"), Schedule("late", 1)),
    *(Schedule("mixed", 2), Schedule("late", 3), Schedule("early", 4)),
]


def text_of(body, shared, parameters=2):
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    return (
        ".version 8.0\n.target sm_90a\n.address_size 64\n"
        f".shared .align 1024 .b8 s[{shared}];\n.visible .entry k({names})\n{{{body}}}\n"
    )


ADDRESSES = """
  mov.u32 %t, %tid.x;
  mov.u32 %s, s;
  ld.param.u64 %in, [p0];
  ld.param.u64 %out, [p1];
"""
# Each thread reads what the one opposite has written.
EXCHANGE = f"""{ADDRESSES}
  shl.b32 %a, %t, 2;
  add.u32 %w, %s, %a;
  st.shared.u32 [%w], %t;
  bar.sync 0;
  xor.b32 %r, %a, 252;
  add.u32 %r, %s, %r;
  ld.shared.u32 %v, [%r];
  mul.wide.u32 %d, %t, 4;
  add.u64 %d, %out, %d;
  st.global.u32 [%d], %v;
  ret;
"""
# Each thread copies 16 bytes and reads those of the one opposite.
COPY = f"""{ADDRESSES}
  shl.b32 %a, %t, 4;
  add.u32 %w, %s, %a;
  mul.wide.u32 %d, %t, 16;
  add.u64 %from, %in, %d;
  cp.async.cg.shared.global [%w], [%from], 16;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  xor.b32 %r, %a, 1008;
  add.u32 %r, %s, %r;
  ld.shared.v4.u32 {{%v0, %v1, %v2, %v3}}, [%r];
  add.u64 %to, %out, %d;
  st.global.v4.u32 [%to], {{%v0, %v1, %v2, %v3}};
  ret;
"""
# c[64, 8] = a[64, 64] b[8, 64]ᵀ by a warpgroup, both tiles as they lie in memory, swizzled.
PRODUCT = (
    ADDRESSES
    + "".join(
        f"""
  mad.lo.s32 %a, %t, 16, {2048 * i};
  cvt.u64.u32 %d, %a;
  add.u64 %from, %in, %d;
  add.u32 %w, %s, %a;
  ld.global.v4.u32 {{%v0, %v1, %v2, %v3}}, [%from];
  {"setp.lt.u32 %p, %t, 64;" if i == 4 else "setp.lt.u32 %p, %t, 128;"}
  @%p st.shared.v4.u32 [%w], {{%v0, %v1, %v2, %v3}};"""
        for i in range(5)
    )
    + """
  fence.proxy.async;
  bar.sync 0;
  cvt.u64.u32 %a64, %s;
  shr.u64 %a64, %a64, 4;
  and.b64 %a64, %a64, 16383;
  or.b64 %da, %a64, 0x4000004000010000;
  add.u64 %db, %da, 512;
  mov.f32 %c0, 0f00000000;
  mov.f32 %c1, 0f00000000;
  mov.f32 %c2, 0f00000000;
  mov.f32 %c3, 0f00000000;
  setp.eq.u32 %adds, 0, 0;
  wgmma.fence.sync.aligned;"""
    + "".join(
        f"""
  add.u64 %da{k}, %da, {2 * k};
  add.u64 %db{k}, %db, {2 * k};
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%c0, %c1, %c2, %c3}}, %da{k}, %db{k},
    %adds, 1, 1, 0, 0;"""
        for k in range(4)
    )
    + """
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  mul.wide.u32 %d, %t, 16;
  add.u64 %to, %out, %d;
  st.global.v4.f32 [%to], {%c0, %c1, %c2, %c3};
  ret;
"""
)
CLUSTER_BARRIER = "barrier.cluster.arrive; barrier.cluster.wait;"
# Each block of a pair reads the other's rank.
PAIR = f"""{ADDRESSES}
  mov.u32 %rank, %cluster_ctarank;
  shl.b32 %a, %t, 2;
  add.u32 %w, %s, %a;
  st.shared.u32 [%w], %rank;
  {CLUSTER_BARRIER}
  xor.b32 %other, %rank, 1;
  mapa.shared::cluster.u32 %r, %w, %other;
  ld.shared::cluster.u32 %v, [%r];
  {CLUSTER_BARRIER} // the last
  mad.lo.s32 %i, %rank, 64, %t;
  mul.wide.u32 %d, %i, 4;
  add.u64 %d, %out, %d;
  st.global.u32 [%d], %v;
  ret;
"""
# The second block waits for the first, by a counter in memory, and reads what that has written.
GRID = """
  mov.u32 %t, %tid.x;
  ld.param.u64 %in, [p0];
  ld.param.u64 %out, [p1];
  mov.u32 %b, %ctaid.x;
  setp.eq.u32 %second, %b, 1;
  @%second bra WAIT;
  mov.u32 %v, 7;
  st.global.u32 [%out], %v;
  atom.add.release.gpu.u32 %old, [%in], 1;
  ret;
WAIT:
  ld.acquire.gpu.u32 %seen, [%in];
  setp.eq.u32 %again, %seen, 0;
  @%again bra WAIT;
  ld.global.u32 %v, [%out];
  st.global.u32 [%out+4], %v;
  ret;
"""


def swizzled(x):
    """Rows of 64 bfloat16, 128 bytes, as the 128-byte swizzle lays them out: PTX ISA 9.7.15.5."""
    lanes = torch.arange(8) ^ torch.arange(x.shape[0])[:, None] % 8  # 16 bytes each
    parts = x.view(x.shape[0], 8, 8)
    return torch.gather(parts, 1, lanes[..., None].expand_as(parts)).reshape(-1)


def exchange(body, schedule):
    out = torch.zeros(64, dtype=torch.int32)
    run = Kernel(text_of(body, 256)).run(
        Geometry((1, 1, 1), (64, 1, 1)), [None, out], schedule=schedule
    )
    return run, torch.equal(out, 63 - torch.arange(64, dtype=torch.int32))


def copy(body, schedule, offset=0):
    given, out = torch.arange(260, dtype=torch.int32), torch.zeros(64, 4, dtype=torch.int32)
    run = Kernel(text_of(body, 1024)).run(
        Geometry((1, 1, 1), (64, 1, 1)), [given[offset:], out], schedule=schedule
    )
    return run, torch.equal(out, given[:256].view(64, 4).flip(0))


def product(body, schedule):
    torch.manual_seed(0)
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    given = torch.cat([swizzled(a), swizzled(b), torch.zeros(512).bfloat16()])
    out = torch.zeros(128, 4)
    run = Kernel(text_of(body, 9216)).run(
        Geometry((1, 1, 1), (128, 1, 1)), [given, out], schedule=schedule
    )
    # thread 32 w + l holds rows 16 w + l / 4 (+ 8) and columns 2 (l % 4) (+ 1)
    c = out.view(4, 8, 4, 2, 2).permute(0, 3, 1, 2, 4).reshape(64, 8)
    return run, torch.allclose(c, a.float() @ b.float().T, atol=1e-4)


def pair(body, schedule):
    out = torch.zeros(2, 64, dtype=torch.int32)
    run = Kernel(text_of(body, 256)).run(
        Geometry((2, 1, 1), (64, 1, 1), cluster=2), [None, out], schedule=schedule
    )
    return run, bool((out[0] == 1).all() and (out[1] == 0).all())


def grid(body, schedule):
    given, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    run = Kernel(text_of(body, 16)).run(
        Geometry((2, 1, 1), (1, 1, 1), cooperative=True), [given, out], schedule=schedule
    )
    return run, out.tolist() == [7, 7]


RUNS = {"exchange": (exchange, EXCHANGE), "copy": (copy, COPY), "product": (product, PRODUCT)}
RUNS |= {"pair": (pair, PAIR), "grid": (grid, GRID)}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_what_is_right_is_right_and_nothing_is_reported(name, schedule):
    run, body = RUNS[name]
    outcome, is_right = run(body, schedule)
    assert outcome.findings == ()
    assert is_right


FAULTS = [
    ("exchange", "bar.sync 0;", "", "races|before it is written"),
    ("exchange", "bar.sync 0;", "bar.sync 0, 32;", "races|before it is written"),
    ("exchange", "bar.sync 0;", "bar.sync 0, 96;", "deadlock"),
    ("exchange", "bar.sync 0;", "setp.lt.u32 %q, %t, 40; @%q bar.sync 0;", "under divergence"),
    ("exchange", "%a, 252", "%a, 256", "out of bounds"),
    ("exchange", "%a, 252", "%a, 254", "misaligned shared"),
    ("exchange", "st.shared.u32 [%w], %t;", "", "before it is written"),
    ("exchange", "mul.wide.u32 %d, %t, 4", "mul.wide.u32 %d, %t, 8", "global write out of bounds"),
    ("exchange", "add.u64 %d, %out, %d", "add.u64 %d, %out, 2", "misaligned global"),
    ("exchange", "add.u64 %d, %out, %d", "mov.u64 %d, %out", "two writes race"),
    ("copy", "cp.async.wait_group 0;", "", "while a cp.async to it is under way"),
    ("copy", "wait_group 0;", "wait_group 1;", "while a cp.async to it is under way"),
    ("copy", "bar.sync 0;", "", "races|under way"),
    ("copy", "[%from], 16", "[%from+8], 16", "misaligned source of cp.async"),
    ("product", "fence.proxy.async;", "", "without fence.proxy.async"),
    ("product", "bar.sync 0;", "", "races|nothing wrote|without fence.proxy"),
    ("product", "wgmma.fence.sync.aligned;", "", "without wgmma.fence"),
    ("product", "wait_group.sync.aligned 0", "wait_group.sync.aligned 1", "read before it is wai"),
    ("product", "wgmma.wait_group", "add.f32 %c0, %c0, %c0; wgmma.wait_group", "before it is wait"),
    (
        "product",
        "wgmma.wait_group",
        "st.shared.u32 [%s], %t; wgmma.wait_group",
        "while wgmma",
    ),
    ("product", "%da, 512", "%da, 1024", "out of bounds of shared"),
    ("pair", CLUSTER_BARRIER, "", "races|before it is written"),
    ("pair", CLUSTER_BARRIER + " // the last", "", "leaves while its shared|has left"),
    ("pair", "xor.b32 %other, %rank, 1", "add.u32 %other, %rank, 1", "out of bounds"),
    ("pair", "barrier.cluster.wait;", "bar.sync 0;", "races|before it is|arrives at"),
    ("grid", "atom.add.release", "atom.add.relaxed", "races"),
    ("grid", "ld.acquire.gpu", "ld.relaxed.gpu", "races"),
]


@pytest.mark.parametrize(
    ("name", "old", "new", "report"), FAULTS, ids=lambda x: re.sub(r"\W+", " ", x)[:30]
)
def test_faults_are_reported(name, old, new, report):
    run, body = RUNS[name]
    assert old in body
    found = [
        re.search(report, "\n".join(run(body.replace(old, new, 1), schedule)[0].findings))
        for schedule in SCHEDULES
    ]
    assert any(found)


WRONG = [  # nothing that a machine could report, but another result
    ("product", "0x4000004000010000", "0x8000004000010000"),  # a bit of the swizzle
    ("product", "0x4000004000010000", "0x4000008000010000"),  # twice the stride
    ("pair", "xor.b32 %other, %rank, 1", "mov.u32 %other, %rank"),
    ("copy", "[%from], 16", "[%from], 16, 8"),
]


@pytest.mark.parametrize(("name", "old", "new"), WRONG)
def test_wrong_results_are_wrong(name, old, new):
    run, body = RUNS[name]
    assert old in body
    outcome, is_right = run(body.replace(old, new, 1), SCHEDULES[0])
    assert not is_right or outcome.findings


def test_a_copy_of_a_view_that_is_not_aligned():
    assert re.search("misaligned source", "\n".join(copy(COPY, SCHEDULES[0], 1)[0].findings))


def test_a_place_in_the_source_is_named():
    body = EXCHANGE.replace("bar.sync 0;", "\n.loc 1 42 3\n").replace("ld.param", "\n ld.param", 1)
    text = text_of(body, 256) + '\n.file 1 "csrc/block.cuh"\n'
    outcome = Kernel(text).run(
        Geometry((1, 1, 1), (64, 1, 1)), [None, torch.zeros(64, dtype=torch.int32)]
    )
    assert any("(block.cuh:42)" in line for line in outcome.findings)


def test_what_is_counted():
    counts = exchange(EXCHANGE, SCHEDULES[0])[0].counts
    expected = dict(steps=30, shared_loads=2, shared_stores=2, BAR=2, EXIT=2, ST=4, LD=2)
    assert {name: counts[name] for name in expected} == expected


@pytest.mark.parametrize(
    "line", ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 %a, %b, %c, %d;", "nonsense %a;"]
)
def test_what_is_not_known_is_named(line):
    with pytest.raises(NotDecoded, match=line[:3]):
        Decoder(Source.of(text_of(f"\n{line}\nret;\n", 16))).decode()


def test_lanes_meet_behind_what_parts_them():
    # 0: if; 2: else; 4: both, a loop back to 0; 6: end
    jumps = [Jump(0, 2, True), Jump(1, 4, False), Jump(5, 0, True), Jump(6, None, False)]
    assert meeting_points(jumps, 7) == {0: 4, 1: 4, 5: 6}
