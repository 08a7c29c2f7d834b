"""The Triton kernels of FP8 quantisation: one body for every source, format and policy, and one for the way back.

A program quantises ``BLOCK_M`` rows in chunks, as RMSNorm's kernel normalises them and with its functions: what is
quantised in the same launch has the same bits as what RMSNorm returns. Each thread finds the largest magnitude of the
elements it holds side by side, so that a group takes few exchanges between threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.quant_fp8.call import Inputs
from tilewright.ops.quant_fp8.kernels_dequant import as_bytes
from tilewright.ops.quant_fp8.kernels_format import (
    GROUP_SIZE,
    ROUNDS_INPUT,
    constants_of,
    factors,
    larger,
    quantise_by,
    quantise_given,
    quantise_groups,
    scale_of,
    store_scales,
)
from tilewright.ops.rms_norm.kernels import (
    load_summed,
    load_weight,
    normalised,
    read_rows,
    row_offset,
    tile,
    tile_mask,
)
from tilewright.ops.rms_norm.launch import cut_block, row_block
from tilewright.ops.rows import alignment, contiguous_twin, rows
from tilewright.platforms import facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tilewright.ops.quant_fp8.call import QuantCall
    from tilewright.ops.quant_fp8.format import QuantFormat
    from tilewright.ops.rms_norm.call import Runner, Tensors


_MAX_ROWS = 2**31 - 2**16
"""Rows that 32 bits count, and some more of the last block."""


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
def _token(row, n_tokens, n_batch, ROPE: tl.constexpr):
    """Which token of its sequence a row belongs to, and which sequence, each [BLOCK_M]."""
    HEADS: tl.constexpr = ROPE[5]
    LAYOUT: tl.constexpr = ROPE[6]
    if not ROPE[7]:  # numbers of 64 bits are divided in many steps
        row = row.to(tl.int32)
    if LAYOUT == "bhsd":
        token = row % n_tokens
        sequence = row // n_tokens // HEADS
    elif LAYOUT == "sbhd":
        token = row // HEADS // n_batch
        sequence = row // HEADS % n_batch
    elif LAYOUT == "bshd":
        token = row // HEADS % n_tokens
        sequence = row // HEADS // n_tokens
    else:  # one sequence
        token = row // HEADS
        sequence = token * 0
    return token, sequence


@triton.jit
def _twice(value):
    """Each of ``value``, [BLOCK_M, N], for both members of a pair, [BLOCK_M, 2 * N]."""
    both = tl.join(value, value)
    return tl.reshape(both, (value.shape[0], 2 * value.shape[1]))


@triton.jit
def _rotated(
    x_ptr, cos_ptr, sin_ptr, x_row, cos_row, sin_row, is_turned, z, start,
    ROPE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of rows that are rotated, fp32 [BLOCK_M, CHUNK], not rounded at the end.

    The products and the sum are those of rope's kernel: one of them for each member of a pair, in either order. Pairs
    side by side are exchanged in registers, others are read once more, from the cache.
    """
    OFFSET: tl.constexpr = ROPE[0]
    DIM: tl.constexpr = ROPE[1]
    INTERLEAVED: tl.constexpr = ROPE[2]
    FULL: tl.constexpr = ROPE[3]
    column = start + tl.arange(0, CHUNK)
    feature = column - OFFSET
    turned = ((feature >= 0) & (feature < DIM))[None, :] & is_turned[:, None]
    is_first = feature % 2 == 0 if INTERLEAVED else feature < DIM // 2
    x = z.to(tl.float32)
    if INTERLEAVED and OFFSET % 2 == 0:
        first, second = tl.split(tl.reshape(x, (BLOCK_M, CHUNK // 2, 2)))
        other = tl.reshape(tl.join(second, first), (BLOCK_M, CHUNK))
    else:
        step: tl.constexpr = 1 if INTERLEAVED else DIM // 2
        partner = column + tl.where(is_first, step, -step)
        other = tl.load(x_ptr + tile(x_row, partner), turned, 0.0).to(tl.float32)
    if INTERLEAVED and OFFSET % 2 == 0 and not FULL:
        pair = start // 2 - OFFSET // 2 + tl.arange(0, CHUNK // 2)
        paired = ((pair >= 0) & (pair < DIM // 2))[None, :] & is_turned[:, None]
        cos = _twice(_entries(cos_ptr, cos_row, pair, paired, ROPE, DTYPE))
        sin = _twice(_entries(sin_ptr, sin_row, pair, paired, ROPE, DTYPE))
    else:
        entry = feature
        if INTERLEAVED and not FULL:
            entry = feature // 2
        elif not FULL:
            entry = tl.where(is_first, feature, feature - DIM // 2)
        cos = _entries(cos_ptr, cos_row, entry, turned, ROPE, DTYPE)
        sin = _entries(sin_ptr, sin_row, entry, turned, ROPE, DTYPE)
    y = x * cos + other * tl.where(is_first[None, :], -sin, sin)
    return tl.where(turned, y, x)


@triton.jit
def _entries(table_ptr, table_row, entry, mask, ROPE: tl.constexpr, DTYPE: tl.constexpr):
    """Entries of cosines or sines, fp32; nobody reads those that the mask leaves out."""
    values = tl.load(table_ptr + tile(table_row, entry), mask, 0.0)
    if ROPE[4]:  # rounded as Hugging Face's models do
        values = values.to(DTYPE)
    return values.to(tl.float32)


@triton.jit
def _chunk(
    x_ptr, residual_ptr, residual_out_ptr, cos_ptr, sin_ptr,
    x_row, residual_row, residual_out_row, cos_row, sin_row, row_mask, is_turned, start,
    N_COLS: tl.constexpr, SOURCE: tl.constexpr, ROPE: tl.constexpr, ROUND_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of rows as ``_source`` takes it, [BLOCK_M, CHUNK]: as it is, summed with another, or rotated."""
    column = start + tl.arange(0, CHUNK)
    z = load_summed(
        x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, residual_out_row, column,
        tile_mask(row_mask, column, N_COLS, CHUNK), False, ROUND_RESIDUAL, tl.float32,
    )  # fmt: skip
    if SOURCE == "rope":
        z = _rotated(
            x_ptr, cos_ptr, sin_ptr, x_row, cos_row, sin_row, is_turned, z, start,
            ROPE, x_ptr.dtype.element_ty, BLOCK_M, CHUNK,
        )  # fmt: skip
    return z


@triton.jit
def _input(rounded, exact, FORMAT: tl.constexpr):
    """What a format quantises."""
    y = rounded
    if not FORMAT[ROUNDS_INPUT]:
        y = exact
    return y


@triton.jit
def _quantise_chunk(
    values_ptr, scale_ptr, rounded, exact, given_scale, row, row_mask, start, stride_row, stride_group,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantise one chunk by groups or by a given scale; per token is done when the whole row is known."""
    y = _input(rounded, exact, FORMAT)
    if FORMAT[GROUP_SIZE] > 0:
        quantise_groups(
            values_ptr, scale_ptr, y, row, row_mask, start, stride_row, stride_group, N_COLS, FORMAT,
            BLOCK_M, CHUNK, VECTOR,
        )  # fmt: skip
    elif FORMAT[GROUP_SIZE] < 0:
        column = start + tl.arange(0, CHUNK)
        quantise_given(values_ptr, y, given_scale, row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def _seen(largest, rounded, exact, FORMAT: tl.constexpr):
    """The largest magnitudes of a row so far, [BLOCK_M, CHUNK], of a format per token."""
    if FORMAT is not None and FORMAT[GROUP_SIZE] == 0:
        y = _input(rounded, exact, FORMAT)
        largest = larger(largest, tl.abs(y))
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
    return any(f is not None and not f[ROUNDS_INPUT] for f in formats)


@triton.constexpr_function
def _any_per_token(*formats):
    """Whether some format has one scale for a row."""
    return any(f is not None and f[GROUP_SIZE] == 0 for f in formats)


@triton.jit
def _row_scale(scale_ptr, largest, row, row_mask, stride_row, FORMAT: tl.constexpr):
    """The factors of rows per token, each [BLOCK_M]; stores their scales."""
    high = tl.reduce(largest, 1, larger)
    low = high
    if FORMAT is not None and FORMAT[GROUP_SIZE] == 0:
        scale = scale_of(high, FORMAT)
        high, low = factors(scale, FORMAT)
        one = tl.arange(0, 1)
        store_scales(scale_ptr, scale[:, None], row, row_mask, one, one == 0, stride_row, 1, FORMAT)
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
    if FORMAT_0[GROUP_SIZE] == 0:
        _quantise_row(values_0_ptr, rounded, exact, high_0, low_0, row, row_mask, column, N_COLS, FORMAT_0, CHUNK)
    if FORMAT_1 is not None and FORMAT_1[GROUP_SIZE] == 0:
        _quantise_row(values_1_ptr, rounded, exact, high_1, low_1, row, row_mask, column, N_COLS, FORMAT_1, CHUNK)
    if FORMAT_2 is not None and FORMAT_2[GROUP_SIZE] == 0:
        _quantise_row(values_2_ptr, rounded, exact, high_2, low_2, row, row_mask, column, N_COLS, FORMAT_2, CHUNK)


@triton.jit
def _quantise_row(
    values_ptr, rounded, exact, high, low, row, row_mask, column,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    y = _input(rounded, exact, FORMAT)
    quantise_by(values_ptr, y, high, low, row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def quant_kernel(
    x_ptr, residual_ptr, weight_ptr, given_scale_ptr, cos_ptr, sin_ptr, position_ptr,
    values_0_ptr, scale_0_ptr, values_1_ptr, scale_1_ptr, values_2_ptr, scale_2_ptr, residual_out_ptr, emit_ptr,
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    stride_residual_out_outer, stride_residual_out_inner,
    stride_0_row, stride_0_group, stride_1_row, stride_1_group, stride_2_row, stride_2_group,
    n_rows, n_inner, n_tokens, n_batch, stride_position_batch, stride_position_token, n_positions,
    stride_cos, stride_sin,
    N_COLS: tl.constexpr, SOURCE: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    ROUND_NORM: tl.constexpr, ROUND_RESIDUAL: tl.constexpr, TWO_LEVELS: tl.constexpr, ALIGN: tl.constexpr,
    PRELOAD: tl.constexpr,
    FORMAT_0: tl.constexpr, FORMAT_1: tl.constexpr, FORMAT_2: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, RESIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Quantise BLOCK_M rows in up to three formats, or with SPLIT one chunk of them."""
    CHUNKS: tl.constexpr = (N_COLS + CHUNK - 1) // CHUNK
    block = tl.program_id(0)
    first = 0
    last = CHUNKS
    if SPLIT:
        first = block % CHUNKS
        last = first + 1
        block = block // CHUNKS
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < n_rows
    x_row = row_offset(row, n_inner, stride_x_outer, stride_x_inner, TWO_LEVELS, ALIGN[0])
    residual_row = row_offset(row, n_inner, stride_residual_outer, stride_residual_inner, TWO_LEVELS, ALIGN[1])
    residual_out_row = row_offset(
        row, n_inner, stride_residual_out_outer, stride_residual_out_inner, TWO_LEVELS, ALIGN[2]
    )
    cos_row = row
    sin_row = row
    is_turned = row_mask
    if SOURCE == "rope":
        position, sequence = _token(row, n_tokens, n_batch, ROPE)
        if position_ptr is not None:
            place = sequence * stride_position_batch + position * stride_position_token
            position = tl.load(position_ptr + place, row_mask, 0)
        position = position.to(tl.int64)
        is_turned = row_mask & (position >= 0) & (position < n_positions)
        cos_row = position * stride_cos
        sin_row = position * stride_sin
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
            z = _chunk(
                x_ptr, residual_ptr, residual_out_ptr, cos_ptr, sin_ptr,
                x_row, residual_row, residual_out_row, cos_row, sin_row, row_mask, is_turned, c * CHUNK,
                N_COLS, SOURCE, ROPE, ROUND_RESIDUAL, BLOCK_M, CHUNK,
            )  # fmt: skip
            kept = kept + (z,)  # noqa: RUF005
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
        for c in range(first, last):
            column = c * CHUNK + tl.arange(0, CHUNK)
            weight = weight_ptr
            if weight_ptr is not None:
                weight = load_weight(weight_ptr, column, N_COLS)
            z = _chunk(
                x_ptr, residual_ptr, residual_out_ptr, cos_ptr, sin_ptr,
                x_row, residual_row, residual_out_row, cos_row, sin_row, row_mask, is_turned, c * CHUNK,
                N_COLS, SOURCE, ROPE, ROUND_RESIDUAL, BLOCK_M, CHUNK,
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
                z = _chunk(
                    x_ptr, residual_ptr, residual_out_ptr, cos_ptr, sin_ptr,
                    x_row, residual_row, residual_out_row, cos_row, sin_row, row_mask, is_turned, c * CHUNK,
                    N_COLS, SOURCE, ROPE, ROUND_RESIDUAL, BLOCK_M, CHUNK,
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
    x, residual, weight, _, cos, sin, _ = inputs
    place = len(outputs) - (2 if call.emit else 1)  # of the stored sum
    stored = None if residual is None else outputs[place]
    seen = rows([t for t in (x, residual, stored) if t is not None])
    is_loose = any(table is not None and table.stride(1) != 1 for table in (cos, sin))
    if seen is None or is_loose or (weight is not None and weight.stride(0) != 1 and call.n_cols > 1):
        return contiguous_twin(plan, call, inputs, outputs, written=[] if residual is None else [place])
    device = facts(x.device)
    kind = "gated" if call.source == "silu_mul" else "plain" if residual is None else "residual"
    whole = row_block(call.n_cols, x.element_size(), device, kind)
    cut = None if _needs_rows(call) else cut_block(call.n_rows, call.n_cols, whole, kind, device)
    block, pieces = (whole, 1) if cut is None else (cut, cut.chunks(call.n_cols))
    programs = check_programs(block.programs(call.n_rows) * pieces, "quant_fp8", "x")
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
        *_turns(call, inputs),
        call.n_cols,
        call.source,
        _rope_constants(call),
        float(options.eps) if options else 0.0,
        float(options.weight_offset) if options else 0.0,
        options is None or options.cast == "before_weight",
        options is None or options.residual_rounding == "rounded",
        seen.inner > 1,
        tuple(map(alignment, strides)),
        preloads,
        *(None if f is None else constants_of(call, f, device) for f in (*call.formats, None, None)[:3]),
        block.rows,
        block.chunk,
        block.vector,
        block.resident,
        cut is not None,
    )
    kernel = BoundKernel(quant_kernel, programs, x.device, tail, block.options(device, preloads=preloads))
    return _arranged(call, kernel)


def _turns(call: QuantCall, inputs: Inputs) -> tuple[int, ...]:
    """Which row of the table a row is turned by, as the kernel counts."""
    turned, cos, sin, given = call.rope, inputs.cos, inputs.sin, inputs.position_ids
    if turned is None or cos is None or sin is None:
        return (1, 1, 0, 0, 0, 0, 0)
    by_sequence = 0 if given is None or given.dim() == 1 or given.shape[0] == 1 else given.stride(0)
    by_token = 0 if given is None else given.stride(-1)
    return turned.seqlen, turned.batch, by_sequence, by_token, turned.n_positions, cos.stride(0), sin.stride(0)


def _rope_constants(call: QuantCall) -> tuple[Any, ...] | None:
    """What ``_rotated`` and ``_token`` take.

    The first feature, how many, whether they are interleaved, whether each has an entry, whether entries are rounded;
    the heads, how rows are laid out, whether there are too many for 32 bits.
    """
    if call.rope is None:
        return None
    options = call.rope.options
    layout = "thd" if call.rope.batch == 1 and options.layout in {"bshd", "sbhd"} else options.layout
    features = options.rotary_offset, call.rope.rotary_dim, options.interleaved, call.rope.full_table
    return (*features, options.numerics == "hf", call.rope.n_q_heads, layout, call.n_rows >= _MAX_ROWS)


def _needs_rows(call: QuantCall) -> bool:
    """Whether something has to be known of a whole row: its norm, or its largest magnitude."""
    return call.norm is not None or (not call.static and any(f.group_size is None for f in call.formats))


def _arranged(call: QuantCall, kernel: BoundKernel) -> Runner:
    """Put the results of a call into the kernel's order; scales that Triton has no dtype for as bytes."""
    n = len(call.formats)
    bytewise = [f.scale_format in {"ue8m0", "ue8m0_packed"} for f in call.formats]
    has_sum = call.norm is not None and call.norm.residual_dtype is not None
    missing = (None, None) * (3 - n)
    n_inputs = len(Inputs._fields)

    def run(tensors: Tensors) -> None:
        results = tensors[n_inputs:]
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
        kernel((*tensors[:n_inputs], *pairs, *missing, stored, emitted))

    return run


def _scale_strides(f: QuantFormat | None, scale: torch.Tensor | None) -> tuple[int, int]:
    """Strides of a scale over rows and groups, as the kernel counts them: in bytes where it writes bytes."""
    if f is None or scale is None:
        return (0, 0)
    row = scale.stride(-2) if scale.dim() > 1 else 0
    group = scale.stride(-1)
    return (4 * row, 4 * group) if f.is_packed else (row, group)
