"""Block pointers and tensor descriptors: tiles given by shape, strides and offsets."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .harness import (
    DEVICE,
    DTYPES,
    assert_equal,
    gpu_differs,
    interpreter_gap,
    needs,
    random,
    random_bits,
    skip_if_interpreted,
)

pytestmark = pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
needs_block_pointers = needs("tl.advance")  # whose companion make_block_ptr stays as a name that only raises


@pytest.fixture(autouse=True)
def _workspace():
    """A GPU keeps descriptors that a kernel makes in memory which the caller allocates."""
    triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.int8, device=DEVICE))


def tile(x, offsets, shape, fill):
    """The part of ``x`` under a tile, with ``fill`` outside of ``x``."""
    out = torch.full(shape, fill, dtype=torch.float64).to(x.dtype)
    inside = [
        range(max(0, -o), max(0, -o, min(size, extent - o)))
        for o, size, extent in zip(offsets, shape, x.shape, strict=True)
    ]
    target = tuple(slice(r.start, r.stop) for r in inside)
    source = tuple(slice(r.start + o, r.stop + o) for r, o in zip(inside, offsets, strict=True))
    out[target] = x.cpu()[source]
    return out


# ---- block pointers ----


@triton.jit
def block_pointer_copy(
    x_ptr, out_ptr, m, n, stride_m, stride_n, row, column, CHECK: tl.constexpr, PADDING: tl.constexpr,
    ORDER: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    x = tl.make_block_ptr(x_ptr, (m, n), (stride_m, stride_n), (row, column), (M, N), ORDER)
    out = tl.make_block_ptr(out_ptr, (M, N), (N, 1), (0, 0), (M, N), (1, 0))
    if PADDING == "":
        tl.store(out, tl.load(x, boundary_check=CHECK))
    else:
        tl.store(out, tl.load(x, boundary_check=CHECK, padding_option=PADDING))


@needs_block_pointers
@pytest.mark.parametrize(("row", "column", "check"), [
    (0, 0, ()), (4, 16, ()), (13, 0, (0,)), (0, 25, (1,)), (13, 25, (0, 1)), (-3, 0, (0,)), (5, -9, (0, 1)),
    (40, 0, (0,)),
])  # fmt: skip
@pytest.mark.parametrize("padding", ["zero", "nan"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_block_pointer_loads(dtype, padding, row, column, check):
    if (dtype, padding) == ("bfloat16", "nan") and check:
        skip_if_interpreted("cannot pad bfloat16 with NaN")
    x = random(DTYPES[dtype], (20, 40))
    out = torch.zeros(8, 16, dtype=x.dtype, device=DEVICE)
    block_pointer_copy[(1,)](x, out, 20, 40, 40, 1, row, column, check, padding if check else "", (1, 0), 8, 16)
    assert_equal(out, tile(x, (row, column), (8, 16), 0.0 if padding == "zero" else math.nan))


@needs_block_pointers
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
def test_block_pointers_to_integers_pad_with_zero(dtype):
    x = random_bits(DTYPES[dtype], (10, 20))
    out = torch.ones(16, 32, dtype=x.dtype, device=DEVICE)
    block_pointer_copy[(1,)](x, out, 10, 20, 20, 1, 0, 0, (0, 1), "zero", (1, 0), 16, 32)
    expected = torch.zeros(16, 32, dtype=x.dtype)
    expected[:10, :20] = x.cpu()
    assert_equal(out, expected)


@needs_block_pointers
@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_block_pointers_with_any_strides(order):
    x = random_bits(DTYPES["float32"], (40, 24))
    view = x.T[2:, ::2]  # column-major and strided
    out = torch.zeros(8, 16, dtype=torch.float32, device=DEVICE)
    strides = view.stride()
    block_pointer_copy[(1,)](view, out, *view.shape, *strides, 8, 4, (0, 1), "zero", order, 8, 16)
    assert_equal(out, view[8:16, 4:20].contiguous())


@triton.jit
def block_pointer_matrix(x_ptr, out_ptr, m, n, M: tl.constexpr, N: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (m, n), (n, 1), (tl.program_id(0) * M, 0), (M, N), (1, 0))
    out = tl.make_block_ptr(out_ptr, (m, n), (n, 1), (tl.program_id(0) * M, 0), (M, N), (1, 0))
    running = tl.zeros((M, N), tl.int32)
    for _ in range(0, n, N):
        running += tl.load(x, boundary_check=(0, 1), padding_option="zero")
        tl.store(out, running, boundary_check=(0, 1))
        x = tl.advance(x, (0, N))
        out = tl.advance(out, (0, N))


@needs_block_pointers
@pytest.mark.parametrize(("m", "n"), [(8, 32), (13, 50), (1, 1), (20, 7)])
def test_block_pointers_advance_in_loops(m, n):
    x = random(DTYPES["int32"], (m, n)) % 1000
    guarded = torch.full((m * n + 64,), -1, dtype=torch.int32, device=DEVICE)
    block_pointer_matrix[(triton.cdiv(m, 8),)](x, guarded, m, n, M=8, N=16)
    padded = np.pad(x.cpu().numpy(), ((0, 0), (0, -n % 16)))
    expected = padded.reshape(m, -1, 16).cumsum(axis=1).reshape(m, -1)[:, :n]
    assert_equal(guarded[: m * n].reshape(m, n), expected.astype(np.int32))
    assert_equal(guarded[m * n :], torch.full((64,), -1, dtype=torch.int32))


@triton.jit
def block_pointer_edges(x_ptr, out_ptr, n, back):
    x = tl.make_block_ptr(x_ptr, (n,), (1,), (16,), (16,), (0,))
    x = tl.advance(x, (back,))  # the same block pointer serves a load, a step and another load
    here = tl.load(x, boundary_check=(0,), padding_option="zero")
    there = tl.load(tl.advance(x, (3,)), boundary_check=(0,), padding_option="zero")
    tl.store(out_ptr + tl.arange(0, 16), here)
    tl.store(out_ptr + 16 + tl.arange(0, 16), there)


@needs_block_pointers
@pytest.mark.parametrize("back", [0, -4, -20, 10])
def test_block_pointers_of_one_dimension(back):
    x = random(DTYPES["float32"], 30)
    out = torch.zeros(2, 16, dtype=torch.float32, device=DEVICE)
    block_pointer_edges[(1,)](x, out, 30, back)
    assert_equal(out, torch.stack([tile(x, (16 + back + step,), (16,), 0.0) for step in (0, 3)]))


@triton.jit
def block_pointer_3d(x_ptr, out_ptr, a, b, c, at_a, at_b, at_c):
    x = tl.make_block_ptr(x_ptr, (a, b, c), (b * c, c, 1), (at_a, at_b, at_c), (2, 4, 16), (2, 1, 0))
    y = tl.load(x, boundary_check=(0, 1, 2), padding_option="zero")
    tl.store(out_ptr + tl.arange(0, 128), tl.reshape(y, (128,)))


@needs_block_pointers
@pytest.mark.parametrize("offsets", [(0, 0, 0), (2, 3, 9), (-1, 4, -5)])
def test_block_pointers_of_three_dimensions(offsets):
    x = random(DTYPES["float32"], (3, 5, 20))
    out = torch.zeros(2, 4, 16, dtype=torch.float32, device=DEVICE)
    block_pointer_3d[(1,)](x, out, *x.shape, *offsets)
    assert_equal(out, tile(x, offsets, (2, 4, 16), 0.0))


# ---- tensor descriptors ----


@triton.jit
def made_in_kernel(
    x_ptr, out_ptr, m, n, stride_m, row, column, PADDING: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    x = tl.make_tensor_descriptor(
        x_ptr, shape=[m, n], strides=[stride_m, 1], block_shape=[M, N], padding_option=PADDING
    )
    tl.static_assert(x.block_shape[0] == M)
    tl.static_assert(x.dtype == x_ptr.dtype.element_ty)
    y = x.load([row, column])
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], y)


OFFSETS = [(0, 0), (4, 16), (13, 32), (-3, 0), (5, -16), (40, 0), (0, 48), (-8, -16)]


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "int64", "float16", "bfloat16", "float32"])
def test_descriptor_loads_fill_with_zero(dtype, offsets):
    x = random_bits(DTYPES[dtype], (20, 48))
    out = torch.ones(8, 16, device=DEVICE).to(x.dtype)
    made_in_kernel[(1,)](x, out, 20, 40, 48, *offsets, "zero", 8, 16)
    assert_equal(out, tile(x[:, :40], offsets, (8, 16), 0.0))


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_descriptor_loads_fill_with_nan(dtype, offsets):
    if dtype == "bfloat16" and offsets not in OFFSETS[:2]:  # which lie inside
        skip_if_interpreted("cannot pad bfloat16 with NaN")
    x = random(DTYPES[dtype], (20, 48))
    out = torch.ones(8, 16, device=DEVICE).to(x.dtype)
    made_in_kernel[(1,)](x, out, 20, 40, 48, *offsets, "nan", 8, 16)
    assert_equal(out, tile(x[:, :40], offsets, (8, 16), math.nan))


@triton.jit
def store_by_descriptor(x_ptr, out_ptr, m, n, stride_m, row, column, M: tl.constexpr, N: tl.constexpr):
    out = tl.make_tensor_descriptor(out_ptr, [m, n], [stride_m, 1], [M, N])
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    out.store([row, column], x)


@pytest.mark.parametrize("offsets", OFFSETS)
def test_descriptor_stores_stay_inside(offsets):
    x = random(DTYPES["float32"], (8, 16))
    out = torch.full((22, 48), -1.0, device=DEVICE)
    store_by_descriptor[(1,)](x, out[1:], 20, 40, 48, *offsets, 8, 16)
    expected = torch.full((22, 48), -1.0)
    for i in range(8):
        for j in range(16):
            row, column = offsets[0] + i, offsets[1] + j
            if 0 <= row < 20 and 0 <= column < 40:
                expected[1 + row, column] = x[i, j]
    assert_equal(out, expected)


def test_descriptor_stores_convert():
    x = random(DTYPES["float32"], (8, 16)) * 50
    out = torch.zeros(8, 16, dtype=torch.int32, device=DEVICE)
    store_by_descriptor[(1,)](x, out, 8, 16, 16, 0, 0, 8, 16)
    assert_equal(out, x.int())


@triton.jit
def copy_1d(x, out):
    out.store([0], x.load([4]))


@triton.jit
def copy_3d(x, out):
    out.store([0, 0, 0], x.load([1, -2, 4]))


@triton.jit
def copy_4d(x, out):
    out.store([0, 0, 0, 0], x.load([-1, 1, 2, 4]))


@triton.jit
def copy_5d(x, out):
    out.store([0, 0, 0, 0, 0], x.load([1, -1, 0, 2, 4]))


RANKS = [
    (copy_1d, (4,), (20,), (16,)),
    (copy_3d, (1, -2, 4), (2, 5, 16), (2, 4, 8)),
    (copy_4d, (-1, 1, 2, 4), (2, 2, 4, 12), (2, 2, 4, 16)),
    (copy_5d, (1, -1, 0, 2, 4), (2, 3, 2, 4, 8), (1, 2, 2, 4, 8)),
]


@pytest.mark.parametrize(("kernel", "offsets", "shape", "block"), RANKS, ids=["1d", "3d", "4d", "5d"])
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_host_descriptors_of_every_rank(kernel, offsets, shape, block, padding):
    x = random(DTYPES["float32"], shape)
    out = torch.zeros(block, dtype=torch.float32, device=DEVICE)
    source = TensorDescriptor.from_tensor(x, list(block), padding)
    kernel[(1,)](source, TensorDescriptor.from_tensor(out, list(block)))
    assert_equal(out, tile(x, offsets, block, 0.0 if padding == "zero" else math.nan))


@triton.jit
def rows_of_host_descriptor(x, out, scale, n):
    m: tl.constexpr = x.block_shape[0]
    columns: tl.constexpr = x.block_shape[1]
    row = tl.program_id(0) * m
    for column in range(0, n, columns):
        tile = x.load([row, column]) * scale
        out.store([row, column], tile.to(out.dtype))


@pytest.mark.parametrize("block", [(8, 16), (16, 32)])
@pytest.mark.parametrize("shape", [(8, 16), (21, 56), (1, 8)])
def test_a_host_descriptor_covers_a_matrix(shape, block):
    x = random(DTYPES["float32"], shape)
    out = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    grid = (triton.cdiv(shape[0], block[0]),)
    rows_of_host_descriptor[grid](
        TensorDescriptor.from_tensor(x, list(block)), TensorDescriptor.from_tensor(out, list(block)), 2.0, shape[1]
    )
    assert_equal(out, (x * 2).half())


def test_a_host_descriptor_of_a_strided_view():
    x = random(DTYPES["float32"], (32, 64))
    view = x[4:20, 8:40]
    out = torch.zeros(8, 16, dtype=torch.float32, device=DEVICE)
    source = TensorDescriptor(view, [16, 30], [64, 1], [8, 16])
    rows_of_host_descriptor[(1,)](source, TensorDescriptor.from_tensor(out, [8, 16]), 1.0, 16)
    assert_equal(out, view[:8, :16].contiguous())


@triton.jit
def descriptor_matmul(a, b, out_ptr, k, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        acc = tl.dot(a.load([row, start]), tl.trans(b.load([column, start])), acc, input_precision="ieee")
    at = (row + tl.arange(0, M))[:, None] * n + (column + tl.arange(0, N))[None, :]
    tl.store(out_ptr + at, acc)


def test_a_matrix_product_through_descriptors():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(-3, 4, (32, 72))).half().to(DEVICE) for _ in range(2))
    out = torch.zeros(32, 32, dtype=torch.float32, device=DEVICE)
    sources = [TensorDescriptor.from_tensor(x, [16, 32]) for x in (a, b)]
    descriptor_matmul[(2, 2)](*sources, out, 72, 32, M=16, N=16, K=32)
    assert_equal(out, (a.cpu().double() @ b.cpu().double().T + 0).float())


@triton.jit
def descriptor_update(out_ptr, x_ptr, m, n, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    out = tl.make_tensor_descriptor(out_ptr, [m, n], [n, 1], [M, N])
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "add":
        out.atomic_add([2, 0], x)
    elif OP == "max":
        out.atomic_max([2, 0], x)
    elif OP == "min":
        out.atomic_min([2, 0], x)
    elif OP == "and":
        out.atomic_and([2, 0], x)
    elif OP == "or":
        out.atomic_or([2, 0], x)
    else:
        out.atomic_xor([2, 0], x)


@interpreter_gap("has no atomics by descriptor")
@pytest.mark.parametrize(("dtype", "op"), [
    ("float32", "add"), ("float16", "add"), ("bfloat16", "add"), ("uint64", "add"),
    *((d, op) for d in ("int32", "uint32") for op in ("add", "max", "min", "and", "or", "xor")),
    *((d, op) for d in ("int64", "uint64") for op in ("max", "min", "and", "or", "xor")),
])  # fmt: skip
def test_atomic_updates_by_descriptor(dtype, op):
    dtype = DTYPES[dtype]
    x, out = random(dtype, (8, 16), seed=1), random(dtype, (6, 16))
    rows, inside = out.cpu()[2:6], x.cpu()[:4]
    if op == "add":
        expected = rows + inside if dtype.is_float else torch.from_numpy(rows.numpy() + inside.numpy())
    else:
        names = {"max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or}
        expected = torch.from_numpy(names.get(op, np.bitwise_xor)(rows.numpy(), inside.numpy()))
    untouched = out[:2].clone()
    descriptor_update[(1,)](out, x, 6, 16, OP=op, M=8, N=16)
    assert_equal(out[2:6], expected)
    assert_equal(out[:2], untouched)


@triton.jit
def gather_rows(x_ptr, rows_ptr, out_ptr, m, n, column, ROWS: tl.constexpr, N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [m, n], [n, 1], [1, N])
    rows = tl.load(rows_ptr + tl.arange(0, ROWS))
    y = x.gather(rows, column)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :], y)


@triton.jit
def scatter_rows(x_ptr, rows_ptr, out_ptr, m, n, column, ROWS: tl.constexpr, N: tl.constexpr):
    out = tl.make_tensor_descriptor(out_ptr, [m, n], [n, 1], [1, N])
    rows = tl.load(rows_ptr + tl.arange(0, ROWS))
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :])
    out.scatter(x, rows, column)


NOT_EVERY_GPU = gpu_differs("gathers by descriptor need Blackwell")


@NOT_EVERY_GPU
@pytest.mark.parametrize("column", [0, 8, 32])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_gathered_by_descriptor(dtype, column):
    x = random(DTYPES[dtype], (20, 40))
    rows = torch.tensor([3, 19, 0, 25, 7, 7, -1, 12], dtype=torch.int32)
    out = torch.ones(8, 16, dtype=x.dtype, device=DEVICE)
    gather_rows[(1,)](x, rows.to(DEVICE), out, 20, 40, column, ROWS=8, N=16)
    assert_equal(out, torch.cat([tile(x, (int(r), column), (1, 16), 0.0) for r in rows]))


@NOT_EVERY_GPU
@pytest.mark.parametrize("column", [0, 32])
def test_rows_scattered_by_descriptor(column):
    x = random(DTYPES["float32"], (8, 16))
    rows = torch.tensor([3, 19, 0, 25, 7, 8, -1, 12], dtype=torch.int32)
    out = torch.full((20, 40), -1.0, device=DEVICE)
    scatter_rows[(1,)](x, rows.to(DEVICE), out, 20, 40, column, ROWS=8, N=16)
    expected = torch.full((20, 40), -1.0)
    for k, row in enumerate(rows.tolist()):
        if 0 <= row < 20:
            expected[row, column : column + 16] = x.cpu()[k, : 40 - column]
    assert_equal(out, expected)
