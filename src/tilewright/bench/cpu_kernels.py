"""Plain Triton kernels, as a user writes them: what the compiled CPU target is measured and tested on.

Nothing in the kernels knows of a CPU or of tilewright: pointers, strides, masks, one tile a program, float32 or any
16-bit float in memory, arithmetic in float32. What is chosen for a CPU is in the launchers: a whole row a program, few
rows of heads, tiles that fit the first caches.
"""

# The bodies of jit functions are Triton's language, not Python's types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from tilewright.errors import ArgumentError

Activation = Literal["none", "relu", "silu"]


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n_elements, BLOCK: tl.constexpr):
    """``out = x + y``, one block of elements a program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    tl.store(out_ptr + offsets, x + y, mask)


@triton.jit
def store_kernel(out_ptr, value):
    """Store one number: next to nothing, so that a launch of it costs what a launch costs."""
    tl.store(out_ptr, value)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride_x_row, stride_out_row, n_cols, BLOCK_N: tl.constexpr):
    """Softmax of one row, which is read once."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    mask = col < n_cols
    x = tl.load(x_ptr + row * stride_x_row + col, mask, -float("inf")).to(tl.float32)  # [BLOCK_N]
    numerator = tl.exp(x - tl.max(x, axis=0))
    y = numerator / tl.sum(numerator, axis=0)
    tl.store(out_ptr + row * stride_out_row + col, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, stride_x_row, stride_out_row, n_cols, eps, BLOCK_N: tl.constexpr):
    """``x / sqrt(mean(x^2) + eps) * weight`` of one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    mask = col < n_cols
    x = tl.load(x_ptr + row * stride_x_row + col, mask, 0.0).to(tl.float32)  # [BLOCK_N]
    weight = tl.load(weight_ptr + col, mask, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(out_ptr + row * stride_out_row + col, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def dropout_kernel(x_ptr, out_ptr, n_elements, p, seed, BLOCK: tl.constexpr):
    """Zero each element with probability ``p``, by a random number of its own offset; scale the others."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    keep = tl.rand(seed, offsets) > p
    y = tl.where(keep, x / (1 - p), 0.0)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, stride_x_row, stride_out_row, n_cols, eps,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Layer norm of one row in three passes over blocks of columns: mean, variance, result."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x_row
    out_ptr += row * stride_out_row
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        total += tl.load(x_ptr + col, col < n_cols, 0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / n_cols
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + col, col < n_cols, 0.0).to(tl.float32)
        centred = tl.where(col < n_cols, x - mean, 0.0)
        squares += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / n_cols + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = col < n_cols
        x = tl.load(x_ptr + col, mask, 0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask, 0.0).to(tl.float32)
        bias = tl.load(bias_ptr + col, mask, 0.0).to(tl.float32)
        y = (x - mean) * rstd * weight + bias
        tl.store(out_ptr + col, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_dweight_ptr, partial_dbias_ptr, lock_ptr,
    stride_dy_row, stride_x_row, stride_dx_row, n_cols, n_groups, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dx`` of one row, and its share of ``dweight`` and ``dbias`` added to its group's sums under a lock."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    mask = col < n_cols
    dy = tl.load(dy_ptr + row * stride_dy_row + col, mask, 0.0).to(tl.float32)  # [BLOCK_N]
    x = tl.load(x_ptr + row * stride_x_row + col, mask, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask, 0.0).to(tl.float32)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    normal = tl.where(mask, (x - mean) * rstd, 0.0)
    scaled = weight * dy
    along_x = tl.sum(normal * scaled, axis=0) / n_cols
    along_one = tl.sum(scaled, axis=0) / n_cols
    dx = (scaled - (normal * along_x + along_one)) * rstd
    tl.store(dx_ptr + row * stride_dx_row + col, dx.to(dx_ptr.dtype.element_ty), mask)

    group = row % n_groups
    lock_ptr += group
    partial_dweight_ptr += group * n_cols + col
    partial_dbias_ptr += group * n_cols + col
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    dweight = tl.load(partial_dweight_ptr, mask, 0.0) + dy * normal
    dbias = tl.load(partial_dbias_ptr, mask, 0.0) + dy
    tl.store(partial_dweight_ptr, dweight, mask)
    tl.store(partial_dbias_ptr, dbias, mask)
    tl.debug_barrier()  # every thread of the program has stored before the lock is open
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def sum_groups_kernel(
    partial_dweight_ptr, partial_dbias_ptr, dweight_ptr, dbias_ptr, n_groups, n_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the groups' sums, one block of columns a program."""
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_groups, BLOCK_M):
        group = start + tl.arange(0, BLOCK_M)
        mask = (group < n_groups)[:, None] & (col < n_cols)[None, :]
        offsets = group[:, None] * n_cols + col[None, :]
        dweight += tl.load(partial_dweight_ptr + offsets, mask, 0.0)
        dbias += tl.load(partial_dbias_ptr + offsets, mask, 0.0)
    inside = col < n_cols
    tl.store(dweight_ptr + col, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), inside)
    tl.store(dbias_ptr + col, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), inside)


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, stride_x_token, stride_x_head, stride_out_token, stride_out_head, stride_table,
    n_tokens, n_heads, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs ``(i, i + HALF)`` of a tile of tokens x heads."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_P)
    table_mask = (token < n_tokens)[:, None] & (pair < HALF)[None, :]
    entry = token[:, None] * stride_table + pair[None, :]
    cos = tl.load(cos_ptr + entry, table_mask, 0.0).to(tl.float32)[:, None, :]  # [BLOCK_T, 1, BLOCK_P]
    sin = tl.load(sin_ptr + entry, table_mask, 0.0).to(tl.float32)[:, None, :]
    mask = table_mask[:, None, :] & (head < n_heads)[None, :, None]
    x_ptr += token[:, None, None] * stride_x_token + head[None, :, None] * stride_x_head + pair[None, None, :]
    out_ptr += token[:, None, None] * stride_out_token + head[None, :, None] * stride_out_head + pair[None, None, :]
    x1 = tl.load(x_ptr, mask, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, BLOCK_P]
    x2 = tl.load(x_ptr + HALF, mask, 0.0).to(tl.float32)
    tl.store(out_ptr, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask)
    tl.store(out_ptr + HALF, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, stride_a_m, stride_a_k, stride_b_k, stride_b_n, stride_out_m, stride_out_n, m, n, k,
    ACTIVATION: tl.constexpr, WRAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of ``a @ b``; programs go down GROUP_M rows of tiles before the next column, to find ``b`` in the cache.

    Rows and columns past the edge are wrapped around, so that the loop masks ``k`` alone, or masked.
    """
    n_tiles_m = tl.cdiv(m, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(n, BLOCK_N)
    first_m = (tl.program_id(0) // per_group) * GROUP_M
    group_m = min(n_tiles_m - first_m, GROUP_M)
    tile_m = first_m + (tl.program_id(0) % per_group) % group_m
    tile_n = (tl.program_id(0) % per_group) // group_m

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_a = row
    col_b = col
    if WRAP:
        row_a = row % m
        col_b = col % n
    a_ptrs = a_ptr + row_a[:, None].to(tl.int64) * stride_a_m + inner[None, :] * stride_a_k
    b_ptrs = b_ptr + inner[:, None].to(tl.int64) * stride_b_k + col_b[None, :] * stride_b_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        a_mask = inner[None, :] < k - start
        b_mask = inner[:, None] < k - start
        if not WRAP:
            a_mask = a_mask & (row < m)[:, None]
            b_mask = b_mask & (col < n)[None, :]
        a = tl.load(a_ptrs, a_mask, 0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(b_ptrs, b_mask, 0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K * stride_a_k
        b_ptrs += BLOCK_K * stride_b_k
    if ACTIVATION == "relu":
        acc = tl.maximum(acc, 0.0)
    elif ACTIVATION == "silu":
        acc = acc * tl.sigmoid(acc)
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * stride_out_m + col[None, :] * stride_out_n
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (row < m)[:, None] & (col < n)[None, :])


@triton.jit
def dot_tiles_kernel(
    a_ptr, b_ptr, out_ptr, n_tiles, tiles_per_program,
    BATCH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sum of the products of a program's pairs of tiles, or of its pairs of batches of tiles."""
    first = tl.program_id(0).to(tl.int64) * tiles_per_program
    row = tl.arange(0, M)
    col = tl.arange(0, N)
    inner = tl.arange(0, K)
    a_offsets = row[:, None] * K + inner[None, :]  # [M, K]
    b_offsets = inner[:, None] * N + col[None, :]  # [K, N]
    out_offsets = row[:, None] * N + col[None, :]  # [M, N]
    if BATCH > 1:
        batch = tl.arange(0, BATCH)[:, None, None]
        a_offsets = batch * (M * K) + a_offsets[None, :, :]
        b_offsets = batch * (K * N) + b_offsets[None, :, :]
        out_offsets = batch * (M * N) + out_offsets[None, :, :]
        acc = tl.zeros((BATCH, M, N), tl.float32)
    else:
        acc = tl.zeros((M, N), tl.float32)
    for tile in range(first, min(first + tiles_per_program, n_tiles)):
        a = tl.load(a_ptr + tile * (BATCH * M * K) + a_offsets)
        b = tl.load(b_ptr + tile * (BATCH * K * N) + b_offsets)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * (BATCH * M * N) + out_offsets, acc)


