"""The Triton kernels of RMSNorm, forward.

A program normalises ``BLOCK_M`` rows, each cut into chunks of ``CHUNK`` columns. Squares are summed chunk by chunk into
one tile, whose columns are summed at the end: the order depends on the row's length alone, so a row's result does not
depend on the other rows, and the fused kernels, which share these functions, give the same bits. Where the rows fit
into registers they stay there (``RESIDENT``); else each chunk is read a second time.

Multiply-add contraction is off, so that every rounding is where the reference has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.rms_norm.call import Planner
from tilewright.ops.rms_norm.launch import row_block
from tilewright.ops.rows import alignment, contiguous_twin, rows
from tilewright.platforms import facts

if TYPE_CHECKING:
    from tilewright.ops.rms_norm.call import GradInputs, Inputs, RmsNormCall, Runner, Tensors

# A Triton that lacks one of these fails here, at import, where dispatch takes note, and not at a launch.
_NEEDED = (tl.static_range, tl.fma, tl.div_rn, tl.rsqrt)
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def row_offset(row, n_inner, stride_outer, stride_inner, TWO_LEVELS: tl.constexpr, ALIGN: tl.constexpr = 1):
    """Where rows begin, int64 [BLOCK_M], all of them multiples of ALIGN.

    Triton sees by itself only that a stride is a multiple of 16. It lays tiles out by what it knows of every pointer,
    and kernels whose sums are to be the same need the same layout.
    """
    if TWO_LEVELS:  # noqa: SIM108 - settled when compiling
        offset = row // n_inner * stride_outer + row % n_inner * stride_inner
    else:
        offset = row * stride_outer
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return offset


@triton.jit
def tile(row_offset, column):
    """Offsets of a tile, [BLOCK_M, CHUNK]."""
    return row_offset[:, None] + column[None, :]


@triton.jit
def tile_mask(row_mask, column, N_COLS: tl.constexpr, CHUNK: tl.constexpr):
    """Which elements of a chunk exist, [BLOCK_M, CHUNK] or, where that says all, [BLOCK_M, 1]."""
    if N_COLS % CHUNK != 0:  # noqa: SIM108 - settled when compiling
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
    z = tl.load(x_ptr + tile(x_row, column), mask, 0.0)
    if residual_ptr is not None:
        z = z.to(COMPUTE) + tl.load(residual_ptr + tile(residual_row, column), mask, 0.0).to(COMPUTE)
        stored = z.to(residual_ptr.dtype.element_ty)
        if STORE:
            tl.store(residual_out_ptr + tile(residual_out_row, column), stored, mask)
        if ROUND_RESIDUAL:
            z = stored
    return z


@triton.jit
def add_squares(squares, z, COMPUTE: tl.constexpr):
    """Squares of a chunk added to those of the chunks before it; of 16-bit numbers they are exact."""
    z = z.to(COMPUTE)
    return tl.fma(z, z, squares)


@triton.jit
def inverse_rms(squares, N_COLS: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """1 / sqrt(mean + EPS) of each row, [BLOCK_M], from squares [BLOCK_M, CHUNK]; rows may have more axes."""
    total = tl.sum(squares, axis=-1)
    n = tl.full(total.shape, N_COLS, COMPUTE)
    if tl.float32 == COMPUTE:  # noqa: SIM108 - settled when compiling
        mean = tl.div_rn(total, n)
    else:
        mean = total / n
    return tl.rsqrt(mean + EPS)


@triton.jit
def load_weight(weight_ptr, column, N_COLS: tl.constexpr):
    """One chunk of the weight, [CHUNK]; every row reads it, so it is to stay in the cache."""
    return tl.load(weight_ptr + column, column < N_COLS, 0.0, eviction_policy="evict_last")


@triton.jit
def read_rows(
    x_ptr, residual_ptr, residual_out_ptr, weight_ptr, x_row, residual_row, residual_out_row, row_mask,
    N_COLS: tl.constexpr, EPS: tl.constexpr, ROUND_RESIDUAL: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr, PRELOAD: tl.constexpr,
):  # fmt: skip
    """The chunks of the rows, if RESIDENT, those of the weight, if PRELOAD, and 1 / rms of each row, [BLOCK_M].

    Stores the sums, if there are any. The weight is asked for after the rows, which come from farther away, and before
    anything waits for them.
    """
    squares = tl.zeros((BLOCK_M, CHUNK), COMPUTE)
    kept = ()
    weights = ()
    if RESIDENT:
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            z = load_summed(
                x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, residual_out_row, column,
                tile_mask(row_mask, column, N_COLS, CHUNK), True, ROUND_RESIDUAL, COMPUTE,
            )  # fmt: skip
            kept = kept + (z,)  # noqa: RUF005 - Triton unpacks no tuple in a tuple
        if PRELOAD:
            for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
                weights = weights + (load_weight(weight_ptr, c * CHUNK + tl.arange(0, CHUNK), N_COLS),)  # noqa: RUF005
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            squares = add_squares(squares, kept[c], COMPUTE)
    else:
        for c in range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            z = load_summed(
                x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, residual_out_row, column,
                tile_mask(row_mask, column, N_COLS, CHUNK), True, ROUND_RESIDUAL, COMPUTE,
            )  # fmt: skip
            squares = add_squares(squares, z, COMPUTE)
    return kept, weights, inverse_rms(squares, N_COLS, EPS, COMPUTE)


@triton.jit
def normalised(
    z, rstd, weight, WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """The norm of a chunk times the weight [CHUNK], if there is one, [BLOCK_M, CHUNK], not rounded at the end.

    Rows may have more axes, in the chunk and in ``rstd`` alike.
    """
    y = z.to(COMPUTE) * tl.expand_dims(rstd, -1)
    if weight is not None:
        if ROUND_NORM:
            y = y.to(DTYPE).to(COMPUTE)
        weight = weight.to(COMPUTE)
        if WEIGHT_OFFSET != 0:
            weight += WEIGHT_OFFSET
        y = y * weight
    return y


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, residual_out_ptr,
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    stride_y_outer, stride_y_inner, stride_residual_out_outer, stride_residual_out_inner,
    n_rows, n_inner,
    N_COLS: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr,
    ROUND_RESIDUAL: tl.constexpr, COMPUTE: tl.constexpr, TWO_LEVELS: tl.constexpr, ALIGN: tl.constexpr,
    PRELOAD: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK_M rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < n_rows
    x_row = row_offset(row, n_inner, stride_x_outer, stride_x_inner, TWO_LEVELS, ALIGN[0])
    residual_row = row_offset(row, n_inner, stride_residual_outer, stride_residual_inner, TWO_LEVELS, ALIGN[1])
    residual_out_row = row_offset(
        row, n_inner, stride_residual_out_outer, stride_residual_out_inner, TWO_LEVELS, ALIGN[3]
    )
    y_row = row_offset(row, n_inner, stride_y_outer, stride_y_inner, TWO_LEVELS, ALIGN[2])
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    kept, weights, rstd = read_rows(
        x_ptr, residual_ptr, residual_out_ptr, weight_ptr, x_row, residual_row, residual_out_row, row_mask,
        N_COLS, EPS, ROUND_RESIDUAL, COMPUTE, BLOCK_M, CHUNK, RESIDENT, PRELOAD,
    )  # fmt: skip
    if RESIDENT:
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            weight = weight_ptr
            if PRELOAD:
                weight = weights[c]
            elif weight_ptr is not None:
                weight = load_weight(weight_ptr, column, N_COLS)
            y = normalised(kept[c], rstd, weight, WEIGHT_OFFSET, ROUND_NORM, DTYPE, COMPUTE)
            tl.store(y_ptr + tile(y_row, column), y.to(DTYPE), tile_mask(row_mask, column, N_COLS, CHUNK))
    else:
        for c in range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = tile_mask(row_mask, column, N_COLS, CHUNK)
            z = load_summed(
                x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, residual_out_row, column, mask,
                False, ROUND_RESIDUAL, COMPUTE,
            )  # fmt: skip
            weight = weight_ptr
            if weight_ptr is not None:
                weight = load_weight(weight_ptr, column, N_COLS)
            y = normalised(z, rstd, weight, WEIGHT_OFFSET, ROUND_NORM, DTYPE, COMPUTE)
            tl.store(y_ptr + tile(y_row, column), y.to(DTYPE), mask)


def plan(call: RmsNormCall, inputs: Inputs, outputs: Tensors) -> Runner:
    """Prepare the launch for tensors of this metadata; the tensors themselves are not kept."""
    if call.n_rows == 0:
        return lambda tensors: None
    (x, residual, weight), (y, stored) = inputs, outputs
    seen = rows([t for t in (x, residual, y, stored) if t is not None], any_order=True)
    if seen is None or (weight is not None and weight.stride(0) != 1 and call.n_cols > 1):
        return contiguous_twin(plan, call, inputs, outputs)
    device = facts(x.device)
    block = row_block(call.n_cols, x.element_size(), device, "plain" if residual is None else "residual")
    programs = check_programs(block.programs(call.n_rows), "rms_norm", "x")
    preloads = weight is not None and block.preloads(programs, device, light=True)
    strides = seen.strides_of((x, residual, y, stored))
    tail = (
        *(stride for pair in strides for stride in pair),
        call.n_rows,
        seen.inner,
        call.n_cols,
        float(call.options.eps),
        float(call.options.weight_offset),
        call.options.cast == "before_weight",
        call.options.residual_rounding == "rounded",
        COMPUTE[call.compute_dtype],
        seen.inner > 1,
        tuple(map(alignment, strides)),
        preloads,
        block.rows,
        block.chunk,
        block.resident,
    )
    return BoundKernel(rms_norm_kernel, programs, x.device, tail, block.options(device, preloads=preloads))


def _plan_backward(call: RmsNormCall, inputs: GradInputs, outputs: Tensors) -> Runner:
    from tilewright.ops.rms_norm.kernels_backward import plan as plan_backward  # at its first use

    return plan_backward(call, inputs, outputs)


PLANNER = Planner(plan, _plan_backward)
