"""Prefix operations and histograms."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from packaging.version import Version

from .harness import DEVICE, DTYPES, assert_equal, interpreted, needs, random, random_bits

SHAPE = (4, 8, 2)
BFLOAT16 = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(
        interpreted() and Version(triton.__version__).release >= (3, 9),
        reason="Triton's interpreter: computes on the bits of a bfloat16, which earlier versions widen",
    ),
)


def whole_numbers(dtype, shape, low, high, seed=0):
    """Values whose sums and products stay exact."""
    drawn = np.random.default_rng(seed).integers(max(low, dtype.min), high, shape, endpoint=True)
    return torch.from_numpy(drawn).to(dtype.torch).to(DEVICE)


def fold(function, axis, reverse, *operands):
    """Every partial result along an axis, one element after the other; several operands make tuples."""
    moved = [np.moveaxis(np.flip(x, axis) if reverse else x, axis, 0) for x in operands]
    rows = [tuple(x[0] for x in moved)]
    for k in range(1, moved[0].shape[0]):
        rows.append(function(*rows[-1], *(x[k] for x in moved)))
    results = [np.moveaxis(np.stack(r), 0, axis) for r in zip(*rows, strict=True)]
    return [np.ascontiguousarray(np.flip(r, axis)) if reverse else np.ascontiguousarray(r) for r in results]


@triton.jit
def offsets_3d(A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    i, j, k = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    return (i * B + j) * C + k


@triton.jit
def scan_3d(
    x_ptr, out_ptr, OP: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    at = offsets_3d(A, B, C)
    x = tl.load(x_ptr + at)
    y = tl.cumsum(x, axis=AXIS, reverse=REVERSE) if OP == "sum" else tl.cumprod(x, axis=AXIS, reverse=REVERSE)
    if DTYPE is not None:
        tl.static_assert(y.dtype == DTYPE)
    tl.store(out_ptr + at, y)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    "dtype",
    ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "float16", BFLOAT16, "float32", "float64"],
)
def test_cumsum(dtype, axis, reverse):
    dtype = DTYPES[dtype]
    x = whole_numbers(dtype, SHAPE, -2, 2) if dtype.is_float else random_bits(dtype, SHAPE)
    wide = dtype
    if not dtype.is_float and dtype.bits < 32:  # small integers widen
        wide = DTYPES["int32" if dtype.is_signed else "uint32"]
    out = torch.zeros(SHAPE, dtype=wide.torch, device=DEVICE)
    scan_3d[(1,)](x, out, "sum", axis, reverse, None if dtype.is_float else wide.triton, *SHAPE)
    values = x.double().cpu().numpy() if dtype.is_float else x.cpu().numpy().astype(wide.name)
    (expected,) = fold(lambda a, b: (a + b,), axis, reverse, values)
    assert_equal(out, torch.from_numpy(expected).to(wide.torch))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", ["int32", "int64", "float16", BFLOAT16, "float32", "float64"])
def test_cumprod(dtype, axis, reverse):
    dtype = DTYPES[dtype]
    x = whole_numbers(dtype, SHAPE, 1, 2) if dtype.is_float else random_bits(dtype, SHAPE)
    out = torch.zeros_like(x)
    scan_3d[(1,)](x, out, "product", axis, reverse, None, *SHAPE)
    values = x.double().cpu().numpy() if dtype.is_float else x.cpu().numpy()
    (expected,) = fold(lambda a, b: (a * b,), axis, reverse, values)
    assert_equal(out, torch.from_numpy(expected).to(dtype.torch))


@triton.jit
def scan_1d(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    carried = 0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n, other=0)
        running = tl.cumsum(x, 0)
        tl.store(out_ptr + i, running + carried, mask=i < n)
        carried += tl.sum(x)


@pytest.mark.parametrize("n", [1, 64, 200])
def test_cumsum_carried_over_blocks(n):
    x = random(DTYPES["int32"], n) % 100000
    out = torch.zeros_like(x)
    scan_1d[(1,)](x, out, n, BLOCK=64)
    assert_equal(out, x.cpu().cumsum(0).int())


@triton.jit
def compose_affine(slope_a, shift_a, slope_b, shift_b):
    return slope_a * slope_b, shift_a * slope_b + shift_b


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def segmented_sum(head_a, sum_a, head_b, sum_b):
    return head_a | head_b, tl.where(head_b > 0, sum_b, sum_a + sum_b)


@triton.jit
def latest(value_a, index_a, known_a, value_b, index_b, known_b):
    return (
        tl.where(known_b > 0, value_b, value_a),
        tl.where(known_b > 0, index_b, index_a),
        known_a | known_b,
    )


@triton.jit
def custom_scan(
    x_ptr, y_ptr, out_ptr, OP: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    at = offsets_3d(A, B, C)
    size: tl.constexpr = A * B * C
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == "larger":
        tl.store(out_ptr + at, tl.associative_scan(x, AXIS, larger, reverse=REVERSE))
    elif OP == "affine":
        slope, shift = tl.associative_scan((x, y), AXIS, compose_affine, reverse=REVERSE)
        tl.store(out_ptr + at, slope)
        tl.store(out_ptr + size + at, shift)
    elif OP == "segments":
        heads, sums = tl.associative_scan(((x % 3 == 0).to(tl.int32), y), AXIS, segmented_sum, reverse=REVERSE)
        tl.store(out_ptr + at, heads)
        tl.store(out_ptr + size + at, sums)
    else:
        value, index, known = tl.associative_scan((x, at, (y % 4 == 0).to(tl.int8)), AXIS, latest, reverse=REVERSE)
        tl.store(out_ptr + at, tl.where(known > 0, value, 0))
        tl.store(out_ptr + size + at, tl.where(known > 0, index, -1))


def custom_expected(op, x, y, axis, reverse):
    at = np.arange(x.size, dtype=np.int32).reshape(x.shape)
    if op == "larger":
        return fold(lambda a, b: (np.maximum(a, b),), axis, reverse, x)
    if op == "affine":
        return fold(lambda a, s, b, t: (a * b, s * b + t), axis, reverse, x, y)
    if op == "segments":
        heads = (x % 3 == 0).astype(np.int32)
        return fold(lambda h, s, g, t: (h | g, np.where(g > 0, t, s + t)), axis, reverse, heads, y)
    value, index, known = fold(
        lambda v, i, k, w, j, m: (np.where(m > 0, w, v), np.where(m > 0, j, i), k | m),
        axis,
        reverse,
        x,
        at,
        (y % 4 == 0).astype(np.int8),
    )
    return [np.where(known > 0, value, 0).astype(np.int32), np.where(known > 0, index, -1).astype(np.int32)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("op", ["larger", "affine", "segments", "latest"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_associative_scans_keep_the_order(op, axis, reverse):
    # Apart from the first, the functions do not commute. Products and sums wrap at 32 bits, which stays associative.
    x, y = (torch.from_numpy(np.random.default_rng(k).integers(-9, 99, SHAPE).astype(np.int32)) for k in (0, 1))
    if op in ("segments", "latest"):
        x, y = x.abs(), y.abs()
    expected = np.stack(custom_expected(op, x.numpy(), y.numpy(), axis, reverse))
    out = torch.zeros(expected.shape, dtype=torch.int32, device=DEVICE)
    custom_scan[(1,)](x.to(DEVICE), y.to(DEVICE), out, op, axis, reverse, *SHAPE)
    assert_equal(out, expected)


@triton.jit
def recurrence(decay_ptr, x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    _, state = tl.associative_scan((tl.load(decay_ptr + i), tl.load(x_ptr + i)), 0, compose_affine)
    tl.store(out_ptr + i, state)


def test_a_linear_recurrence_in_floats():
    # Powers of two and few bits: no rounding, whatever the order of combination.
    rng = np.random.default_rng(2)
    decay, x = 2.0 ** -rng.integers(0, 2, 32), rng.integers(-8, 8, 32).astype(np.float64)
    state, expected = 0.0, []
    for a, b in zip(decay, x, strict=True):
        state = a * state + b
        expected.append(state)
    out = torch.zeros(32, dtype=torch.float64, device=DEVICE)
    recurrence[(1,)](torch.from_numpy(decay).to(DEVICE), torch.from_numpy(x).to(DEVICE), out, N=32)
    assert_equal(out, torch.tensor(expected, dtype=torch.float64))


@triton.jit
def cumsum_as(x_ptr, out_ptr, DTYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.cumsum(tl.load(x_ptr + i), 0, dtype=DTYPE)
    tl.static_assert(y.dtype == DTYPE)
    tl.store(out_ptr + i, y)


@pytest.mark.parametrize(("source", "dtype"), [("int8", "int64"), ("int32", "int64"), ("float16", "float32")])
def test_cumsum_in_a_wider_dtype(source, dtype):
    source, dtype = DTYPES[source], DTYPES[dtype]
    x = torch.full((32,), source.max, dtype=source.torch, device=DEVICE)
    out = torch.zeros(32, dtype=dtype.torch, device=DEVICE)
    cumsum_as[(1,)](x, out, DTYPE=dtype.triton, N=32)
    assert_equal(out, (torch.arange(1, 33).double() * source.max).to(dtype.torch))


@triton.jit
def cumprod_small(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.cumprod(tl.load(x_ptr + i), 0))


@needs("3.9")
def test_cumprod_widens_small_integers():
    x = torch.full((16,), 3, dtype=torch.int8, device=DEVICE)
    out = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    cumprod_small[(1,)](x, out, N=16)
    assert_equal(out, torch.tensor([3**k for k in range(1, 17)], dtype=torch.int32))


@triton.jit
def count(x_ptr, out_ptr, n, MASKED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    counts = tl.histogram(x, BINS, mask=i < n) if MASKED else tl.histogram(x, BINS)
    tl.store(out_ptr + tl.arange(0, BINS), counts)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("bins", "block"), [(2, 64), (16, 256), (128, 32)])
def test_histogram(bins, block, masked):
    x = torch.from_numpy(np.random.default_rng(bins).integers(0, bins, block).astype(np.int32))
    n = block * 2 // 3 if masked else block
    out = torch.full((bins,), -1, dtype=torch.int32, device=DEVICE)
    count[(1,)](x.to(DEVICE), out, n, MASKED=masked, BINS=bins, BLOCK=block)
    assert_equal(out, torch.bincount(x[:n], minlength=bins).int())