@triton.jit
def _attend(
    acc, total, highest, q, k_ptrs, v_ptrs, stride_k_token, stride_v_token, row, n_k, scale, start, end,
    CAUSAL: tl.constexpr, ON_BAND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take in the keys from ``start`` to ``end``; those on the band are masked, those off it are all seen."""
    for first in range(start, end, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        k_block = k_ptrs + col[:, None].to(tl.int64) * stride_k_token  # [BLOCK_N, HEAD_DIM]
        v_block = v_ptrs + col[:, None].to(tl.int64) * stride_v_token
        if ON_BAND:
            k = tl.load(k_block, (col < n_k)[:, None], 0.0)
            v = tl.load(v_block, (col < n_k)[:, None], 0.0)
        else:
            k = tl.load(k_block)
            v = tl.load(v_block)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N], to base 2
        if ON_BAND:
            seen = (col < n_k)[None, :]
            if CAUSAL:
                seen = seen & (col[None, :] <= row[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = higher
    return acc, total, highest


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_q_batch, stride_q_head, stride_q_token, stride_k_batch, stride_k_head, stride_k_token,
    stride_v_batch, stride_v_head, stride_v_token, stride_out_batch, stride_out_head, stride_out_token,
    n_heads, n_q, n_k, scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of one block of queries of one head by online softmax, and the logarithm of each row's sum.

    ``scale`` contains log2(e), so that the exponentials are powers of 2.
    """
    batch = (tl.program_id(1) // n_heads).to(tl.int64)
    head = (tl.program_id(1) % n_heads).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    mask = (row < n_q)[:, None]
    dim = tl.arange(0, HEAD_DIM)[None, :]
    row_offset = row[:, None].to(tl.int64)
    k_ptrs = k_ptr + batch * stride_k_batch + head * stride_k_head + dim
    v_ptrs = v_ptr + batch * stride_v_batch + head * stride_v_head + dim
    q_ptrs = q_ptr + batch * stride_q_batch + head * stride_q_head + row_offset * stride_q_token + dim
    q = tl.load(q_ptrs, mask, 0.0)  # [BLOCK_M, HEAD_DIM]
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)

    band = n_k
    end = n_k
    if CAUSAL:
        band = min(first, n_k)
        end = min(first + BLOCK_M, n_k)
    band = band // BLOCK_N * BLOCK_N  # every row sees every key before it
    acc, total, highest = _attend(
        acc, total, highest, q, k_ptrs, v_ptrs, stride_k_token, stride_v_token, row, n_k, scale, 0, band,
        CAUSAL, False, BLOCK_N,
    )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q, k_ptrs, v_ptrs, stride_k_token, stride_v_token, row, n_k, scale, band, end,
        CAUSAL, True, BLOCK_N,
    )  # fmt: skip

    out_ptrs = out_ptr + batch * stride_out_batch + head * stride_out_head + row_offset * stride_out_token + dim
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask)
    lse = (highest + tl.log2(total)) * 0.6931471805599453  # natural logarithm
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * n_q + row, lse, row < n_q)


