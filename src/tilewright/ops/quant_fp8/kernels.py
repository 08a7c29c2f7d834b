"""The Triton kernels of FP8 quantisation: one body for every source, format and policy, and one for the way back.

A program quantises ``BLOCK_M`` rows in chunks, as RMSNorm's kernel normalises them and with its functions: what is
quantised in the same launch has the same bits as what RMSNorm returns. Each thread finds the largest magnitude of the
elements it holds side by side, so that a group takes few exchanges between threads.

Division by a scale is exact where the policy divides. Its quotient is ``x * high + x * low``, with ``high + low`` the
reciprocal to twice the precision and ``high`` so short that its product with a 16-bit ``x`` is exact: one product and
one multiply-add for each element instead of the eight or so instructions of a division. For float32 ``x`` the product
with the reciprocal is corrected by its remainder (P. Markstein, "Computation of elementary functions on the IBM RISC
System/6000 processor", 1990).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.quant_fp8.kernels_dequant import as_bytes
from tilewright.ops.rms_norm.kernels import (
    inverse_rms,
    load_summed,
    load_weight,
    normalised,
    read_rows,
    row_offset,
    tile,
    tile_mask,
)
from tilewright.ops.rms_norm.launch import row_block
from tilewright.ops.rows import alignment, contiguous_twin, rows
from tilewright.platforms import facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilewright.ops.quant_fp8.call import Inputs, QuantCall
    from tilewright.ops.quant_fp8.format import QuantFormat
    from tilewright.ops.rms_norm.call import Runner, Tensors
    from tilewright.platforms import DeviceFacts

# A Triton that lacks one of these fails here, at import, where dispatch takes note, and not at a launch.
_NEEDED = (inverse_rms, libdevice.fast_dividef, tl.PropagateNan.ALL, tl.reduce)

# What a FORMAT holds, a tuple that is settled when compiling: the group size, 0 per token, -1 for a given scale; how
# the scale is kept ("fp32"; "power" of two in fp32; "bytes"); whether to divide; whether the input is rounded; the
# maximum; the floors of amax, scale and rounded scale; whether to clamp; scales to a word; bits of ``high``.
_MANTISSA = {torch.bfloat16: 8, torch.float16: 11}
"""Bits of the mantissa of 16-bit dtypes."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _source(
    x_ptr, x_row, column, mask, kept, rstd, weight,
    N_COLS: tl.constexpr, SOURCE: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One chunk of what is quantised, fp32 [BLOCK_M, CHUNK], not rounded at the end."""
    if SOURCE == "norm":
        y = normalised(kept, rstd, weight, WEIGHT_OFFSET, ROUND, DTYPE, tl.float32)
    elif SOURCE == "silu_mul":
        gate = kept.to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate))
        if ROUND:
            y = y.to(DTYPE).to(tl.float32)
        y = y * tl.load(x_ptr + tile(x_row, column) + N_COLS, mask, 0.0).to(tl.float32)
    else:
        y = kept.to(tl.float32)
    return y


@triton.jit
def _scale_of(amax, FORMAT: tl.constexpr):
    """The scale of groups from their largest magnitudes, of any shape, as ``reference.scales`` defines it."""
    MAXIMUM: tl.constexpr = FORMAT[4]
    amax = tl.maximum(amax, FORMAT[5], propagate_nan=tl.PropagateNan.ALL)
    maximum = tl.full(amax.shape, MAXIMUM, tl.float32)
    scale = amax * (1.0 / MAXIMUM)  # corrected by its remainder: amax / maximum, rounded once
    corrected = tl.fma(tl.fma(-scale, maximum, amax), tl.full(amax.shape, 1.0 / MAXIMUM, tl.float32), scale)
    scale = tl.where(amax == float("inf"), amax, corrected)
    scale = tl.maximum(scale, FORMAT[6], propagate_nan=tl.PropagateNan.ALL)
    if FORMAT[1] != "fp32":
        scale = tl.maximum(scale, FORMAT[7], propagate_nan=tl.PropagateNan.ALL)
        bits = scale.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, rounded, scale)
    return scale


@triton.jit
def _factors(scale, FORMAT: tl.constexpr):
    """Two factors of an element for its division by ``scale``; see the top of this file.

    FORMAT[10] bits of the reciprocal's mantissa are ``high``, or all of it where that is 24.
    """
    one = tl.full(scale.shape, 1.0, tl.float32)
    reciprocal = libdevice.fast_dividef(one, scale)
    if FORMAT[2] and FORMAT[10] < 24 and FORMAT[1] == "fp32":
        MASK: tl.constexpr = -(1 << (24 - FORMAT[10]))
        high = (reciprocal.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
        low = tl.fma(-scale, high, one) * reciprocal
        low = tl.where(scale == float("inf"), 0.0, low)
    else:
        high = tl.fma(reciprocal, tl.fma(-scale, reciprocal, one), reciprocal)
        high = tl.where(scale == float("inf"), 0.0, high)
        low = -scale
    return high, low


@triton.jit
def _applied(x, high, low, FORMAT: tl.constexpr):
    """``x / scale`` or ``x * (1 / scale)``; all of one shape."""
    if not FORMAT[2] or FORMAT[1] != "fp32":  # a power of two has an exact reciprocal
        q = x * high
    elif FORMAT[10] < 24:
        q = x * high
        if FORMAT[0] < 0:  # under a given scale an infinite x is no reason for the scale to be infinite
            corrected = tl.fma(x, low, q)
            q = tl.where(tl.abs(corrected) < float("inf"), corrected, q)
        else:
            q = tl.fma(x, low, q)
    else:
        q = x * high
        corrected = tl.fma(tl.fma(q, low, x), high, q)
        q = tl.where((tl.abs(corrected) < float("inf")) & (q != 0), corrected, q)  # a zero keeps its sign
    return q


@triton.jit
def _store_values(
    values_ptr, q, row, row_mask, column, N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Clamp, convert and store one chunk of values [BLOCK_M, CHUNK]."""
    if FORMAT[8]:
        q = tl.clamp(q, -FORMAT[4], FORMAT[4], propagate_nan=tl.PropagateNan.ALL)
    q = q.to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + tile(row * N_COLS, column), q, tile_mask(row_mask, column, N_COLS, CHUNK))


