"""Makes Triton's interpreter (``TRITON_INTERPRET=1``) an oracle for kernels on a CPU.

Stock, it computes bfloat16 as raw integers, truncates casts, treats TF32 as float32, dereferences
any address and runs the programs of a launch one after the other, so that no race shows.
:func:`install`:

* **bfloat16** values live in float32 arrays and are rounded to nearest even after every operation;
* **tl.dot** rounds TF32 operands and refuses sides below 16, which have no tensor-core instruction;
* **loads and stores** must fall inside a tensor argument of the launch, or :class:`MemoryFault`;
* **races**: two programs of one launch touch one byte, one of them with a plain store:
  :class:`Race`;
* **scans and reductions** combine in tree order as on a GPU, so a non-associative function is
  wrong;
* **tl.device_assert** is evaluated, and int32 arithmetic that overflows is an error.

It cannot show races inside one program, missing barriers, approximate maths or what a GPU may
launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


class MemoryFault(RuntimeError):
    """A lane reads or writes outside every tensor argument of its launch."""


class Race(RuntimeError):
    """The result depends on the order in which the programs of a launch run."""


def install() -> None:
    """Idempotent; for the whole process."""
    if getattr(Builder, "is_checked", False):
        return
    Builder.is_checked = True
    _patch_bfloat16()
    _patch_dot()
    _patch_index()
    _patch_scans()
    _patch_memory()
    _patch_warnings()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)
    builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (16, 16, 16)


# --- numbers --------------------------------------------------------------------------------------


def round_to(x: np.ndarray, kept_bits: int) -> np.ndarray:
    """float32 rounded to nearest even at ``kept_bits`` of mantissa: 7 is bfloat16, 10 TF32."""
    drop = 23 - kept_bits
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    even = (bits >> drop) & 1
    rounded = (bits + even + ((1 << (drop - 1)) - 1)) & np.uint32(-(1 << drop) & 0xFFFFFFFF)
    return np.where(np.isfinite(x), rounded.view(np.float32), x).reshape(np.shape(x))


def _bits(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _patch_bfloat16() -> None:
    stock_dtype, memory = interpreter._get_np_dtype, interpreter._interpreter

    def numpy_dtype(dtype):
        return np.dtype(np.float32) if dtype.scalar == tl.bfloat16 else stock_dtype(dtype)

    def round_data(self):
        if self.dtype.scalar == tl.bfloat16 and self.data.dtype.kind == "f":
            self.data = round_to(self.data, 7)

    def cast(self, source, dtype):
        return Handle(source.data.astype(numpy_dtype(dtype)), dtype.scalar)

    def bitcast(self, source, dtype):
        data = _bits(source.data) if source.dtype.scalar == tl.bfloat16 else source.data
        if dtype.scalar == tl.bfloat16:
            return Handle(_from_bits(data.view(np.uint16)), tl.bfloat16)
        return Handle(data.view(numpy_dtype(dtype)), dtype.scalar)

    def load(self, pointers, mask, other, *_):
        dtype = pointers.get_element_ty()
        is_bf16 = dtype == tl.bfloat16
        raw = np.dtype(np.uint16) if is_bf16 else numpy_dtype(dtype)
        lanes = np.ascontiguousarray(np.broadcast_to(mask.data, pointers.data.shape))
        data = memory.load(pointers.data, lanes, np.zeros(pointers.data.shape, raw), raw)
        data = _from_bits(data) if is_bf16 else data
        return Handle(data if other is None else np.where(lanes, data, other.data), dtype)

    def store(self, pointers, value, mask, *_):
        data = _bits(value.data) if pointers.get_element_ty() == tl.bfloat16 else value.data
        data, lanes = (np.broadcast_to(x, pointers.data.shape) for x in (data, mask.data))
        memory.store(pointers.data, np.ascontiguousarray(data), np.ascontiguousarray(lanes))

    interpreter._get_np_dtype = numpy_dtype
    interpreter._validate_np_data_size = lambda data, dtype: True
    Handle.__post_init__ = round_data
    casts = "si_to_fp ui_to_fp fp_to_si fp_to_ui fp_ext fp_trunc"
    for name in ("cast_impl", *(f"create_{c}" for c in casts.split())):
        setattr(Builder, name, cast)
    Builder.create_fp_to_fp = lambda self, source, dtype, rounding: cast(self, source, dtype)
    Builder.create_bitcast = bitcast
    Builder.create_fabs = lambda self, x: Handle(np.abs(x.data), x.dtype.scalar)
    Builder.get_bf16 = lambda self, value: Handle(np.array([value], np.float32), tl.bfloat16)
    Builder.create_masked_load = load
    Builder.create_masked_store = store


def _patch_dot() -> None:
    def dot(self, a, b, accumulator, input_precision, _):
        x, y = (t.data.astype(accumulator.data.dtype) for t in (a, b))
        if a.dtype.scalar == tl.float32 and str(input_precision).endswith("TF32"):
            x, y = round_to(x, 10), round_to(y, 10)
        return Handle(np.matmul(x, y) + accumulator.data, accumulator.dtype.scalar)

    Builder.create_dot = dot


def _patch_index() -> None:
    """``for i in range(n)`` with a runtime ``n``: numpy makes no int of a 1-element array."""
    stock = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        stock(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patched


def _patch_warnings() -> None:
    """A device does not warn of an overflow in a lane that is masked later."""
    stock = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            stock(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call


# --- tree order -----------------------------------------------------------------------------------


def _combine(op, left: list[np.ndarray], right: list[np.ndarray], dtypes) -> list[np.ndarray]:
    left, right = (
        [op.to_tensor(x, t) for x, t in zip(side, dtypes, strict=True)] for side in (left, right)
    )
    out = op.combine_fn.fn(*left, *right)
    out = [out] if isinstance(out, tl.tensor) else list(out)
    return [
        np.broadcast_to(o.handle.data, x.handle.data.shape) for o, x in zip(out, left, strict=True)
    ]


def _patch_scans() -> None:
    def scan(self, inputs):
        """Recursive doubling on whole slices: log2(n) combinations."""
        dtypes, xs = [x.dtype for x in inputs], [np.asarray(x.handle.data) for x in inputs]
        shape = [-1 if i == self.axis % xs[0].ndim else 1 for i in range(xs[0].ndim)]
        index, shift = np.arange(xs[0].shape[self.axis]).reshape(shape), 1
        while shift < index.size:
            new = _combine(self, [np.roll(x, shift, self.axis) for x in xs], xs, dtypes)
            xs = [np.where(index < shift, x, y) for x, y in zip(xs, new, strict=True)]
            shift *= 2
        return [self.to_tensor(x, t) for x, t in zip(xs, dtypes, strict=True)]

    def reduce(self, inputs):
        dtypes, xs = [x.dtype for x in inputs], [np.asarray(x.handle.data) for x in inputs]
        rank, axis = xs[0].ndim, self.axis
        xs = [x.reshape(-1) if axis is None else np.moveaxis(x, axis, 0) for x in xs]
        while len(xs[0]) > 1:
            xs = _combine(self, [x[::2] for x in xs], [x[1::2] for x in xs], dtypes)
        xs = [x[0] for x in xs]
        if self.keep_dims:
            xs = [x.reshape((1,) * rank) if axis is None else np.expand_dims(x, axis) for x in xs]
        return [self.to_tensor(x, t) for x, t in zip(xs, dtypes, strict=True)]

    interpreter.ScanOps.generic_scan = scan
    interpreter.ReduceOps.generic_reduce = reduce


# --- memory and races -----------------------------------------------------------------------------

FREE, SEVERAL = -1, -2


class _Shadow:
    """The bytes of a launch's tensors: where they are, and which program last touched each."""

    def __init__(self) -> None:
        self.races = True

    def launch(self, arguments) -> None:
        spans: list[list[int]] = []
        for begin, end in sorted(_extent(t) for t in _flat(arguments) if t.numel()):
            if spans and begin <= spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([begin, end])
        self.begin, self.end = np.array(spans, np.uint64).reshape(-1, 2).T
        sizes = (self.end - self.begin).astype(np.int64)
        self.base = np.concatenate([[0], sizes.cumsum()])[:-1]
        self.writer, self.reader = np.full((2, sizes.sum()), FREE, np.int32)
        self.atomic = np.zeros(sizes.sum(), bool)

    def touch(self, builder, kind: str, pointers, mask) -> None:
        lanes = np.broadcast_to(mask, pointers.data.shape)
        address = pointers.data[lanes].ravel()
        if not len(address):
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        span = np.searchsorted(self.begin, address, side="right") - 1
        outside = (span < 0) | (address + np.uint64(size) > self.end[span])
        if outside.any():
            raise MemoryFault(
                f"{kind} by program {builder.grid_idx}: {outside.sum()} of {len(address)} lanes "
                "are outside every tensor of the launch"
            )
        if self.races:
            offset = (address - self.begin[span]).astype(np.int64) + self.base[span]
            self._order(builder, kind, (offset[:, None] + np.arange(size)).ravel())

    def _order(self, builder, kind: str, at: np.ndarray) -> None:
        me = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        writer, reader = self.writer[at], self.reader[at]
        both_atomic = self.atomic[at] & (kind == "atomic")
        written = (writer != FREE) & (writer != me) & ~both_atomic
        read = (reader != FREE) & (reader != me) & (kind != "load")
        if written.any() or read.any():
            verb = "written" if written.any() else "read"
            raise Race(
                f"{kind} by program {builder.grid_idx} of bytes {verb} by another of its launch"
            )
        if kind == "load":
            self.reader[at] = np.where((reader == FREE) | (reader == me), me, SEVERAL)
        else:
            self.writer[at], self.atomic[at] = me, kind == "atomic"