class LayerNormResult(NamedTuple):
    """Layer norm, and what its backward needs of each row: float32 ``[rows]``."""

    y: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


class LayerNormGradients(NamedTuple):
    """The gradients of layer norm."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class AttentionResult(NamedTuple):
    """Attention, and the logarithm of each row's sum of exponentials: float32 ``[batch, heads, queries]``."""

    out: torch.Tensor
    lse: torch.Tensor


def add(x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor | None = None, block: int = 4096) -> torch.Tensor:
    """``x + y`` of two contiguous tensors of one shape."""
    out = torch.empty_like(x) if out is None else out
    for name, tensor in (("x", x), ("y", y), ("out", out)):
        if not tensor.is_contiguous() or tensor.shape != x.shape:
            raise ArgumentError("add", name, f"came shape {tuple(tensor.shape)}, expected contiguous {tuple(x.shape)}")
    if x.numel():
        add_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)
    return out


def softmax(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax over the rows of ``x [rows, columns]``."""
    out = _rows("softmax", x, out)
    if x.numel():
        block = triton.next_power_of_2(x.shape[1])
        softmax_kernel[(x.shape[0],)](x, out, x.stride(0), out.stride(0), x.shape[1], BLOCK_N=block)
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the rows of ``x [rows, columns]`` with ``weight [columns]``."""
    out = _rows("rms_norm", x, out)
    if x.numel():
        block = triton.next_power_of_2(x.shape[1])
        rms_norm_kernel[(x.shape[0],)](
            x, weight, out, x.stride(0), out.stride(0), x.shape[1], eps, BLOCK_N=block
        )  # fmt: skip
    return out


def dropout(
    x: torch.Tensor, p: float, seed: int, *, out: torch.Tensor | None = None, block: int = 1024
) -> torch.Tensor:
    """Contiguous ``x`` with each element zeroed with probability ``p``; the same ``seed`` zeroes the same ones."""
    if not x.is_contiguous():
        raise ArgumentError("dropout", "x", f"came strides {x.stride()}, expected contiguous")
    out = torch.empty_like(x) if out is None else out
    if x.numel():
        dropout_kernel[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), p, seed, BLOCK=block)
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    out: torch.Tensor | None = None,
    block: int = 1024,
) -> LayerNormResult:
    """Layer norm over the rows of ``x [rows, columns]``, in blocks of at most ``block`` columns."""
    out = _rows("layer_norm", x, out)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        layer_norm_kernel[(x.shape[0],)](
            x, weight, bias, out, mean, rstd, x.stride(0), out.stride(0), x.shape[1], eps,
            BLOCK_N=min(block, triton.next_power_of_2(x.shape[1])),
        )  # fmt: skip
    return LayerNormResult(out, mean, rstd)


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    *,
    groups: int = 8,
    out: torch.Tensor | None = None,
) -> LayerNormGradients:
    """Gradients of :func:`layer_norm` for ``dy [rows, columns]``, summed over rows in ``groups`` groups first."""
    dx = _rows("layer_norm_backward", x, out)
    _rows("layer_norm_backward", dy, dx)
    n_rows, n_cols = x.shape
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight)
    if x.numel():
        partial = torch.zeros(2, groups, n_cols, dtype=torch.float32, device=x.device)
        locks = torch.zeros(groups, dtype=torch.int32, device=x.device)
        layer_norm_backward_kernel[(n_rows,)](
            dy, x, weight, mean, rstd, dx, partial[0], partial[1], locks,
            dy.stride(0), x.stride(0), dx.stride(0), n_cols, groups, BLOCK_N=triton.next_power_of_2(n_cols),
        )  # fmt: skip
        sum_groups_kernel[(triton.cdiv(n_cols, 128),)](
            partial[0], partial[1], dweight, dbias, groups, n_cols, BLOCK_M=4, BLOCK_N=128
        )
    return LayerNormGradients(dx, dweight, dbias)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    block_t: int = 1,
    block_h: int = 32,
) -> torch.Tensor:
    """Rotate ``x [tokens, heads, d]`` by ``cos`` and ``sin``, both ``[tokens, d / 2]``, in halves."""
    out = torch.empty_like(x) if out is None else out
    n_tokens, n_heads, head_dim = x.shape
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ArgumentError("rope", name, f"came strides {tensor.stride()}, expected 1 along the last axis")
    if cos.stride() != sin.stride() or cos.shape != sin.shape or tuple(cos.shape) != (n_tokens, head_dim // 2):
        raise ArgumentError("rope", "cos", f"came {tuple(cos.shape)}, expected {(n_tokens, head_dim // 2)} like sin")
    if x.numel():
        grid = (triton.cdiv(n_tokens, block_t), triton.cdiv(n_heads, block_h))
        rope_kernel[grid](
            x, cos, sin, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1), cos.stride(0), n_tokens, n_heads,
            HALF=head_dim // 2, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_P=triton.next_power_of_2(head_dim // 2),
        )  # fmt: skip
    return out


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    activation: Activation = "none",
    wrap: bool = False,
    out: torch.Tensor | None = None,
    block_m: int = 128,
    block_n: int = 128,
    block_k: int = 64,
    group_m: int = 8,
) -> torch.Tensor:
    """``activation(a @ b)`` for ``a [m, k]`` and ``b [k, n]`` of any strides; ``wrap`` says how the edge is handled."""
    (m, k), n = a.shape, b.shape[1]
    if b.shape[0] != k:
        raise ArgumentError("matmul", "b", f"came shape {tuple(b.shape)}, expected {k} rows")
    out = torch.empty(m, n, dtype=a.dtype, device=a.device) if out is None else out
    if out.numel():
        matmul_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
            a, b, out, *a.stride(), *b.stride(), *out.stride(), m, n, k, ACTIVATION=activation, WRAP=wrap,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=group_m,
        )  # fmt: skip
    return out