@triton.jit
def _store_scales(scale_ptr, scale, row, row_mask, group, mask, stride_row, stride_group, FORMAT: tl.constexpr):
    """Scales [BLOCK_M, K] of the groups [K], as float32 or as exponents, one of them for each that ``mask`` keeps."""
    if FORMAT[1] == "bytes":
        value = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
        PACK: tl.constexpr = FORMAT[9]
        column = (group // PACK) * stride_group + group % PACK
    else:
        value = scale
        column = group * stride_group
    tl.store(scale_ptr + row[:, None] * stride_row + column[None, :], value, row_mask[:, None] & mask[None, :])


@triton.jit
def _quantise_groups(
    values_ptr, scale_ptr, y, row, row_mask, start, stride_scale_row, stride_scale_group,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantise one chunk ``y [BLOCK_M, CHUNK]`` that begins with column ``start``, by groups."""
    GROUP: tl.constexpr = min(FORMAT[0], CHUNK)
    PARTS: tl.constexpr = GROUP // VECTOR
    N_GROUPS: tl.constexpr = CHUNK // GROUP
    pieces = tl.reshape(y, (BLOCK_M, CHUNK // VECTOR, VECTOR))
    largest = tl.reduce(tl.abs(pieces), 2, _larger)  # of what a thread holds side by side
    amax = tl.reduce(tl.reshape(largest, (BLOCK_M, N_GROUPS, PARTS)), 2, _larger)
    scale = _scale_of(amax, FORMAT)
    high, low = _factors(scale, FORMAT)
    # One of everything for each piece: what belongs to an element lies in the thread that holds it.
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_M, N_GROUPS, PARTS)), (BLOCK_M, N_GROUPS * PARTS))
    high = tl.reshape(tl.broadcast_to(high[:, :, None], (BLOCK_M, N_GROUPS, PARTS)), (BLOCK_M, N_GROUPS * PARTS, 1))
    low = tl.reshape(tl.broadcast_to(low[:, :, None], (BLOCK_M, N_GROUPS, PARTS)), (BLOCK_M, N_GROUPS * PARTS, 1))
    q = _applied(
        pieces, tl.broadcast_to(high, pieces.shape), tl.broadcast_to(low, pieces.shape), FORMAT
    )  # fmt: skip
    piece = tl.arange(0, N_GROUPS * PARTS)
    first = (piece % PARTS == 0) & (start + piece * VECTOR < N_COLS)
    group = start // FORMAT[0] + piece // PARTS
    _store_scales(scale_ptr, scale, row, row_mask, group, first, stride_scale_row, stride_scale_group, FORMAT)
    column = start + tl.arange(0, CHUNK)
    _store_values(values_ptr, tl.reshape(q, (BLOCK_M, CHUNK)), row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def _quantise_by(
    values_ptr, y, high, low, row, row_mask, column,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Quantise one chunk by factors [BLOCK_M] of its rows."""
    shape: tl.constexpr = y.shape
    q = _applied(
        y, tl.broadcast_to(high[:, None], shape), tl.broadcast_to(low[:, None], shape), FORMAT
    )  # fmt: skip
    _store_values(values_ptr, q, row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def _quantise_given(
    values_ptr, y, scale, row, row_mask, column, N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Quantise one chunk by a given scale, which may be any number."""
    scales = tl.full(y.shape, scale, tl.float32)
    if (tl.abs(scale) >= 1.1754943508222875e-38) & (tl.abs(scale) <= 8.507059173023462e37):  # its reciprocal is normal
        high, low = _factors(tl.full((1,), scale, tl.float32), FORMAT)
        q = _applied(y, tl.broadcast_to(high[:, None], y.shape), tl.broadcast_to(low[:, None], y.shape), FORMAT)
    elif FORMAT[2]:
        q = tl.div_rn(y, scales)
    else:
        q = y * tl.div_rn(tl.full(y.shape, 1.0, tl.float32), scales)
    _store_values(values_ptr, q, row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def _quantise_chunk(
    values_ptr, scale_ptr, rounded, exact, given_scale, row, row_mask, start, stride_row, stride_group,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantise one chunk by groups or by a given scale; per token is done when the whole row is known."""
    y = rounded
    if not FORMAT[3]:
        y = exact
    if FORMAT[0] > 0:
        _quantise_groups(
            values_ptr, scale_ptr, y, row, row_mask, start, stride_row, stride_group, N_COLS, FORMAT,
            BLOCK_M, CHUNK, VECTOR,
        )  # fmt: skip
    elif FORMAT[0] < 0:
        column = start + tl.arange(0, CHUNK)
        _quantise_given(values_ptr, y, given_scale, row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def _seen(largest, rounded, exact, FORMAT: tl.constexpr):
    """The largest magnitudes of a row so far, [BLOCK_M, CHUNK], of a format per token."""
    if FORMAT is not None and FORMAT[0] == 0:
        y = rounded
        if not FORMAT[3]:
            y = exact
        largest = _larger(largest, tl.abs(y))
    return largest


@triton.jit
def _first_pass(
    x_ptr, emit_ptr, values_0_ptr, scale_0_ptr, values_1_ptr, scale_1_ptr, values_2_ptr, scale_2_ptr,
    kept, rstd, weight, x_row, row, row_mask, start, largest_0, largest_1, largest_2, given_scale,
    stride_0_row, stride_0_group, stride_1_row, stride_1_group, stride_2_row, stride_2_group,
    N_COLS: tl.constexpr, SOURCE: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr,
    FORMAT_0: tl.constexpr, FORMAT_1: tl.constexpr, FORMAT_2: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Everything about one chunk that can be done before the whole row is known."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    column = start + tl.arange(0, CHUNK)
    mask = tile_mask(row_mask, column, N_COLS, CHUNK)
    emitted = _source(
        x_ptr, x_row, column, mask, kept, rstd, weight, N_COLS, SOURCE, WEIGHT_OFFSET, ROUND_NORM, DTYPE
    ).to(DTYPE)  # fmt: skip
    if emit_ptr is not None:
        tl.store(emit_ptr + tile(row * N_COLS, column), emitted, mask)
    rounded = emitted.to(tl.float32)
    exact = rounded
    if _any_exact(FORMAT_0, FORMAT_1, FORMAT_2):
        exact = _source(x_ptr, x_row, column, mask, kept, rstd, weight, N_COLS, SOURCE, WEIGHT_OFFSET, False, DTYPE)
        exact = tl.where(mask, exact, 0.0)
    _quantise_chunk(
        values_0_ptr, scale_0_ptr, rounded, exact, given_scale, row, row_mask, start,
        stride_0_row, stride_0_group, N_COLS, FORMAT_0, BLOCK_M, CHUNK, VECTOR,
    )  # fmt: skip
    if FORMAT_1 is not None:
        _quantise_chunk(
            values_1_ptr, scale_1_ptr, rounded, exact, given_scale, row, row_mask, start,
            stride_1_row, stride_1_group, N_COLS, FORMAT_1, BLOCK_M, CHUNK, VECTOR,
        )  # fmt: skip
    if FORMAT_2 is not None:
        _quantise_chunk(
            values_2_ptr, scale_2_ptr, rounded, exact, given_scale, row, row_mask, start,
            stride_2_row, stride_2_group, N_COLS, FORMAT_2, BLOCK_M, CHUNK, VECTOR,
        )  # fmt: skip
    largest_0 = _seen(largest_0, rounded, exact, FORMAT_0)
    largest_1 = _seen(largest_1, rounded, exact, FORMAT_1)
    largest_2 = _seen(largest_2, rounded, exact, FORMAT_2)
    return largest_0, largest_1, largest_2


@triton.constexpr_function
def _any_exact(*formats):
    """Whether some format quantises what is not rounded."""
    return any(f is not None and not f[3] for f in formats)


@triton.constexpr_function
def _any_per_token(*formats):
    """Whether some format has one scale for a row."""
    return any(f is not None and f[0] == 0 for f in formats)


@triton.jit
def _row_scale(scale_ptr, largest, row, row_mask, stride_row, FORMAT: tl.constexpr):
    """The factors of rows per token, each [BLOCK_M]; stores their scales."""
    high = tl.reduce(largest, 1, _larger)
    low = high
    if FORMAT is not None and FORMAT[0] == 0:
        scale = _scale_of(high, FORMAT)
        high, low = _factors(scale, FORMAT)
        one = tl.arange(0, 1)
        _store_scales(scale_ptr, scale[:, None], row, row_mask, one, one == 0, stride_row, 1, FORMAT)
    return high, low


@triton.jit
def _second_pass(
    x_ptr, values_0_ptr, values_1_ptr, values_2_ptr, kept, rstd, weight, x_row, row, row_mask, start,
    high_0, low_0, high_1, low_1, high_2, low_2,
    N_COLS: tl.constexpr, SOURCE: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr,
    FORMAT_0: tl.constexpr, FORMAT_1: tl.constexpr, FORMAT_2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Quantise one chunk by the scales of its rows."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    column = start + tl.arange(0, CHUNK)
    mask = tile_mask(row_mask, column, N_COLS, CHUNK)
    rounded = _source(
        x_ptr, x_row, column, mask, kept, rstd, weight, N_COLS, SOURCE, WEIGHT_OFFSET, ROUND_NORM, DTYPE
    ).to(DTYPE).to(tl.float32)  # fmt: skip
    exact = rounded
    if _any_exact(FORMAT_0, FORMAT_1, FORMAT_2):
        exact = _source(x_ptr, x_row, column, mask, kept, rstd, weight, N_COLS, SOURCE, WEIGHT_OFFSET, False, DTYPE)
    if FORMAT_0[0] == 0:
        _quantise_row(values_0_ptr, rounded, exact, high_0, low_0, row, row_mask, column, N_COLS, FORMAT_0, CHUNK)
    if FORMAT_1 is not None and FORMAT_1[0] == 0:
        _quantise_row(values_1_ptr, rounded, exact, high_1, low_1, row, row_mask, column, N_COLS, FORMAT_1, CHUNK)
    if FORMAT_2 is not None and FORMAT_2[0] == 0:
        _quantise_row(values_2_ptr, rounded, exact, high_2, low_2, row, row_mask, column, N_COLS, FORMAT_2, CHUNK)


@triton.jit
def _quantise_row(
    values_ptr, rounded, exact, high, low, row, row_mask, column,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    y = rounded
    if not FORMAT[3]:
        y = exact
    _quantise_by(values_ptr, y, high, low, row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def quant_kernel(
    x_ptr, residual_ptr, weight_ptr, given_scale_ptr,
    values_0_ptr, scale_0_ptr, values_1_ptr, scale_1_ptr, values_2_ptr, scale_2_ptr, residual_out_ptr, emit_ptr,
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    stride_residual_out_outer, stride_residual_out_inner,
    stride_0_row, stride_0_group, stride_1_row, stride_1_group, stride_2_row, stride_2_group,
    n_rows, n_inner,
    N_COLS: tl.constexpr, SOURCE: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    ROUND_NORM: tl.constexpr, ROUND_RESIDUAL: tl.constexpr, TWO_LEVELS: tl.constexpr, ALIGN: tl.constexpr,
    PRELOAD: tl.constexpr,
    FORMAT_0: tl.constexpr, FORMAT_1: tl.constexpr, FORMAT_2: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Quantise BLOCK_M rows in up to three formats."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < n_rows
    x_row = row_offset(row, n_inner, stride_x_outer, stride_x_inner, TWO_LEVELS, ALIGN[0])
    residual_row = row_offset(row, n_inner, stride_residual_outer, stride_residual_inner, TWO_LEVELS, ALIGN[1])
    residual_out_row = row_offset(
        row, n_inner, stride_residual_out_outer, stride_residual_out_inner, TWO_LEVELS, ALIGN[2]
    )
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    kept = ()
    weights = ()
    if SOURCE == "norm":
        kept, weights, rstd = read_rows(
            x_ptr, residual_ptr, residual_out_ptr, weight_ptr, x_row, residual_row, residual_out_row, row_mask,
            N_COLS, EPS, ROUND_RESIDUAL, tl.float32, BLOCK_M, CHUNK, RESIDENT, PRELOAD,
        )  # fmt: skip
    elif RESIDENT:
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = tile_mask(row_mask, column, N_COLS, CHUNK)
            kept = kept + (tl.load(x_ptr + tile(x_row, column), mask, 0.0),)  # noqa: RUF005
    given_scale = given_scale_ptr
    if given_scale_ptr is not None:
        given_scale = tl.load(given_scale_ptr)
    width: tl.constexpr = CHUNK if _any_per_token(FORMAT_0, FORMAT_1, FORMAT_2) else 1
    largest_0 = tl.zeros((BLOCK_M, width), tl.float32)
    largest_1 = largest_0
    largest_2 = largest_0
    if RESIDENT:
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            weight = weight_ptr
            if PRELOAD:
                weight = weights[c]
            elif weight_ptr is not None:
                weight = load_weight(weight_ptr, c * CHUNK + tl.arange(0, CHUNK), N_COLS)
            largest_0, largest_1, largest_2 = _first_pass(
                x_ptr, emit_ptr, values_0_ptr, scale_0_ptr, values_1_ptr, scale_1_ptr, values_2_ptr, scale_2_ptr,
                kept[c], rstd, weight, x_row, row, row_mask, c * CHUNK, largest_0, largest_1, largest_2,
                given_scale, stride_0_row, stride_0_group, stride_1_row, stride_1_group,
                stride_2_row, stride_2_group, N_COLS, SOURCE, WEIGHT_OFFSET, ROUND_NORM,
                FORMAT_0, FORMAT_1, FORMAT_2, BLOCK_M, CHUNK, VECTOR,
            )  # fmt: skip
    else:
        for c in range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            weight = weight_ptr
            if weight_ptr is not None:
                weight = load_weight(weight_ptr, column, N_COLS)
            z = load_summed(
                x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, residual_out_row, column,
                tile_mask(row_mask, column, N_COLS, CHUNK), False, ROUND_RESIDUAL, tl.float32,
            )  # fmt: skip
            largest_0, largest_1, largest_2 = _first_pass(
                x_ptr, emit_ptr, values_0_ptr, scale_0_ptr, values_1_ptr, scale_1_ptr, values_2_ptr, scale_2_ptr,
                z, rstd, weight, x_row, row, row_mask, c * CHUNK, largest_0, largest_1, largest_2,
                given_scale, stride_0_row, stride_0_group, stride_1_row, stride_1_group,
                stride_2_row, stride_2_group, N_COLS, SOURCE, WEIGHT_OFFSET, ROUND_NORM,
                FORMAT_0, FORMAT_1, FORMAT_2, BLOCK_M, CHUNK, VECTOR,
            )  # fmt: skip
    if _any_per_token(FORMAT_0, FORMAT_1, FORMAT_2):
        high_0, low_0 = _row_scale(scale_0_ptr, largest_0, row, row_mask, stride_0_row, FORMAT_0)
        high_1, low_1 = _row_scale(scale_1_ptr, largest_1, row, row_mask, stride_1_row, FORMAT_1)
        high_2, low_2 = _row_scale(scale_2_ptr, largest_2, row, row_mask, stride_2_row, FORMAT_2)
        if RESIDENT:
            for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
                weight = weight_ptr
                if PRELOAD:
                    weight = weights[c]
                elif weight_ptr is not None:
                    weight = load_weight(weight_ptr, c * CHUNK + tl.arange(0, CHUNK), N_COLS)
                _second_pass(
                    x_ptr, values_0_ptr, values_1_ptr, values_2_ptr, kept[c], rstd, weight, x_row, row, row_mask,
                    c * CHUNK, high_0, low_0, high_1, low_1, high_2, low_2,
                    N_COLS, SOURCE, WEIGHT_OFFSET, ROUND_NORM, FORMAT_0, FORMAT_1, FORMAT_2, CHUNK,
                )  # fmt: skip
        else:
            for c in range((N_COLS + CHUNK - 1) // CHUNK):
                column = c * CHUNK + tl.arange(0, CHUNK)
                weight = weight_ptr
                if weight_ptr is not None:
                    weight = load_weight(weight_ptr, column, N_COLS)
                z = load_summed(
                    x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, residual_out_row, column,
                    tile_mask(row_mask, column, N_COLS, CHUNK), False, ROUND_RESIDUAL, tl.float32,
                )  # fmt: skip
                _second_pass(
                    x_ptr, values_0_ptr, values_1_ptr, values_2_ptr, z, rstd, weight, x_row, row, row_mask,
                    c * CHUNK, high_0, low_0, high_1, low_1, high_2, low_2,
                    N_COLS, SOURCE, WEIGHT_OFFSET, ROUND_NORM, FORMAT_0, FORMAT_1, FORMAT_2, CHUNK,
                )  # fmt: skip


def plan(call: QuantCall, inputs: Inputs, outputs: Sequence[torch.Tensor]) -> Runner:
    """Prepare the launch for tensors of this metadata; the tensors themselves are not kept."""
    if call.n_rows == 0:
        return lambda tensors: None
    x, residual, weight, _ = inputs
    place = len(outputs) - (2 if call.emit else 1)  # of the stored sum
    stored = None if residual is None else outputs[place]
    seen = rows([t for t in (x, residual, stored) if t is not None])
    if seen is None or (weight is not None and weight.stride(0) != 1 and call.n_cols > 1):
        return contiguous_twin(plan, call, inputs, outputs, written=[] if residual is None else [place])
    device = facts(x.device)
    kind = "gated" if call.source == "silu_mul" else "plain" if residual is None else "residual"
    block = row_block(call.n_cols, x.element_size(), device, kind)
    programs = check_programs(block.programs(call.n_rows), "quant_fp8", "x")
    preloads = weight is not None and block.preloads(programs, device, light=False)
    strides = seen.strides_of((x, residual, stored))
    options = call.norm.options if call.norm is not None else None
    scales = [None if call.static else outputs[2 * i + 1] for i in range(len(call.formats))]
    scales += [None] * (3 - len(scales))
    tail = (
        *(stride for pair in strides for stride in pair),
        *(stride for f, s in zip((*call.formats, None, None), scales, strict=False) for stride in _scale_strides(f, s)),
        call.n_rows,
        seen.inner,
        call.n_cols,
        call.source,
        float(options.eps) if options else 0.0,
        float(options.weight_offset) if options else 0.0,
        options is None or options.cast == "before_weight",
        options is None or options.residual_rounding == "rounded",
        seen.inner > 1,
        tuple(map(alignment, strides)),
        preloads,
        *(None if f is None else _constants(call, f, device) for f in (*call.formats, None, None)[:3]),
        block.rows,
        block.chunk,
        block.vector,
        block.resident,
    )
    kernel = BoundKernel(quant_kernel, programs, x.device, tail, block.options(device, preloads=preloads))
    return _arranged(call, kernel)


def _arranged(call: QuantCall, kernel: BoundKernel) -> Runner:
    """Put the results of a call into the kernel's order; scales that Triton has no dtype for as bytes."""
    n = len(call.formats)
    bytewise = [f.scale_format in {"ue8m0", "ue8m0_packed"} for f in call.formats]
    has_sum = call.norm is not None and call.norm.residual_dtype is not None
    missing = (None, None) * (3 - n)

    def run(tensors: Tensors) -> None:
        results = tensors[4:]
        pairs: list[torch.Tensor | None] = []
        if call.static:
            pairs += [results[0], None]
            rest = results[1:]
        else:
            for index in range(n):
                scale = results[2 * index + 1]
                pairs += [results[2 * index], as_bytes(scale) if bytewise[index] else scale]
            rest = results[2 * n :]
        stored = rest[0] if has_sum else None
        emitted = rest[-1] if call.emit else None
        kernel((*tensors[:4], *pairs, *missing, stored, emitted))

    return run


def _scale_strides(f: QuantFormat | None, scale: torch.Tensor | None) -> tuple[int, int]:
    """Strides of a scale over rows and groups, as the kernel counts them: in bytes where it writes bytes."""
    if f is None or scale is None:
        return (0, 0)
    row = scale.stride(-2) if scale.dim() > 1 else 0
    group = scale.stride(-1)
    return (4 * row, 4 * group) if f.is_packed else (row, group)


def _constants(call: QuantCall, f: QuantFormat, device: DeviceFacts) -> tuple[Any, ...]:
    """A format as the kernel's constant tuple."""
    policy = f.arithmetic
    assert f.dtype is not None
    maximum = float(policy.maximum_of(f.dtype))
    kind = {"fp32": "fp32", "ue8m0_fp32": "power"}.get(f.scale_format, "bytes")
    short = call.dtype in _MANTISSA and policy.round_input
    return (
        -1 if call.static else f.group_size or 0,
        kind,
        policy.apply == "divide",
        policy.round_input,
        maximum,
        float(policy.amax_floor),
        float(policy.scale_floor),
        float(policy.ue8m0_floor),
        not device.fp8_saturates or maximum != torch.finfo(f.dtype).max,
        4 if f.is_packed else 1,
        24 - _MANTISSA[call.dtype] if short else 24,
    )