def _flat(arguments):
    """The tensors among arguments, those in tuples too."""
    for x in arguments:
        if torch.is_tensor(x):
            yield x
        elif isinstance(x, tuple):
            yield from _flat(x)


def _extent(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


_shadow = _Shadow()


@contextlib.contextmanager
def unchecked_races():
    """For a kernel whose programs synchronise by flags."""
    _shadow.races = False
    try:
        yield
    finally:
        _shadow.races = True


def _patch_memory() -> None:
    stock = interpreter.GridExecutor._init_args_hst

    def to_host(self, args, kwargs):
        args, kwargs = stock(self, args, kwargs)
        _shadow.launch([*args, *kwargs.values()])
        return args, kwargs

    interpreter.GridExecutor._init_args_hst = to_host
    everywhere = types.SimpleNamespace(data=True)
    for name, kind, pointer, mask in (
        ("create_masked_load", "load", 0, 1),
        ("create_masked_store", "store", 0, 2),
        ("create_atomic_rmw", "atomic", 1, 3),
        ("create_atomic_cas", "atomic", 0, None),
    ):
        setattr(Builder, name, _checked(getattr(Builder, name), kind, pointer, mask, everywhere))


def _checked(function, kind: str, pointer: int, mask: int | None, everywhere):
    def checked(self, *args):
        lanes = everywhere if mask is None else args[mask]
        _shadow.touch(self, kind, args[pointer], lanes.data)
        return function(self, *args)

    return checked