def dot_tiles(a: torch.Tensor, b: torch.Tensor, programs: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of tiles' products: ``a [tiles, ..., m, k]`` and ``b [tiles, ..., k, n]``, contiguous, powers of 2.

    Each program adds up its part of the tiles. The result is float32 ``[programs, ..., m, n]``.
    """
    for name, tensor in (("a", a), ("b", b)):
        if not tensor.is_contiguous() or tensor.dim() not in {3, 4}:
            raise ArgumentError(
                "dot_tiles", name, f"came shape {tuple(tensor.shape)}, expected contiguous, 3 or 4 axes"
            )
    (n_tiles, *batch, m, k), n = a.shape, b.shape[-1]
    out = torch.empty(programs, *batch, m, n, dtype=torch.float32, device=a.device) if out is None else out
    dot_tiles_kernel[(programs,)](
        a, b, out, n_tiles, triton.cdiv(n_tiles, programs), BATCH=math.prod(batch), M=m, N=n, K=k
    )
    return out


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    block_m: int = 64,
    block_n: int = 32,
) -> AttentionResult:
    """Attention of ``q [batch, heads, queries, d]`` to ``k`` and ``v [batch, heads, keys, d]``.

    With ``causal`` a query sees the keys up to its own number, counted from 0. ``scale`` is 1 / sqrt(d) by default.
    """
    out = torch.empty_like(q) if out is None else out
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ArgumentError("attention", name, f"came strides {tensor.stride()}, expected 1 along the last axis")
    n_batch, n_heads, n_q, head_dim = q.shape
    if head_dim != triton.next_power_of_2(head_dim):
        raise ArgumentError("attention", "q", f"came d = {head_dim}, expected a power of 2")
    lse = torch.empty(n_batch, n_heads, n_q, dtype=torch.float32, device=q.device)
    scale = head_dim**-0.5 if scale is None else scale
    if q.numel():
        attention_kernel[(triton.cdiv(n_q, block_m), n_batch * n_heads)](
            q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            n_heads, n_q, k.shape[2], scale * math.log2(math.e),
            CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
    return AttentionResult(out, lse)


def _rows(operation: str, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Where the result for the rows of ``x`` goes."""
    out = torch.empty_like(x) if out is None else out
    for name, tensor in (("x", x), ("out", out)):
        if tensor.dim() != 2 or tensor.shape != x.shape or tensor.stride(1) != 1:
            raise ArgumentError(
                operation, name, f"came shape {tuple(tensor.shape)}, strides {tensor.stride()}, expected unit columns"
            )
    return out
