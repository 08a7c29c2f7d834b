"""The Triton kernel: rotary embedding's tiles, normalised on the way by the functions of RMSNorm's kernel.

A program loads its rows twice: whole, to sum their squares in the order of RMSNorm's kernel, and in pairs, to normalise
and rotate them. The second load finds the rows in the first cache. So a head has the bits that the two steps give it.

Multiply-add contraction is off, so that every rounding is where the reference has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.qk_norm_rope.call import OPERATION, Inputs, rope_inputs
from tilewright.ops.qk_norm_rope.launch import launch_parameters
from tilewright.ops.rms_norm.kernels import COMPUTE, add_squares, inverse_rms, load_weight, normalised
from tilewright.ops.rope.kernels import (
    heads_of_tile,
    load_pairs,
    rotated,
    rotation,
    store_pairs,
    tables_agree,
    tile_of_grid,
    walk,
)
from tilewright.ops.rows import alignment, contiguous_twin
from tilewright.platforms import facts

if TYPE_CHECKING:
    from tilewright.ops.qk_norm_rope.call import Outputs, QkNormRopeCall, Runner, Tensors

# A Triton that lacks this fails here, at import, where dispatch takes note, and not at a launch.
_NEEDED = (tl.multiple_of,)


@triton.jit
def _starts(of_token, of_head, ALIGN: tl.constexpr):
    """Where each head of each token begins, int64 [BLOCK_T, BLOCK_H, 1], all of them multiples of ALIGN.

    Triton sees by itself only that a stride is a multiple of 16, and lays tiles out by what it knows of every pointer.
    """
    start = of_token[:, None, None] + of_head[None, :, None]
    if ALIGN > 1:
        start = tl.multiple_of(start, (ALIGN, ALIGN, ALIGN))
    return start


@triton.jit
def _load_heads(x_ptr, x_row, row_mask, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """The heads of the tile in chunks as RMSNorm's kernel cuts them, each [BLOCK_T, BLOCK_H, CHUNK]."""
    chunks = ()
    for c in tl.static_range((HEAD_DIM + CHUNK - 1) // CHUNK):
        dim = c * CHUNK + tl.arange(0, CHUNK)
        mask = row_mask & (dim < HEAD_DIM)[None, None, :]
        chunks = chunks + (tl.load(x_ptr + x_row + dim[None, None, :], mask, 0.0),)  # noqa: RUF005 - as in read_rows
    return chunks


@triton.jit
def _inverse_rms(
    chunks,
    HEAD_DIM: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """1 / rms of each head, [BLOCK_T, BLOCK_H], its squares summed in the order of RMSNorm's kernel."""
    squares = tl.zeros((BLOCK_T, BLOCK_H, CHUNK), COMPUTE)
    for c in tl.static_range((HEAD_DIM + CHUNK - 1) // CHUNK):
        squares = add_squares(squares, chunks[c], COMPUTE)
    return inverse_rms(squares, HEAD_DIM, EPS, COMPUTE)


@triton.jit
def _load_weight_pairs(
    weight_ptr,
    HEAD_DIM: tl.constexpr, N_PAIRS: tl.constexpr, ROTARY_OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The weight of all pairs' first and second members, each [BLOCK_P]."""
    BLOCK_P: tl.constexpr = triton.next_power_of_2(N_PAIRS)
    if INTERLEAVED:
        weight = load_weight(weight_ptr, ROTARY_OFFSET + tl.arange(0, 2 * BLOCK_P), HEAD_DIM)
        weight_1, weight_2 = tl.split(tl.reshape(weight, (BLOCK_P, 2)))
    else:
        dim = ROTARY_OFFSET + tl.arange(0, BLOCK_P)
        weight_1 = load_weight(weight_ptr, dim, HEAD_DIM)
        weight_2 = load_weight(weight_ptr, dim + N_PAIRS, HEAD_DIM)
    return weight_1, weight_2


@triton.jit
def _normalise_rest(
    x_ptr, y_ptr, x_row, y_row, row_mask, rstd, weight_ptr,
    HEAD_DIM: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr, COMPUTE: tl.constexpr,
    START: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Normalise features START .. START + SIZE, which are not rotated."""
    dim = START + tl.arange(0, triton.next_power_of_2(SIZE))
    mask = row_mask & (dim < START + SIZE)[None, None, :]
    weight = weight_ptr
    if weight_ptr is not None:
        weight = load_weight(weight_ptr, dim, HEAD_DIM)
    x = tl.load(x_ptr + x_row + dim[None, None, :], mask, 0.0)
    y = normalised(x, rstd, weight, WEIGHT_OFFSET, ROUND_NORM, x.dtype, COMPUTE)
    tl.store(y_ptr + y_row + dim[None, None, :], y.to(x.dtype), mask)


@triton.jit(
    do_not_specialize=[
        "offset", "seqlen", "n_q_heads", "n_k_heads", "n_positions", "n_sequences", "search_steps", "cp_rank",
    ]
)  # fmt: skip
def qk_norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, position_ptr, offset_ptr, cu_seqlens_ptr,
    q_out_ptr, k_out_ptr,
    offset,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_q_out_batch, stride_q_out_token, stride_q_out_head,
    stride_k_out_batch, stride_k_out_token, stride_k_out_head,
    stride_table_position, stride_table_dim,
    stride_position_row, stride_position_batch, stride_position_token, stride_offset, stride_cu,
    seqlen, n_q_heads, n_k_heads, n_positions, n_sequences, search_steps, cp_rank,
    HEAD_DIM: tl.constexpr, N_PAIRS: tl.constexpr, ROTARY_OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    FULL_TABLE: tl.constexpr, CP_SIZE: tl.constexpr, MROPE: tl.constexpr, MROPE_INTERLEAVED: tl.constexpr,
    EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr, ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate one tile."""
    tile, n_q_tiles, batch, first_token = tile_of_grid(k_ptr, seqlen, n_q_heads, n_k_heads, BLOCK_T, BLOCK_H)
    token = first_token + tl.arange(0, BLOCK_T)
    token_mask = token < seqlen
    x_ptr, y_ptr, first_head, n_heads, x_strides, y_strides = heads_of_tile(
        tile, n_q_tiles, q_ptr, k_ptr, q_out_ptr, k_out_ptr,
        stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
        stride_q_out_batch, stride_q_out_token, stride_q_out_head,
        stride_k_out_batch, stride_k_out_token, stride_k_out_head,
        n_q_heads, n_k_heads, BLOCK_H,
    )  # fmt: skip
    weight_ptr = q_weight_ptr
    if k_weight_ptr is not None:  # noqa: SIM102 - the first is settled when compiling, the second when running
        if tile >= n_q_tiles:
            weight_ptr = k_weight_ptr

    head = first_head + tl.arange(0, BLOCK_H)
    row_mask = token_mask[:, None, None] & (head < n_heads)[None, :, None]
    x_row = _starts(batch * x_strides[0] + token * x_strides[1], head * x_strides[2], ALIGN)
    y_row = _starts(batch * y_strides[0] + token * y_strides[1], head * y_strides[2], ALIGN)
    # Whole heads come first: where layouts differ, Triton chooses that of the tiles that were loaded last, the pairs',
    # and so moves one number of each head between threads and not the head.
    chunks = _load_heads(x_ptr, x_row, row_mask, HEAD_DIM, CHUNK)
    x_1, x_2 = load_pairs(x_ptr, x_row, row_mask, 1, N_PAIRS, ROTARY_OFFSET, INTERLEAVED, BLOCK_T, BLOCK_H)
    m11, m12, m21, m22, valid = rotation(
        cos_ptr, sin_ptr, position_ptr, offset_ptr, cu_seqlens_ptr, batch, token, token_mask, offset,
        stride_table_position, stride_table_dim,
        stride_position_row, stride_position_batch, stride_position_token, stride_offset, stride_cu,
        seqlen, n_positions, n_sequences, search_steps, cp_rank,
        x_1.dtype, COMPUTE, N_PAIRS, FULL_TABLE, INTERLEAVED, False, False, False, CP_SIZE, MROPE, MROPE_INTERLEAVED,
    )  # fmt: skip

    rstd = _inverse_rms(chunks, HEAD_DIM, EPS, COMPUTE, BLOCK_T, BLOCK_H, CHUNK)
    weight_1 = weight_ptr
    weight_2 = weight_ptr
    if weight_ptr is not None:
        weight_1, weight_2 = _load_weight_pairs(weight_ptr, HEAD_DIM, N_PAIRS, ROTARY_OFFSET, INTERLEAVED)
    x_1 = normalised(x_1, rstd, weight_1, WEIGHT_OFFSET, ROUND_NORM, x_1.dtype, COMPUTE).to(x_1.dtype)
    x_2 = normalised(x_2, rstd, weight_2, WEIGHT_OFFSET, ROUND_NORM, x_2.dtype, COMPUTE).to(x_2.dtype)
    y_1, y_2 = rotated(x_1, x_2, m11, m12, m21, m22, valid, x_1.dtype, COMPUTE)
    store_pairs(y_ptr, y_row, row_mask, 1, y_1, y_2, N_PAIRS, ROTARY_OFFSET, INTERLEAVED, BLOCK_T, BLOCK_H)

    AFTER: tl.constexpr = ROTARY_OFFSET + 2 * N_PAIRS
    if ROTARY_OFFSET > 0:
        _normalise_rest(
            x_ptr, y_ptr, x_row, y_row, row_mask, rstd, weight_ptr,
            HEAD_DIM, WEIGHT_OFFSET, ROUND_NORM, COMPUTE, 0, ROTARY_OFFSET,
        )  # fmt: skip
    if AFTER < HEAD_DIM:
        _normalise_rest(
            x_ptr, y_ptr, x_row, y_row, row_mask, rstd, weight_ptr,
            HEAD_DIM, WEIGHT_OFFSET, ROUND_NORM, COMPUTE, AFTER, HEAD_DIM - AFTER,
        )  # fmt: skip


def plan(call: QkNormRopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
    """Prepare the launch for tensors of this metadata; ``inputs`` and ``outputs`` themselves are not kept."""
    q, k, q_weight, k_weight = inputs[:4]
    rope, turned = call.rotation, rope_inputs(inputs)
    device = facts(q.device)
    block, row = launch_parameters(call, q, device)
    n_tiles = -(-rope.n_q_heads // block.heads) + -(-rope.n_k_heads // block.heads)
    programs = check_programs(rope.batch * -(-rope.seqlen // block.tokens) * n_tiles, OPERATION, "q")
    if programs == 0:
        return lambda tensors, offset: None
    if call.q_norm.weight_dtype != call.k_norm.weight_dtype:
        return _with_equal_weights(call, inputs, outputs)
    walked = [x for x in (q, k, *outputs, q_weight, k_weight) if x is not None]
    if not tables_agree(turned) or any(x.stride(-1) != 1 for x in walked):
        return contiguous_twin(plan, call, inputs, outputs)
    options = call.q_norm.options
    tail = (
        *walk(rope, turned, outputs),
        rope.head_dim,
        rope.n_pairs,
        rope.options.rotary_offset,
        rope.options.interleaved,
        rope.full_table,
        rope.options.parallel_size,
        rope.options.mrope_section,
        rope.options.mrope_interleaved,
        float(options.eps),
        float(options.weight_offset),
        options.cast == "before_weight",
        _alignment(q, k, *outputs),
        COMPUTE[rope.compute_dtype],
        block.tokens,
        block.heads,
        row.chunk,
    )
    launch = {"num_warps": block.num_warps, "enable_fp_fusion": False}
    return BoundKernel(qk_norm_rope_kernel, programs, q.device, tail, launch)


def _alignment(*streams: torch.Tensor) -> int:
    """What the beginnings of all heads of all tokens are multiples of, in elements."""
    return alignment([s for x in streams for s, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1])


def _with_equal_weights(call: QkNormRopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
    """The kernel takes two weights of one dtype, or none: make them so. A wider dtype or a one changes no bit."""
    head_dim = call.rotation.head_dim
    dtypes = [each.weight_dtype for each in (call.q_norm, call.k_norm) if each.weight_dtype is not None]
    dtype = torch.promote_types(dtypes[0], dtypes[-1])

    def equal(tensors: Tensors) -> Tensors:
        q, k, *weights = tensors[:4]
        assert q is not None
        made = (torch.ones(head_dim, dtype=dtype, device=q.device) if w is None else w.to(dtype) for w in weights)
        return (q, k, *made, *tensors[4:])

    q_norm, k_norm = (replace(each, weight_dtype=dtype) for each in (call.q_norm, call.k_norm))
    run = plan(replace(call, q_norm=q_norm, k_norm=k_norm), Inputs._make(equal(inputs)), outputs)
    return lambda tensors, offset: run(equal(tensors), offset)
