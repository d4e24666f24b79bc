"""Each wrapper of ``csrc/device.cuh`` does what the PTX ISA says: emulated, and on a GPU.

Both run the kernels of ``cuda_wrappers.cu`` and are compared with the same numbers, computed here
from the definitions, so that what the emulation means and what the hardware does cannot differ.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mal_kernels._cuda import build
from mal_kernels._native import packing
from mal_kernels.testing.emulation import is_found, linked, needs_compiler

SOURCE = Path(__file__).with_name("cuda_wrappers.cu")
Run = Callable[..., int]  # of an entry of cuda_wrappers.cu and its fields: its error


def runner(path: Path, device: str) -> Run:
    """Calls on ``device``; tensors are the caller's, on the CPU, and keep what is written."""
    library = ctypes.CDLL(str(path))

    def run(function: str, **fields: Tensor | int) -> int:
        there = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in fields.items()}
        error = packing.call(library, function, **there, stream=0)
        for name, x in fields.items():
            if isinstance(x, Tensor):
                x.copy_(there[name])  # waits
        return error

    run.path = str(path)
    return run


def nvcc(out: Path, targets: list[str], *flags: str) -> Path:
    options = [*build.FLAGS, *build.architectures(targets), *flags, f"-I{build.source_folder()}"]
    command = [build.find_nvcc(), *options, "-shared", "-cudart=static", str(SOURCE), "-o"]
    subprocess.run([*command, str(out)], check=True)
    return out


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    needs_compiler()
    return runner(linked(tmp_path_factory.mktemp("emulated"), [SOURCE]), "cpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    target = build.target_of(torch.cuda.get_device_capability())
    return runner(nvcc(tmp_path_factory.mktemp("wrappers") / "wrappers.so", [target]), "cuda")


def unwritten(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """What no kernel writes."""
    return torch.full(shape, -99, dtype=dtype)


# --- what each must give: every function takes a Run and asserts ----------------------------------


def conversion(run, name, dtype):
    # all numbers but NaN as bits, and the float32 halfway to the next, just below and just above
    infinity = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[dtype]
    bits = torch.arange(infinity + 1, dtype=torch.int16)
    value = bits.view(dtype).double()
    largest, ulp = value[-2], value[-2] - value[-3]
    half = ((value[:-1] + torch.cat([value[1:-1], (largest + ulp)[None]])) / 2).float()
    even = bits[:-1] + bits[:-1] % 2
    above, below = (half.nextafter(torch.tensor(x)) for x in (torch.inf, 0.0))
    given = torch.cat([value.float(), half, below, above])
    expected = torch.cat([bits, even, bits[:-1], bits[1:]])
    nan = torch.tensor([torch.nan, -torch.nan])
    given = torch.cat([given, -given, nan])
    expected = torch.cat([expected, expected | -0x8000, torch.full((2,), 0x7FFF)]).short()
    # and back, NaN too
    narrow = torch.arange(-0x8000, 0x8000).short().repeat(len(given) // 0x10000 + 1)[: len(given)]
    rounded, out = unwritten(len(given), dtype=torch.int16), unwritten(len(given)).float()
    assert run(
        f"convert_{name}", count=len(given), given=given, rounded=rounded, bits=narrow, out=out
    ) == 0  # fmt: skip
    assert torch.equal(rounded, expected)
    assert torch.equal(bit_pattern(out), bit_pattern(narrow.view(dtype).float()))


def bit_pattern(x: Tensor) -> Tensor:
    """Tells 0 from -0; any NaN is as good as another."""
    return x.where(~x.isnan(), torch.nan).view(torch.int32)


def no_conversion(run):
    given, rounded, out = torch.randn(64), torch.zeros(64), torch.zeros(64)
    fields = dict(count=64, given=given, rounded=rounded, bits=given, out=out)
    assert run("convert_float", **fields) == 0
    assert torch.equal(rounded, given)
    assert torch.equal(out, given)


def maths(run):
    x, y, out = torch.randn(64), torch.randn(64), torch.zeros(3, 64)
    x[0] = y[1] = torch.nan
    x[2], x[3], x[4] = 0.0, torch.inf, 1e-38
    assert run("compute", x=x, y=y, out=out) == 0
    root = x.double().rsqrt()
    torch.testing.assert_close(out[0].double(), root, rtol=2**-22, atol=0, equal_nan=True)
    assert torch.equal(out[1], x.fmax(y))  # of a number and NaN: the number
    assert torch.equal(out[2], x.fmin(y))


def shuffle(run):
    x, out, beside = torch.randn(64), torch.zeros(32, 64), torch.zeros(64)
    assert run("exchange", x=x, out=out, beside=beside) == 0
    partner = torch.arange(64) ^ torch.arange(32)[:, None]  # stays in its warp
    assert torch.equal(out, x[partner])
    assert torch.equal(beside, x.view(2, 32).roll(-1, 1).flatten())


# PTX ISA, "Matrix Fragments for mma.m16n8k16": groupID, threadID_in_group
LANE = torch.arange(32)[:, None]
GROUP, MEMBER = LANE // 4, LANE % 4


def fragment_a(matrix: Tensor) -> Tensor:
    """Of ``[16, 16]``: ``[32, 8]``."""
    i = torch.arange(8)
    return matrix[GROUP + 8 * ((i % 4) // 2), 2 * MEMBER + i % 2 + 8 * (i // 4)]


def fragment_b(matrix: Tensor) -> Tensor:
    """Of ``[16, 8]``: ``[32, 4]``."""
    i = torch.arange(4)
    return matrix[2 * MEMBER + i % 2 + 8 * (i // 2), GROUP + 0 * i]


def fragment_c(matrix: Tensor) -> Tensor:
    """Of ``[16, 8]``: ``[32, 4]``."""
    i = torch.arange(4)
    return matrix[GROUP + 8 * (i // 2), 2 * MEMBER + i % 2]


def product(run, name, dtype):
    # integers, so that every order of summation gives the same; those of the second warp as
    # multiples of a power of two, for float16 below its normal numbers
    a, b, c = (torch.randint(-99, 100, (2, *s)).double() for s in ((16, 16), (16, 8), (16, 8)))
    a[1] *= 2.0**-24
    c[1] *= 2.0**-24
    expected = torch.stack([fragment_c(x).float() for x in c + a @ b])
    fields = [
        torch.stack([fragment(x.to(kind)) for x in matrices])
        for fragment, matrices, kind in (
            (fragment_a, a, dtype), (fragment_b, b, dtype), (fragment_c, c, torch.float32),
        )
    ]  # fmt: skip
    assert run(f"multiply_{name}", **dict(zip("abc", fields, strict=True))) == 0
    assert torch.equal(fields[2], expected)


class Image:
    """Shared memory with tiles in the layouts of the PTX ISA, "Shared Memory Matrix Layout"."""

    def __init__(self):
        self.numbers = torch.zeros(0, dtype=torch.int16)

    def place(self, tile: Tensor, width: int) -> Callable[[int, int], int]:
        """Puts ``tile`` there, swizzled ``width`` bytes wide; its descriptors by row and column."""
        rows, columns = tile.shape
        wide = width // 2  # numbers
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        linear = (column // wide * rows + row) * wide + column % wide
        chunk = linear // 8  # of 16 bytes; those of 128 bytes change places
        index = (chunk ^ chunk // 8 % (width // 16)) * 8 + linear % 8
        begin = len(self.numbers)
        numbers = unwritten(rows * columns, dtype=torch.int16)
        numbers[index] = tile.view(torch.int16)
        self.numbers = torch.cat([self.numbers, numbers])

        def descriptor(row: int, column: int) -> int:
            first = 2 * (begin + int(linear[row, column]))
            fields = (first, 0), (rows * width, 16), (8 * width, 32)
            assert all(0 <= x < 1 << 18 and x % 16 == 0 for x, _ in fields)
            mode = {128: 1, 64: 2, 32: 3}[width]
            bits = sum(x // 16 << shift for x, shift in fields) | mode << 62
            return bits - (bits >> 63 << 64)  # as int64

        return descriptor


# rows, columns and bytes of the swizzle of a tile that holds an operand, and where this begins:
# a[64, 16] by k and by m, b[16, n] by k and by n, for each n and of each warpgroup
PLACES = {
    16: (
        ((64, 64, 128), (0, 48)), ((32, 64, 64), (16, 0)), ((64, 32, 64), (48, 16)),
        ((128, 32, 64), (96, 16)),
        ((64, 128, 128), (0, 64)), ((16, 128, 128), (0, 64)), ((32, 128, 128), (16, 112)),
        ((64, 64, 128), (32, 48)),
    ),
    32: (
        ((64, 32, 64), (0, 16)), ((64, 64, 128), (48, 0)), ((64, 64, 128), (32, 16)),
        ((64, 64, 128), (16, 32)),
        ((64, 64, 128), (0, 32)), ((32, 128, 128), (0, 64)), ((32, 128, 128), (0, 96)),
        ((64, 32, 64), (0, 0)),
    ),
    64: (
        ((64, 16, 32), (0, 0)), ((48, 64, 32), (32, 0)), ((64, 128, 128), (0, 80)),
        ((32, 128, 128), (16, 64)),
        ((64, 64, 128), (0, 0)), ((16, 64, 64), (0, 0)), ((64, 128, 64), (0, 64)),
        ((32, 64, 64), (16, 0)),
    ),
}  # fmt: skip


def products(run, name, dtype):
    # of a warpgroup, from every kind of tile; integers, as above
    for columns, places in PLACES.items():
        image, descriptors, operands = Image(), [], []
        for i, ((rows, wide, width), (row, column)) in enumerate(places):
            tile = torch.randint(-9, 10, (rows, wide)).to(dtype)
            descriptors.append(image.place(tile, width)(row, column))
            shape = (64, 16) if i % 4 < 2 else (16, columns)
            long, short = shape if i % 4 in (0, 3) else reversed(shape)
            operand = tile[row : row + long, column : column + short]
            assert operand.shape == (long, short)
            operands.append((operand if i % 4 in (0, 3) else operand.mT).double())
        in_registers = torch.randint(-9, 10, (2, 64, 16)).to(dtype)
        c = torch.randint(-99, 100, (6, 2, 64, columns)).double()
        expected = c.clone()
        for group in range(2):
            by_k, by_m, *b = operands[4 * group :][:4]
            for i, a in enumerate((by_k, by_m, in_registers[group].double())):
                for j in range(2):
                    expected[2 * i + j, group] += a @ b[j]
        fields = dict(columns=columns, count=len(image.numbers), memory=image.numbers)
        fields["descriptor"] = torch.tensor(descriptors)
        fields["a"] = torch.stack([fragment_a(x) for x in in_registers.view(8, 16, 16)])
        fields["c"] = accumulators(c.float())
        assert run(f"multiply_tiles_{name}", **fields) == 0
        assert torch.equal(fields["c"], accumulators(expected.float()))


def accumulators(c: Tensor) -> Tensor:
    """Of ``[6, 2, 64, n]``, as two warpgroups hold it: ``[6, 256, n / 2]``."""
    parts = c.view(6, 8, 16, -1, 8).transpose(2, 3).flatten(0, 2)  # of 16 x 8
    held = torch.stack([fragment_c(x) for x in parts]).view(6, 8, -1, 32, 4)
    return held.transpose(2, 3).reshape(6, 256, -1).contiguous()


def matrices(run):
    # ldmatrix: rows of eight 16-bit numbers anywhere, at multiples of 16 bytes
    tile = torch.randint(-0x8000, 0x8000, (128, 8)).short()
    row = torch.randperm(128)[:64]
    straight, transposed = unwritten(64, 4), unwritten(64, 4)
    count = tile.numel()
    fields = dict(count=count, tile=tile, row=8 * row, straight=straight, transposed=transposed)
    assert run("load", **fields) == 0
    eight = tile[row].view(2, 4, 8, 8)  # of each warp: four matrices
    pair = torch.stack([2 * MEMBER[:, 0], 2 * MEMBER[:, 0] + 1], 1)
    for out, expected in ((straight, eight), (transposed, eight.mT)):
        found = out.view(torch.int16).view(2, 32, 4, 2)
        assert torch.equal(found, expected[:, :, GROUP, pair].transpose(1, 2))


def copies(run):
    given, exists = torch.randint(1, 2**31, (2, 64, 4)).int(), torch.randint(0, 2, (2, 64))
    first, second = unwritten(64, 4), unwritten(64, 4)
    assert run("copy_in", given=given, exists=exists, first=first, second=second) == 0
    expected = given * exists[..., None].int()  # else zeros
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1].flip(0))


def clusters(run, blocks):
    ranks, read, written = unwritten(16), unwritten(16, blocks, 32), unwritten(16, 32)
    fields = dict(blocks=16, of_cluster=blocks, ranks=ranks, read=read, written=written)
    assert run("meet", **fields) == 0
    block = torch.arange(16).view(-1, blocks)
    names = 100 * block[:, :, None] + torch.arange(32)  # [clusters, blocks of each, 32]
    assert torch.equal(ranks, (torch.arange(16) % blocks).int())
    assert torch.equal(read, names.repeat_interleave(blocks, 0).int())
    assert torch.equal(written, names.roll(1, 1).view(16, 32).int())


def grids(run):
    between, read = unwritten(100), unwritten(100, 32)
    assert run("gather", blocks=100, between=between, read=read) == 0
    block = torch.arange(100)
    assert torch.equal(between, (100 + block).int())
    followers = (block[:, None] + 1 + torch.arange(32)) % 100
    assert torch.equal(read, (100 + followers).int())
    # more than run at once would wait for each other for ever
    assert run("gather", blocks=10**6, between=between, read=read) != 0


def launch(grid, block, bytes, cluster, found):
    sizes = {f"{name}{i}": n for name, d in (("g", grid), ("b", block)) for i, n in enumerate(d)}
    return dict(**sizes, bytes=bytes, cluster=cluster, found=found)


def launches(run):
    # 227 KB is what a block may have on Hopper; a cluster is of neighbours along x
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    most, cluster = (227, 2) if capability >= (9, 0) else (99, 1)
    for kilobytes, grid, block in ((1, (4, 3, 2), (8, 4, 2)), (most, (2, 1, 1), (1024, 1, 1))):
        coordinates = [
            torch.cartesian_prod(*(torch.arange(n) for n in reversed(d))).flip(1)
            for d in (block, grid)
        ]
        threads, blocks = map(len, coordinates)
        found = unwritten(blocks, threads, 8)
        assert run("start", **launch(grid, block, 1024 * kilobytes, cluster, found)) == 0
        assert torch.equal(found[..., :3], coordinates[0].expand(blocks, -1, -1).int())
        assert torch.equal(found[..., 3:6], coordinates[1][:, None].expand(-1, threads, -1).int())
        last = 100 + torch.arange(blocks).int()[:, None]
        assert torch.equal(found[..., 6], last.expand(-1, threads))
        assert not found[..., 7].any()  # aligned to 1024 bytes


def refusals(run):
    # of a launch that cannot be: an error, and nothing runs; an empty grid is none
    found, one = unwritten(64, 8), (1, 1, 1)
    for case in (
        dict(grid=one, block=one, bytes=228 * 1024, cluster=1),
        dict(grid=one, block=(1025, 1, 1), bytes=4, cluster=1),
        dict(grid=(3, 1, 1), block=one, bytes=4, cluster=2),
        dict(grid=(32, 1, 1), block=one, bytes=4, cluster=32),
    ):
        assert run("start", **launch(**case, found=found)) != 0, case
    assert run("start", **launch((0, 1, 1), one, 4, 1, found)) == 0
    assert (found == -99).all()


CHECKS = {
    "from_float, to_float bf16": partial(conversion, name="bf16", dtype=torch.bfloat16),
    "from_float, to_float fp16": partial(conversion, name="fp16", dtype=torch.float16),
    "from_float, to_float float": no_conversion,
    "rsqrtf, max, min": maths,
    "__shfl_xor_sync, __syncwarp": shuffle,
    "mma bf16": partial(product, name="bf16", dtype=torch.bfloat16),
    "mma fp16": partial(product, name="fp16", dtype=torch.float16),
    "wgmma bf16": partial(products, name="bf16", dtype=torch.bfloat16),
    "wgmma fp16": partial(products, name="fp16", dtype=torch.float16),
    "load_matrices": matrices,
    "copy_async": copies,
    "cluster of 1": partial(clusters, blocks=1),
    "cluster of 2": partial(clusters, blocks=2),
    "cluster of 8": partial(clusters, blocks=8),
    "launch_together, grid_sync": grids,
    "launch": launches,
    "launch refuses": refusals,
}


@pytest.mark.parametrize("where", ["emulated", pytest.param("compiled", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CHECKS)
def test_wrapper(name, where, request):
    run = request.getfixturevalue(where)
    clusters = name in ("cluster of 2", "cluster of 8")
    if where == "compiled" and clusters and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    if where == "compiled" and "wgmma" in name and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only compute capability 9.0 has wgmma")
    CHECKS[name](run)


# a wrapper of the emulation, and what to put in its place
WRONG = {
    "from_float, to_float bf16": ("(bits >> 16 & 1)", "1"),  # ties away from zero
    "from_float, to_float fp16": ("static_cast<_Float16>(x)", "static_cast<_Float16>(x * 1.0001f)"),
    "rsqrtf, max, min": ("std::fmax(x, y)", "std::max(x, y)"),
    "__shfl_xor_sync, __syncwarp": ("% 32) ^ mask)", "% 32 + mask) % 32)"),
    "mma bf16": ("upper + 2 * (k / 8)", "2 * upper + k / 8"),
    "mma fp16": ("4 + k / 8, k % 2", "4 + k % 2, k / 8"),
    "wgmma bf16": ("address ^ address / 128 % chunks * 16", "address"),
    "wgmma fp16": ("index / 16 / chunks * d.leading", "index / 16 / chunks * d.stride"),
    "load_matrices": ("8 * matrix + 2 * (lane % 4) + i", "8 * matrix + lane % 4 + 4 * i"),
    "copy_async": ("copies.size() > groups;", "copies.size() > groups + 1;"),
    "cluster of 2": ("emu::shared_memory(rank) + offset", "emu::shared_memory(rank ^ 1) + offset"),
    "launch_together, grid_sync": (
        "void grid_sync() { emu::cluster_barrier(); }",
        "void grid_sync() {}",
    ),
    "launch": ("t / block.x % block.y", "t / block.y % block.y"),
    "launch refuses": ("cluster > 16 ||", "false ||"),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """All of :data:`WRONG` at once."""
    needs_compiler()
    csrc = tmp_path_factory.mktemp("wrong") / "csrc"
    shutil.copytree(build.source_folder(), csrc)
    for path in csrc.glob("emu/emulation.*"):
        text = path.read_text()
        for right, planted in WRONG.values():
            text = text.replace(right, planted)
        path.write_text(text)
    return runner(linked(csrc.parent, [SOURCE], csrc), "cpu")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_wrapper_is_found(name, wrong):
    texts = [p.read_text() for p in build.source_folder().glob("emu/emulation.*")]
    assert sum(text.count(WRONG[name][0]) for text in texts) == 1
    with pytest.raises(AssertionError):
        CHECKS[name](wrong)


@pytest.mark.parametrize(
    ("call", "report"),
    [
        ("'copy_in', given + 4, exists, out, out", "takes 16 bytes at no multiple of 16"),
        ("'load', 512, given, rows(4), out, out", "takes 16 bytes at no multiple of 16"),
        ("'load', 512, given, rows(512), out, out", "takes 16 bytes outside its shared memory"),
        ("'multiply_wrongly', 0, out", "gives wgmma what has not passed fence_proxy_async"),
        ("'multiply_wrongly', 1, out", "begins an operand inside a swizzling pattern"),
        ("'multiply_wrongly', 2, out", "multiplies what other threads of its warpgroup do not"),
        ("'multiply_wrongly', 3, out", "multiplies without wgmma_fence"),
        ("'multiply_wrongly', 4, out", "takes accumulators that wgmma still writes"),
        ("'multiply_wrongly', 5, out", "changes what wgmma still reads"),
        ("'multiply_wrongly', 6, out", "writes accumulators of wgmma"),
        ("'multiply_wrongly', 7, out", "takes accumulators that wgmma still writes"),
    ],
)
def test_what_the_hardware_would_refuse_ends_the_emulation(call, report, emulated):
    code = f"""if True:
        import ctypes, struct
        library, memory = ctypes.CDLL({emulated.path!r}), ctypes.create_string_buffer(8192)
        given = exists = out = (ctypes.addressof(memory) + 15) // 16 * 16
        def rows(at):
            ctypes.memmove(exists + 4096, struct.pack("=64q", *[at] * 64), 512)
            return exists + 4096
        def call(function, *fields):
            getattr(library, function)(struct.pack(f"={{len(fields) + 1}}q", *fields, 0))
        call({call})
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert report in done.stderr


def test_no_wrapper_is_left_out():
    csrc, tests = build.source_folder(), SOURCE.read_text()
    device, emulation = (csrc / f for f in ("device.cuh", "emu/emulation.h"))
    written = re.findall(r"^(?:MAL_DEVICE \S+|int) (\w+)\(", device.read_text(), re.MULTILINE)
    twice = {name for name in written if re.search(rf"\b{name}\(", emulation.read_text())}
    assert {"mma", "launch", "copy_wait"} <= twice
    assert {name for name in twice if not re.search(rf"\b{name}[<(]", tests)} == set()


@pytest.mark.skipif(not is_found(build.find_nvcc), reason="nvcc is not installed")
@pytest.mark.slow
def test_compiles_for_every_target(tmp_path):
    nvcc(tmp_path / "wrappers.so", [*build.TARGETS], *build.GATE)
