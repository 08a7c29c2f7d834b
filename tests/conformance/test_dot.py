"""Matrix products of tiles."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .harness import DEVICE, DTYPES, assert_close_ulps, assert_equal, interpreter_gap, random

FLOAT32 = DTYPES["float32"]
BFLOAT16 = pytest.param("bfloat16", marks=interpreter_gap("multiplies the bits of a bfloat16"))
ACCUMULATOR = {"int8": "int32", "float64": "float64"}  # float32 for all others


def small_integers(dtype, shape, seed):
    """Products of these and their sums are exact in float16 as in everything wider."""
    drawn = np.random.default_rng(seed).integers(-3, 3, shape, endpoint=True)
    return torch.from_numpy(drawn).to(torch.float32).to(DTYPES[dtype].torch).to(DEVICE)


def exact(a, b):
    return torch.matmul(a.cpu().double(), b.cpu().double())


@triton.jit
def dot_tiles(
    a_ptr, b_ptr, c_ptr, out_ptr, ACC: tl.constexpr, TRANS: tl.constexpr, OUT: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if TRANS == "a" or TRANS == "both":  # noqa: PLR1714 -- membership is not in Triton's language
        a = tl.trans(tl.load(a_ptr + k[:, None] * M + m[None, :]))
    else:
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    if TRANS == "b" or TRANS == "both":  # noqa: PLR1714
        b = tl.load(b_ptr + n[:, None] * K + k[None, :]).T
    else:
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    at = m[:, None] * N + n[None, :]
    if ACC == "none":
        c = tl.dot(a, b, input_precision="ieee", out_dtype=OUT)
    elif ACC == "argument":
        c = tl.dot(a, b, tl.load(c_ptr + at), input_precision="ieee", out_dtype=OUT)
    else:
        c = tl.load(c_ptr + at)
        c += tl.dot(a, b, input_precision="ieee", out_dtype=OUT)
    tl.static_assert(c.dtype == OUT)
    tl.store(out_ptr + at, c)


def dot(a, b, c, acc, trans, out_dtype):
    (m, k), n = a.shape, b.shape[1]
    stored_a = a.T.contiguous() if trans in ("a", "both") else a
    stored_b = b.T.contiguous() if trans in ("b", "both") else b
    out = torch.zeros(m, n, dtype=out_dtype.torch, device=DEVICE)
    dot_tiles[(1,)](stored_a, stored_b, c, out, acc, trans, out_dtype.triton, m, n, k)
    return out


EIGHT_BITS = ["int8", "float8e4nv", "float8e5"]


@pytest.mark.parametrize("acc", ["none", "argument", "added"])
@pytest.mark.parametrize("dtype", [*EIGHT_BITS, "float16", BFLOAT16, "float32", "float64"])
@pytest.mark.parametrize("shape", [(16, 16, 32), (32, 64, 32), (64, 16, 128)])
def test_whole_numbers_multiply_exactly(shape, dtype, acc):
    m, n, k = shape
    a, b = small_integers(dtype, (m, k), 0), small_integers(dtype, (k, n), 1)
    out_dtype = DTYPES[ACCUMULATOR.get(dtype, "float32")]
    c = torch.from_numpy(np.random.default_rng(2).integers(-99, 99, (m, n))).to(out_dtype.torch)
    out = dot(a, b, c.to(DEVICE), acc, "none", out_dtype)
    expected = exact(a, b) + (c.double() if acc != "none" else 0)
    assert_equal(out, (expected + 0).to(out_dtype.torch))


@pytest.mark.parametrize("trans", ["a", "b", "both"])
@pytest.mark.parametrize("dtype", ["int8", "float16", BFLOAT16, "float32", "float64"])
def test_transposed_operands(dtype, trans):
    a, b = small_integers(dtype, (16, 32), 0), small_integers(dtype, (32, 64), 1)
    out_dtype = DTYPES[ACCUMULATOR.get(dtype, "float32")]
    out = dot(a, b, None, "none", trans, out_dtype)
    assert_equal(out, (exact(a, b) + 0).to(out_dtype.torch))


@pytest.mark.parametrize("acc", ["none", "argument"])
def test_float16_accumulator(acc):
    a, b = small_integers("float16", (16, 64), 0), small_integers("float16", (64, 32), 1)
    c = small_integers("float16", (16, 32), 2)
    out = dot(a, b, c, acc, "none", DTYPES["float16"])
    assert_equal(out, (exact(a, b) + (c.cpu() if acc == "argument" else 0) + 0).half())


@pytest.mark.parametrize("k", [16, 32, 64, 256])
@pytest.mark.parametrize("dtype", ["float16", BFLOAT16, "float32", "float64"])
def test_each_term_rounds_once(dtype, k):
    dtype = DTYPES[dtype]
    a, b = random(dtype, (32, k)), random(dtype, (k, 16), seed=1)
    out_dtype = DTYPES[ACCUMULATOR.get(dtype.name, "float32")]
    out = dot(a, b, None, "none", "none", out_dtype)
    wide_a, wide_b = (x.double().cpu().numpy().astype(np.longdouble) for x in (a, b))
    # One rounding of the product, where it rounds at all, and one per addition.
    slack = (k + 1) * 2.0 ** -(out_dtype.mantissa + 1) * (np.abs(wide_a) @ np.abs(wide_b)).astype(np.float64)
    assert_close_ulps(out, (wide_a @ wide_b).astype(np.float64), out_dtype, 0.5, absolute=slack)


def test_extreme_int8_products():
    a = torch.full((16, 256), -128, dtype=torch.int8, device=DEVICE)
    b = torch.full((256, 16), -128, dtype=torch.int8, device=DEVICE)
    b[:, 8:] = 127
    out = dot(a, b, None, "none", "none", DTYPES["int32"])
    assert_equal(out, exact(a, b).int())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_infinity_and_nan_reach_only_their_row_and_column(dtype):
    a, b = small_integers(dtype, (16, 32), 0).abs() + 1, small_integers(dtype, (32, 16), 1).abs() + 1
    a[3, 5], a[7, 0] = math.nan, math.inf
    b[9, 2] = math.inf
    out = dot(a, b, None, "none", "none", FLOAT32)
    expected = exact(a, b)
    assert torch.isinf(expected).sum() == 15 + 15
    assert_equal(out, expected.float())


@triton.jit
def dot_batches(a_ptr, b_ptr, out_ptr, OUT: tl.constexpr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                K: tl.constexpr):  # fmt: skip
    batch = tl.arange(0, B)[:, None, None]
    m, n = tl.arange(0, M)[None, :, None], tl.arange(0, N)[None, None, :]
    k_row, k_column = tl.arange(0, K)[None, None, :], tl.arange(0, K)[None, :, None]
    a = tl.load(a_ptr + (batch * M + m) * K + k_row)
    b = tl.load(b_ptr + (batch * K + k_column) * N + n)
    c = tl.dot(a, b, input_precision="ieee", out_dtype=OUT)
    c = tl.dot(a, b, acc=c, input_precision="ieee", out_dtype=OUT)
    tl.store(out_ptr + (batch * M + m) * N + n, c)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batched_tiles(batch, dtype):
    a, b = small_integers(dtype, (batch, 16, 32), 0), small_integers(dtype, (batch, 32, 64), 1)
    out_dtype = DTYPES[ACCUMULATOR.get(dtype, "float32")]
    out = torch.zeros(batch, 16, 64, dtype=out_dtype.torch, device=DEVICE)
    dot_batches[(1,)](a, b, out, out_dtype.triton, batch, 16, 64, 32)
    assert_equal(out, (2 * exact(a, b) + 0).to(out_dtype.torch))


@triton.jit
def matmul(
    a_ptr, b_ptr, out_ptr, m, n, k, stride_a, stride_b, stride_out, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * stride_a + inner[None, :]
    b_ptrs = b_ptr + inner[:, None] * stride_b + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, k, BLOCK_K):
        left = k - start
        a = tl.load(a_ptrs, mask=(rows[:, None] < m) & (inner[None, :] < left), other=0.0)
        b = tl.load(b_ptrs, mask=(inner[:, None] < left) & (columns[None, :] < n), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_b
    out = acc.to(out_ptr.dtype.element_ty)
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], out, mask=mask)


@pytest.mark.parametrize("dtype", ["int8", "float16", BFLOAT16, "float32", "float64"])
@pytest.mark.parametrize("shape", [(16, 16, 32), (33, 50, 70), (1, 40, 5), (64, 17, 129)])
def test_matmul_with_edges_in_every_dimension(shape, dtype):
    m, n, k = shape
    a, b = small_integers(dtype, (m, k), 0), small_integers(dtype, (k, n), 1)
    acc = DTYPES[ACCUMULATOR.get(dtype, "float32")]
    out = torch.full((m, n + 3), -7, dtype=acc.torch, device=DEVICE)
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 32))
    matmul[grid](a, b, out, m, n, k, k, n, n + 3, ACC=acc.triton, BLOCK_M=16, BLOCK_N=32, BLOCK_K=32)
    expected = torch.full((m, n + 3), -7, dtype=acc.torch)
    expected[:, :n] = (exact(a, b) + 0).to(acc.torch)
    assert_equal(out, expected)


@triton.jit
def chained(q_ptr, k_ptr, v_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :])
    k = tl.load(k_ptr + n[:, None] * D + d[None, :])
    v = tl.load(v_ptr + n[:, None] * D + d[None, :])
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(m[:, None] >= n[None, :], scores, 0.0)
    out = tl.dot(scores.to(v.dtype), v, input_precision="ieee")
    gradient = tl.dot(tl.trans(scores.to(v.dtype)), q, input_precision="ieee")
    tl.store(out_ptr + m[:, None] * D + d[None, :], out)
    tl.store(out_ptr + M * D + n[:, None] * D + d[None, :], gradient)


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16, "float32"])
def test_chained_products(dtype):
    q, k, v = (small_integers(dtype, (32, 16), seed) for seed in range(3))
    out = torch.zeros(2, 32, 16, dtype=torch.float32, device=DEVICE)
    chained[(1,)](q, k, v, out, M=32, N=32, D=16)
    scores = exact(q, k.T).tril()
    assert_equal(out, (torch.stack([scores @ v.cpu().double(), scores.T @ q.cpu().double()]) + 0).float())


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, out_ptr, length, scale, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    m, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :], mask=m[:, None] < length, other=0.0)
    high = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for start in range(0, length, N):
        n = start + tl.arange(0, N)
        k = tl.load(k_ptr + n[None, :] * D + d[:, None], mask=n[None, :] < length, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where((n[None, :] < length) & (n[None, :] <= m[:, None]), scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(high - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + n[:, None] * D + d[None, :], mask=n[:, None] < length, other=0.0)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
        high = higher
    tl.store(out_ptr + m[:, None] * D + d[None, :], acc / total[:, None], mask=m[:, None] < length)


@pytest.mark.parametrize("length", [16, 40, 64])
def test_causal_attention_with_running_maximum(length):
    width = 16
    q, k, v = (random(FLOAT32, (length, width), seed) for seed in range(3))
    out = torch.zeros_like(q)
    scale = 0.25  # exact, as 1 / sqrt(16) is
    attention[(triton.cdiv(length, 16),)](q, k, v, out, length, scale, M=16, N=16, D=width)
    wide_q, wide_k, wide_v = (x.double().cpu() for x in (q, k, v))
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (wide_q @ wide_k.T * scale).masked_fill(~allowed, -math.inf)
    weights = scores.softmax(1)
    unit = 2.0**-24
    # Errors of the scores move the weights by as much; exp (2 ulps) twice, then sums over the length, a division.
    score_error = float(((wide_q.abs() @ wide_k.abs().T) * scale).max()) * (width + 4) * unit
    relative = 2 * score_error + (2 * length + 4 * (length // 16 + 2) + 4) * unit
    slack = 2 * relative * (weights @ wide_v.abs())
    assert_close_ulps(out, weights @ wide_v, FLOAT32, 0.5, absolute=slack.numpy())
