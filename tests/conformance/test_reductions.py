"""Reductions, scans and histograms."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import (
    BOOL,
    DEVICE,
    DTYPES,
    FLOATS,
    INTEGERS,
    assert_close_ulps,
    assert_equal,
    interpreter_gap,
    random,
    random_bits,
    skip_if_interpreted,
)

BFLOAT16 = DTYPES["bfloat16"]
BFLOAT16_GAP = interpreter_gap("computes on the bits of a bfloat16")
SHAPE = (4, 8, 2)


def params(dtypes, gap=BFLOAT16_GAP):
    return [pytest.param(d, marks=gap if d is BFLOAT16 else (), id=str(d)) for d in dtypes]


def whole_numbers(dtype, shape, low, high, seed=0):
    """Floats and integers whose sums and products stay exact."""
    drawn = np.random.default_rng(seed).integers(max(low, dtype.min), high, shape, endpoint=True)
    return torch.from_numpy(drawn).to(dtype.torch).to(DEVICE)


def numpy_of(x):
    return x.double().cpu().numpy() if x.dtype.is_floating_point else x.cpu().numpy()


@triton.jit
def load_3d(x_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    i, j, k = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    return tl.load(x_ptr + (i * B + j) * C + k)


@triton.jit
def store_flat(out_ptr, y, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.reshape(y, (N,)))


@triton.jit
def reduce_3d(
    x_ptr, out_ptr, OP: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr, DTYPE: tl.constexpr, OUT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    x = load_3d(x_ptr, A, B, C)
    if OP == "sum":
        y = tl.sum(x, axis=AXIS, keep_dims=KEEP)
    elif OP == "max":
        y = tl.max(x, axis=AXIS, keep_dims=KEEP)
    elif OP == "min":
        y = x.min(axis=AXIS, keep_dims=KEEP)
    elif OP == "argmax":
        y = tl.argmax(x, AXIS, keep_dims=KEEP)
    elif OP == "argmin":
        y = x.argmin(AXIS, keep_dims=KEEP)
    elif OP == "xor":
        y = tl.xor_sum(x, axis=AXIS, keep_dims=KEEP)
    else:
        y = tl.reduce_or(x, AXIS, keep_dims=KEEP)
    if DTYPE is not None:
        tl.static_assert(y.dtype == DTYPE)
    if KEEP:
        tl.static_assert(len(y.shape) == 3)
    if AXIS is None:
        if KEEP:
            tl.store(out_ptr + tl.arange(0, 1)[:, None, None], y)
        else:
            tl.store(out_ptr, y)
    else:
        store_flat(out_ptr, y, OUT)


def reduce(x, op, axis, keep, dtype, promoted=None):
    """Run ``reduce_3d`` into a tensor of ``dtype``, in the shape that NumPy gives the result."""
    shape = list(x.shape) if axis is not None else [1, 1, 1]
    if keep and axis is not None:
        shape[axis] = 1
    elif axis is not None:
        del shape[axis]
    out = torch.zeros(shape if keep or axis is not None else [], dtype=dtype, device=DEVICE)
    reduce_3d[(1,)](x, out, op, axis, keep, promoted, out.numel(), *x.shape)
    return out


PROMOTED = {
    "int8": "int32",
    "int16": "int32",
    "uint8": "uint32",
    "uint16": "uint32",
    "bool": "uint32",
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", [*INTEGERS, BOOL], ids=str)
def test_integer_sum_widens_and_wraps(dtype, axis, keep):
    x = random_bits(dtype, SHAPE)
    wide = DTYPES[PROMOTED.get(dtype.name, dtype.name)]
    if dtype.name == "int32" and axis is None and not keep:
        skip_if_interpreted("cannot wrap a sum to one scalar")
    out = reduce(x, "sum", axis, keep, wide.torch, wide.triton)
    assert_equal(out, np.asarray(np.sum(numpy_of(x), axis=axis, keepdims=keep, dtype=wide.name)))


@pytest.mark.parametrize("axis", [0, 1, 2, None, -1, -3])
@pytest.mark.parametrize("dtype", params(FLOATS))
def test_float_sum_of_whole_numbers_is_exact(dtype, axis):
    x = whole_numbers(dtype, SHAPE, -2, 2)
    out = reduce(x, "sum", axis, False, dtype.torch, dtype.triton)
    assert_equal(out, torch.as_tensor(np.sum(numpy_of(x), axis=axis)).to(dtype.torch))


@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_float_sum_rounds_once_per_addition(dtype, axis):
    dtype = DTYPES[dtype]
    x = random(dtype, (4, 64, 2))
    out = reduce(x, "sum", axis, False, dtype.torch)
    wide = numpy_of(x)
    terms = x.numel() if axis is None else x.shape[axis]
    slack = terms * 2.0 ** -(dtype.mantissa + 1) * np.sum(np.abs(wide), axis=axis)
    exact = np.sum(wide.astype(np.longdouble), axis=axis)
    assert_close_ulps(out, np.asarray(exact, np.float64), dtype, 0.5, absolute=slack)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_max_and_min(dtype, op, axis, keep):
    x = random(dtype, SHAPE)
    promoted = tl.int32 if dtype.kind != "float" and dtype.bits < 32 else None
    out = reduce(x, op, axis, keep, dtype.torch, promoted)
    expected = getattr(np, op)(numpy_of(x), axis=axis, keepdims=keep)
    assert_equal(out, torch.as_tensor(np.asarray(expected)).to(dtype.torch))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64", "float16", "bfloat16", "float32", "float64"])
def test_argmax_and_argmin_take_the_first_of_ties(dtype, op, axis, keep):
    x = whole_numbers(DTYPES[dtype], (8, 16, 4), 1, 3)  # nearly every line has ties
    out = reduce(x, op, axis, keep, torch.int32, tl.int32)
    assert_equal(out, getattr(np, op)(numpy_of(x), axis=axis, keepdims=keep).astype(np.int32))


@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("op", ["xor", "or"])
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "uint64"])
def test_bitwise_reductions(dtype, op, axis):
    x = random_bits(DTYPES[dtype], SHAPE) & random_bits(DTYPES[dtype], SHAPE, seed=1)
    out = reduce(x, op, axis, False, x.dtype, DTYPES[dtype].triton)
    function = np.bitwise_xor if op == "xor" else np.bitwise_or
    assert_equal(out, np.asarray(function.reduce(numpy_of(x), axis=axis)))


@triton.jit
def both(x_ptr, value_ptr, index_ptr, AXIS: tl.constexpr, LEFT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    high, at_high = tl.max(x, AXIS, return_indices=True, return_indices_tie_break_left=LEFT)
    low, at_low = tl.min(x, AXIS, return_indices=True, return_indices_tie_break_left=LEFT)
    out: tl.constexpr = N if AXIS == 0 else M
    i = tl.arange(0, out)
    tl.store(value_ptr + i, high)
    tl.store(index_ptr + i, at_high)
    tl.store(value_ptr + out + i, low)
    tl.store(index_ptr + out + i, at_low)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["int32", "float16", "float32"])
def test_values_with_their_indices(dtype, axis, left):
    dtype = DTYPES[dtype]
    order = np.random.default_rng(1).permutation(8 * 32).reshape(8, 32) - 100  # no ties: any winner is the winner
    x = torch.from_numpy(order).to(dtype.torch).to(DEVICE)
    values = torch.zeros(2, 256 // 8 if axis == 0 else 8, dtype=dtype.torch, device=DEVICE)
    indices = torch.zeros(values.shape, dtype=torch.int32, device=DEVICE)
    both[(1,)](x, values, indices, AXIS=axis, LEFT=left, M=8, N=32)
    assert_equal(values, torch.from_numpy(np.stack([order.max(axis), order.min(axis)])).to(dtype.torch))
    assert_equal(indices, np.stack([order.argmax(axis), order.argmin(axis)]).astype(np.int32))


@triton.jit
def extremes(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out_ptr + tl.arange(0, M), tl.max(x, axis=1))
    tl.store(out_ptr + M + tl.arange(0, M), tl.min(x, axis=1))


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_max_and_min_ignore_nan_unless_all_are(dtype):
    x = random(dtype, (8, 16))
    x[0, 3] = x[1, 0] = x[2, 15] = math.nan
    x[3, :] = math.nan
    x[4, :-1] = math.nan
    x[5, 4], x[5, 5], x[5, 6] = math.inf, -math.inf, math.nan
    out = torch.zeros(2, 8, dtype=dtype.torch, device=DEVICE)
    extremes[(1,)](x, out, M=8, N=16)
    rows = numpy_of(x)
    expected = np.stack([np.fmax.reduce(rows, axis=1), np.fmin.reduce(rows, axis=1)])
    assert_equal(out, torch.from_numpy(expected).to(dtype.torch))


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def conjunction(a, b):
    return a & b


@triton.jit
def larger_magnitude(value_a, index_a, value_b, index_b):
    first = (tl.abs(value_a) > tl.abs(value_b)) | ((tl.abs(value_a) == tl.abs(value_b)) & (index_a < index_b))
    return tl.where(first, value_a, value_b), tl.where(first, index_a, index_b)


@triton.jit
def first_nan(nan_a, index_a, nan_b, index_b):
    take_a = ((nan_a == nan_b) & (index_a < index_b)) | (nan_a > nan_b)
    return tl.where(take_a, nan_a, nan_b), tl.where(take_a, index_a, index_b)


@triton.jit
def welford(mean_a, square_a, count_a, mean_b, square_b, count_b):
    delta = mean_b - mean_a
    count = count_a + count_b
    share = count_b / count
    return mean_a + delta * share, square_a + square_b + delta * delta * count_a * share, count


@triton.jit
def log_sum_exp(max_a, sum_a, max_b, sum_b):
    high = tl.maximum(max_a, max_b)
    return high, sum_a * tl.exp(max_a - high) + sum_b * tl.exp(max_b - high)


@triton.jit
def custom_one(x_ptr, out_ptr, OP: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr, OUT: tl.constexpr):
    x = load_3d(x_ptr, 4, 8, 2)
    y = tl.reduce(x, AXIS, multiply, keep_dims=KEEP) if OP == "product" else x.reduce(AXIS, conjunction, keep_dims=KEEP)
    store_flat(out_ptr, y, OUT)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("op", "dtype"), [("product", "int32"), ("product", "int64"), ("product", "float32"), ("and", "int8")]
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_custom_reductions_of_one_operand(op, dtype, axis, keep):
    dtype = DTYPES[dtype]
    x = whole_numbers(dtype, SHAPE, -2, 2) if dtype.is_float else random_bits(dtype, SHAPE)
    if op == "and":
        x = x | random_bits(dtype, SHAPE, seed=1) | 5
    function = np.multiply if op == "product" else np.bitwise_and
    expected = function.reduce(x.cpu().numpy(), axis=axis, keepdims=keep, dtype=dtype.name)
    out = torch.zeros(expected.shape, dtype=x.dtype, device=DEVICE)
    custom_one[(1,)](x, out, op, axis, keep, out.numel())
    # A product of floats may be taken in any order, and so a zero of either sign may come out.
    assert_equal(out + 0 if dtype.is_float else out, expected + 0 if dtype.is_float else expected)


@triton.jit
def custom_pair(x_ptr, value_ptr, index_ptr, OP: tl.constexpr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    if OP == "magnitude":
        value, index = tl.reduce((x, at), AXIS, larger_magnitude)
    else:
        is_nan = x != x  # noqa: PLR0124
        value, index = tl.reduce((is_nan.to(tl.int32), at), AXIS, first_nan)
    out: tl.constexpr = N if AXIS == 0 else M
    tl.store(value_ptr + tl.arange(0, out), value)
    tl.store(index_ptr + tl.arange(0, out), index)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_operands_of_different_dtypes(axis):
    x = whole_numbers(DTYPES["float32"], (8, 16), -4, 4) + 0.5
    out = 16 if axis == 0 else 8
    value = torch.zeros(out, dtype=torch.float32, device=DEVICE)
    index = torch.zeros(out, dtype=torch.int32, device=DEVICE)
    custom_pair[(1,)](x, value, index, OP="magnitude", AXIS=axis, M=8, N=16)
    where = np.expand_dims(np.argmax(np.abs(x.cpu().numpy()), axis=axis), axis)
    places = np.arange(128, dtype=np.int32).reshape(8, 16)
    assert_equal(value, np.take_along_axis(x.cpu().numpy(), where, axis).squeeze(axis))
    assert_equal(index, np.take_along_axis(places, where, axis).squeeze(axis))


def test_the_place_of_the_first_nan():
    x = random(DTYPES["float32"], (4, 32))
    x[0, 7] = x[0, 20] = x[2, 0] = x[3, 31] = math.nan
    found = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    index = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    custom_pair[(1,)](x, found, index, OP="nan", AXIS=1, M=4, N=32)
    assert_equal(found, torch.tensor([1, 0, 1, 1], dtype=torch.int32))
    assert_equal(index, torch.tensor([7, 32, 64, 127], dtype=torch.int32))


@triton.jit
def moments(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    mean, square, count = tl.reduce((x, tl.zeros_like(x), tl.full((M, N), 1, x.dtype)), 1, welford)
    high, total = tl.reduce((x, tl.full((M, N), 1, x.dtype)), 1, log_sum_exp)
    i = tl.arange(0, M)
    tl.store(out_ptr + i, mean)
    tl.store(out_ptr + M + i, square)
    tl.store(out_ptr + 2 * M + i, count)
    tl.store(out_ptr + 3 * M + i, high)
    tl.store(out_ptr + 4 * M + i, total)


def test_welford_and_log_sum_exp():
    float32 = DTYPES["float32"]
    x = random(float32, (4, 64)) * 2 + 3
    out = torch.zeros(5, 4, dtype=torch.float32, device=DEVICE)
    moments[(1,)](x, out, M=4, N=64)
    wide = numpy_of(x)
    mean, high = wide.mean(axis=1), wide.max(axis=1)
    square, total = np.sum((wide - mean[:, None]) ** 2, axis=1), np.sum(np.exp(wide - high[:, None]), axis=1)
    # Each of the 63 combinations rounds a few times, by at most half a unit of something no larger than these sums.
    roundings, unit = 63 * 8, 2.0**-24
    assert_close_ulps(out[0], mean, float32, 0, absolute=roundings * unit * np.abs(wide).max(axis=1))
    assert_close_ulps(out[1], square, float32, 0, absolute=roundings * unit * np.sum(wide**2, axis=1))
    assert_equal(out[2], torch.full((4,), 64.0))
    assert_equal(out[3], x.amax(1))
    spread = float((high - wide.min(axis=1)).max())  # rounding an argument of exp costs this much more
    assert_close_ulps(out[4], total, float32, 0, absolute=roundings * (1 + spread) * unit * total)


@triton.jit
def reduce_4d(x_ptr, out_ptr, AXIS: tl.constexpr, OUT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
              D: tl.constexpr):  # fmt: skip
    at = tl.arange(0, A)[:, None, None, None] * B + tl.arange(0, B)[None, :, None, None]
    at = (at * C + tl.arange(0, C)[None, None, :, None]) * D + tl.arange(0, D)[None, None, None, :]
    x = tl.load(x_ptr + at)
    store_flat(out_ptr, tl.sum(x, AXIS), OUT)
    store_flat(out_ptr + OUT, tl.argmax(x, AXIS), OUT)


@pytest.mark.parametrize("shape", [(2, 4, 8, 2), (1, 8, 1, 4)])
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -2])
def test_reductions_of_4d_tiles(axis, shape):
    x = random(DTYPES["int32"], shape) % 1000
    expected = np.stack([x.cpu().numpy().sum(axis), x.cpu().numpy().argmax(axis)]).astype(np.int32)
    out = torch.zeros(expected.shape, dtype=torch.int32, device=DEVICE)
    reduce_4d[(1,)](x, out, axis, out[0].numel(), *shape)
    assert_equal(out, expected)


@triton.jit
def reduce_1d(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = 0
    high = tl.load(x_ptr)
    lanes = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n, other=0)
        total += tl.sum(x)
        high = tl.maximum(high, tl.max(tl.where(i < n, x, -(2**31)), axis=0))
        lanes += x
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, high)
    tl.store(out_ptr + 2, tl.sum(lanes, axis=0))
    tl.store(out_ptr + 3, tl.sum(tl.max(lanes, axis=0, keep_dims=True)))


@pytest.mark.parametrize("n", [1, 63, 1000])
def test_reductions_to_scalars_in_a_loop(n):
    x = random(DTYPES["int32"], n) % 10000 - 5000
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    reduce_1d[(1,)](x, out, n, BLOCK=64)
    values = x.cpu().numpy()
    lanes = np.pad(values, (0, -n % 64)).reshape(-1, 64).sum(axis=0)
    assert_equal(out, np.array([values.sum(), values.max(), values.sum(), lanes.max()]).astype(np.int32))


@triton.jit
def normalise(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    centred = x - tl.sum(x, axis=1, keep_dims=True)
    columns = tl.max(centred, axis=0, keep_dims=True) - tl.min(centred, axis=0)[None, :]
    tl.store(out_ptr + at, centred * columns + tl.sum(tl.sum(x, axis=0), axis=0))


def test_reduced_tiles_broadcast_back():
    x = random(DTYPES["int32"], (8, 16)) % 100
    out = torch.zeros_like(x)
    normalise[(1,)](x, out, M=8, N=16)
    values = x.cpu().numpy()
    centred = values - values.sum(axis=1, keepdims=True)
    assert_equal(out, (centred * np.ptp(centred, axis=0) + values.sum()).astype(np.int32))


@triton.jit
def sum_as(x_ptr, out_ptr, DTYPE: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    total = tl.sum(x, axis=0, dtype=DTYPE)
    tl.static_assert(total.dtype == DTYPE)
    tl.store(out_ptr, total)


@pytest.mark.parametrize(("source", "dtype"), [("float16", "float32"), ("int32", "int64"), ("int8", "int64")])
def test_sum_in_a_wider_dtype(source, dtype):
    source, dtype = DTYPES[source], DTYPES[dtype]
    x = torch.full((64,), source.max, dtype=source.torch, device=DEVICE)
    out = torch.zeros(1, dtype=dtype.torch, device=DEVICE)
    sum_as[(1,)](x, out, DTYPE=dtype.triton, N=64)
    assert_equal(out, torch.tensor([64 * source.max], dtype=dtype.torch))


@triton.jit
def softmax_rows(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    weights = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    tl.store(out_ptr + at, weights / tl.sum(weights, axis=1, keep_dims=True))


def test_softmax_with_masked_scores():
    float32 = DTYPES["float32"]
    x = random(float32, (4, 64))
    x[:, 40:] = -math.inf
    out = torch.zeros_like(x)
    softmax_rows[(1,)](x, out, M=4, N=64)
    wide = numpy_of(x)
    weights = np.exp(wide - wide.max(axis=1, keepdims=True))
    # The sum of 64 positive terms, exp to 2 ulps of a rounded argument (at most 8 here), one division to 2 ulps.
    assert_close_ulps(out, weights / weights.sum(axis=1, keepdims=True), float32, 64 + 2 * (2 + 8) + 2)


@triton.jit
def truth(x_ptr, y_ptr, out_ptr, AXIS: tl.constexpr, OUT: tl.constexpr):
    x = load_3d(x_ptr, 4, 8, 2)
    flags = x > tl.load(y_ptr)
    store_flat(out_ptr, tl.reduce_or(flags, AXIS), OUT)
    store_flat(out_ptr + OUT, tl.reduce(flags, AXIS, conjunction), OUT)
    store_flat(out_ptr + 2 * OUT, tl.max(flags, AXIS) > 0, OUT)
    store_flat(out_ptr + 3 * OUT, tl.sum(flags, AXIS) > 1, OUT)
    store_flat(out_ptr + 4 * OUT, tl.xor_sum(flags, AXIS), OUT)


@pytest.mark.parametrize("limit", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_reductions_of_truth_values(axis, limit):
    x = random(DTYPES["float32"], SHAPE)
    flags = x.cpu().numpy() > limit
    expected = [flags.any(axis), flags.all(axis), flags.any(axis), flags.sum(axis) > 1, flags.sum(axis) % 2 == 1]
    out = torch.zeros(5, expected[0].size, dtype=torch.bool, device=DEVICE)
    truth[(1,)](x, torch.tensor([limit], device=DEVICE), out, AXIS=axis, OUT=expected[0].size)
    assert_equal(out, np.stack([e.ravel() for e in expected]))
