"""The Triton kernels of RMSNorm, forward.

A program normalises ``BLOCK_M`` rows, each cut into chunks of ``CHUNK`` columns. Squares are summed chunk by chunk into
one tile, whose columns are summed at the end: the order depends on the row's length alone, so a row's result does not
depend on the other rows, and the fused kernels, which share these functions, give the same bits. Where the rows fit
into registers they stay there (``RESIDENT``); else each chunk is read a second time.

Multiply-add contraction is off, so that every rounding is where the reference has it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offsets(row, n_inner, stride_outer, stride_inner, TWO_LEVELS: tl.constexpr):
    """Where rows begin, int64 [BLOCK_M]."""
    if TWO_LEVELS:  # noqa: SIM108 - the choice is made when compiling
        offset = row // n_inner * stride_outer + row % n_inner * stride_inner
    else:
        offset = row * stride_outer
    return offset


@triton.jit
def chunk_mask(row_mask, column, N_COLS: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr):
    """Which elements of a chunk exist, [BLOCK_M, CHUNK] or, where that is enough, [BLOCK_M, 1]."""
    if LAST and N_COLS % CHUNK != 0:  # noqa: SIM108 - the choice is made when compiling
        mask = row_mask[:, None] & (column < N_COLS)[None, :]
    else:
        mask = row_mask[:, None]
    return mask


@triton.jit
def load_summed(
    x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, residual_out_row, column, mask,
    STORE: tl.constexpr, ROUND_RESIDUAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One chunk of what the norm is taken of, [BLOCK_M, CHUNK], in the narrowest dtype that holds it."""
    z = tl.load(x_ptr + x_row[:, None] + column[None, :], mask, 0.0)
    if residual_ptr is not None:
        z = z.to(COMPUTE) + tl.load(residual_ptr + residual_row[:, None] + column[None, :], mask, 0.0).to(COMPUTE)
        stored = z.to(residual_ptr.dtype.element_ty)
        if STORE:
            tl.store(residual_out_ptr + residual_out_row[:, None] + column[None, :], stored, mask)
        if ROUND_RESIDUAL:
            z = stored
    return z


@triton.jit
def normalised(
    z, rstd, weight_ptr, column, mask_columns,
    WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The norm of a chunk times the weight, [BLOCK_M, CHUNK], not rounded at the end."""
    y = z.to(COMPUTE) * rstd[:, None]
    if weight_ptr is not None:
        if ROUND_NORM:
            y = y.to(DTYPE).to(COMPUTE)
        weight = tl.load(weight_ptr + column, mask_columns, 0.0, eviction_policy="evict_last").to(COMPUTE)
        y = y * (weight + WEIGHT_OFFSET)[None, :]
    return y


@triton.jit
def inverse_rms(squares, N_COLS: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean + EPS) from sums of squares [BLOCK_M, CHUNK]."""
    total = tl.sum(squares, axis=1)
    return tl.rsqrt(tl.div_rn(total, tl.full(total.shape, N_COLS, total.dtype)) + EPS)
