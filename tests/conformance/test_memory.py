"""Loads and stores: masks and what stands for masked lanes, tiles of every rank, strides, far offsets."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from packaging.version import Version

from .harness import (
    BOOL,
    DEVICE,
    DTYPES,
    FLOAT8,
    FLOATS,
    INTEGERS,
    assert_equal,
    edge_values,
    interpreter_gap,
    random,
    random_bits,
    skip_if_interpreted,
)

ALL = (BOOL, *INTEGERS, *FLOATS, *FLOAT8)
UNTOUCHED = 0x5A  # every byte of a buffer that a kernel must leave alone


def untouched(shape, dtype):
    """A tensor whose bytes are recognisable where no kernel wrote."""
    count = math.prod(shape) if isinstance(shape, tuple) else shape
    size = torch.empty(0, dtype=dtype.torch).element_size()
    if dtype is BOOL:
        return torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    raw = np.full(count * size, UNTOUCHED, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype.torch).reshape(shape).to(DEVICE)


@triton.jit
def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask), mask=mask)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("n", [1, 31, 64, 100])
def test_masked_copy_moves_every_bit_and_nothing_else(dtype, n):
    x = random_bits(dtype, 128)
    out = untouched(128, dtype)
    expected = out.clone()
    expected[:n] = x[:n]
    copy[(triton.cdiv(n, 32),)](x, out, n, BLOCK=32)
    assert_equal(out, expected)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_copy_keeps_edge_values(dtype):
    x = edge_values(dtype)
    out = torch.zeros_like(x)
    copy[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    assert_equal(out, x)


@triton.jit
def load_other(x_ptr, out_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=OTHER))


@pytest.mark.parametrize(
    ("dtype", "other", "value"),
    [
        ("float32", 0.0, 0.0),
        ("float32", -1, -1.0),
        ("float32", 0.1, 0.1),
        ("float32", float("inf"), math.inf),
        ("float32", float("-inf"), -math.inf),
        ("float32", float("nan"), math.nan),
        ("float64", 1e-3, 1e-3),
        ("float16", 2.5, 2.5),
        ("float16", float("-inf"), -math.inf),
        pytest.param("bfloat16", 3, 3.0, marks=interpreter_gap("takes an integer for the bits of a bfloat16")),
        ("bfloat16", float("nan"), math.nan),
        ("int32", -7, -7),
        ("int32", 2.5, 2),
        ("int8", -128, -128),
        ("uint8", 255, 255),
        ("int64", 2**40, 2**40),
        ("bool", True, True),
    ],
)
def test_masked_lanes_take_other(dtype, other, value):
    dtype = DTYPES[dtype]
    x = random(dtype, 64)
    out = untouched(64, dtype)
    load_other[(1,)](x, out, 37, OTHER=other, BLOCK=64)
    expected = x.clone()
    expected[37:] = value
    if dtype.name == "float64":
        expected[37:] = float(np.float32(value))  # a float literal within float32's range is a float32
    assert_equal(out, expected)


@triton.jit
def load_other_tensor(x_ptr, other_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    other = tl.load(other_ptr + i)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i % n != 0, other=other))


@pytest.mark.parametrize(
    ("dtype", "other"),
    [("float32", "float32"), ("float32", "int32"), ("float16", "float32"), ("float64", "float32"), ("int64", "int8")],
)
def test_other_may_be_a_tensor_of_another_dtype(dtype, other):
    dtype, other = DTYPES[dtype], DTYPES[other]
    x, fill = random(dtype, 64), random(other, 64, seed=1)
    if other.name == "int32":
        fill = fill % 1000
    out = untouched(64, dtype)
    load_other_tensor[(1,)](x, fill, out, 3, BLOCK=64)
    keep = torch.arange(64, device=DEVICE) % 3 != 0
    assert_equal(out, torch.where(keep, x, fill.to(dtype.torch)))


@triton.jit
def scalar_ops(x_ptr, out_ptr, at, wanted):
    value = tl.load(x_ptr + at)
    tl.store(out_ptr, value)
    tl.store(out_ptr + 1, tl.load(x_ptr + at, mask=wanted > 0, other=7))
    tl.store(out_ptr + 2, value + 1, mask=wanted > 0)
    tl.store(out_ptr + 3, value + 2, mask=wanted <= 0)


@pytest.mark.parametrize("dtype", ["int32", "float32", "int64", "float64", "float16"])
@pytest.mark.parametrize("wanted", [0, 1, 5])
def test_scalar_loads_and_stores(dtype, wanted):
    x = torch.arange(20, device=DEVICE).to(DTYPES[dtype].torch)
    out = torch.full((4,), -1, dtype=x.dtype, device=DEVICE)
    scalar_ops[(1,)](x, out, 13, wanted)
    expected = [13, 13, 14, -1] if wanted else [13, 7, -1, 15]
    assert_equal(out, torch.tensor(expected, dtype=x.dtype))


@triton.jit
def gather_scatter(x_ptr, from_ptr, to_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    source = tl.load(from_ptr + i, mask=mask, other=0)
    target = tl.load(to_ptr + i, mask=mask, other=0)
    tl.store(out_ptr + target, tl.load(x_ptr + source, mask=mask), mask=mask)


@pytest.mark.parametrize("index", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "int64"])
def test_gather_and_scatter_by_index_tensors(index, dtype):
    rng = np.random.default_rng(3)
    n = 150
    source = torch.from_numpy(rng.integers(0, 40, n)).to(index).to(DEVICE)  # many lanes read one element
    target = torch.from_numpy(rng.permutation(n)).to(index).to(DEVICE)
    x = random_bits(DTYPES[dtype], 40)
    out = untouched(n, DTYPES[dtype])
    gather_scatter[(3,)](x, source, target, out, n, BLOCK=64)
    expected = torch.empty_like(out)
    expected[target.long()] = x[source.long()]
    assert_equal(out, expected)


@triton.jit
def far_offsets(x_ptr, out_ptr, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    far = i.to(tl.int64) * 3 + shift
    tl.store(out_ptr - shift + (i + shift), tl.load(x_ptr - shift + far))


@pytest.mark.parametrize("shift", [2**31, 2**33 + 5, -(2**32) - 1])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_offsets_past_2_to_the_31(shift, dtype):
    x = random_bits(DTYPES[dtype], 192)
    out = untouched(64, DTYPES[dtype])
    far_offsets[(1,)](x, out, shift, BLOCK=64)
    assert_equal(out, x[::3].contiguous())


@triton.jit
def copy_3d(x_ptr, out_ptr, n0, n1, n2, s0, s1, s2, t0, t1, t2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr):
    i = tl.arange(0, B0)[:, None, None]
    j = tl.arange(0, B1)[None, :, None]
    k = tl.program_id(0) * B2 + tl.arange(0, B2)[None, None, :]
    mask = (i < n0) & (j < n1) & (k < n2)
    x = tl.load(x_ptr + i * s0 + j * s1 + k * s2, mask=mask)
    tl.store(out_ptr + i * t0 + j * t1 + k * t2, x, mask=mask)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_3d_tiles_with_any_strides(order):
    x = random_bits(DTYPES["int32"], (3, 7, 21))
    view = x.permute(order)
    out = torch.zeros(view.shape, dtype=x.dtype, device=DEVICE)
    grid = (triton.cdiv(view.shape[2], 4),)
    copy_3d[grid](view, out, *view.shape, *view.stride(), *out.stride(), B0=32, B1=32, B2=4)
    assert_equal(out, view.contiguous())


@triton.jit
def copy_5d(x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    a = tl.arange(0, A)[:, None, None, None, None]
    b = tl.arange(0, B)[None, :, None, None, None]
    c = tl.arange(0, C)[None, None, :, None, None]
    d = tl.arange(0, D)[None, None, None, :, None]
    e = tl.arange(0, E)[None, None, None, None, :]
    x = tl.load(x_ptr + (((a * B + b) * C + c) * D + d) * E + e)
    tl.store(out_ptr + (((e * D + d) * C + c) * B + b) * A + a, x)


@pytest.mark.parametrize("shape", [(2, 4, 1, 8, 2), (1, 1, 16, 1, 1), (4, 2, 2, 2, 4)])
def test_5d_tiles(shape):
    x = random_bits(DTYPES["float32"], shape)
    out = untouched(tuple(reversed(shape)), DTYPES["float32"])
    copy_5d[(1,)](x, out, *shape)
    assert_equal(out, x.permute(4, 3, 2, 1, 0).contiguous())


@triton.jit
def broadcast_masks(x_ptr, out_ptr, rows, columns, whole, WHICH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    at = i * N + j
    if WHICH == 0:
        mask = i < rows
    elif WHICH == 1:
        mask = j < columns
    else:
        mask = whole > 0
    x = tl.load(x_ptr + at, mask=mask, other=-5)
    tl.store(out_ptr + at, x)
    tl.store(out_ptr + M * N + at, x + 1, mask=mask)


@pytest.mark.parametrize("whole", [0, 1])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_masks_broadcast_to_the_tile(which, whole):
    if which == 2 and Version(triton.__version__).release >= (3, 9):
        skip_if_interpreted("takes no scalar mask for a tile")
    x = random(DTYPES["int32"], (8, 16)) % 1000
    out = torch.full((2, 8, 16), -1, dtype=torch.int32, device=DEVICE)
    broadcast_masks[(1,)](x, out, 5, 9, whole, WHICH=which, M=8, N=16)
    i, j = torch.arange(8, device=DEVICE)[:, None], torch.arange(16, device=DEVICE)[None, :]
    mask = [i < 5, j < 9, torch.tensor(whole > 0, device=DEVICE)][which].expand(8, 16)
    assert_equal(out[0], torch.where(mask, x, -5))
    assert_equal(out[1], torch.where(mask, x + 1, -1))


@triton.jit
def transpose_tiles(x_ptr, out_ptr, m, n, stride_x, stride_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (i[:, None] < m) & (j[None, :] < n)
    x = tl.load(x_ptr + i[:, None] * stride_x + j[None, :], mask=mask)
    tl.store(out_ptr + j[None, :] * stride_out + i[:, None], x, mask=mask)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (32, 16), (5, 70)])
def test_partial_2d_edges(dtype, shape):
    m, n = shape
    wide = random_bits(DTYPES[dtype], (m, n + 3))
    x = wide[:, :n]
    out = untouched((n, m + 2), DTYPES[dtype])
    expected = out.clone()
    expected[:, :m] = x.T
    transpose_tiles[(triton.cdiv(m, 16), triton.cdiv(n, 32))](
        x, out, m, n, x.stride(0), out.stride(0), BLOCK_M=16, BLOCK_N=32
    )
    assert_equal(out, expected)


@triton.jit
def with_promises(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.assume(n > 0)
    start = tl.multiple_of(tl.program_id(0) * BLOCK, BLOCK)
    i = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), BLOCK), BLOCK)
    same = tl.max_constancy(i // BLOCK, BLOCK)
    x = tl.load(tl.multiple_of(x_ptr, 4) + i, mask=i < n, other=0)
    tl.store(out_ptr + i, x + same, mask=i < n)


def test_promises_do_not_change_values():
    x = random(DTYPES["int32"], 100) % 1000
    out = untouched(100, DTYPES["int32"])
    with_promises[(4,)](x, out, 100, BLOCK=32)
    assert_equal(out, x + torch.arange(100, dtype=torch.int32, device=DEVICE) // 32)
