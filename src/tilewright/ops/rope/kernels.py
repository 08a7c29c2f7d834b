"""The Triton kernel of rotary embedding: one body for every layout, pairing, position mode and direction.

A program rotates a tile of tokens x heads. The heads of ``q`` and ``k`` are tiles of one grid, so both take one launch.
Loads of ``x`` are issued first and everything else is computed while they are under way. A pair is loaded whole before
either member is stored, so writing in place is safe. The table is kept in L2 (``evict_last``) while ``x`` streams by:
without that, each sequence of a batch fetches it from memory again.

Multiply-add contraction is off, so that a product is rounded before it is added, as in the reference. The kernel of
``qk_norm_rope`` is made of the same functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.rope.call import LAYOUTS, Inputs
from tilewright.ops.rope.launch import launch_parameters

if TYPE_CHECKING:
    from tilewright.ops.rope.call import Outputs, RopeCall, Runner

# A Triton that lacks one of these fails here, at import, where dispatch takes note, and not at a launch.
_NEEDED = (tl.join, tl.split, tl.reshape, tl.where, tl.zeros_like, tl.cos, tl.sin, triton.next_power_of_2)
_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _sequence_of(token, cu_seqlens_ptr, stride_cu, n_sequences, search_steps, CP_SIZE: tl.constexpr):
    """Binary search for the last sequence that starts at or before each packed token, int64 [BLOCK_T]."""
    low = tl.zeros_like(token)
    high = low + n_sequences
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        starts_before = tl.load(cu_seqlens_ptr + middle * stride_cu).to(tl.int64) // CP_SIZE <= token
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle - 1)
    return low


@triton.jit
def _computed_position(
    batch, token, token_mask, offset_ptr, cu_seqlens_ptr, offset, stride_offset, stride_cu, seqlen, n_sequences,
    search_steps, cp_rank, CP_SIZE: tl.constexpr,
):  # fmt: skip
    """Position of each token from its place in its sequence, int64 [BLOCK_T]; -1 for tokens outside all sequences."""
    if cu_seqlens_ptr is None:
        sequence = batch + tl.zeros_like(token)
        index = token
        length = seqlen
        inside = token_mask
    else:
        sequence = _sequence_of(token, cu_seqlens_ptr, stride_cu, n_sequences, search_steps, CP_SIZE)
        inside = token_mask & (sequence < n_sequences)
        start = tl.load(cu_seqlens_ptr + sequence * stride_cu, inside, 0).to(tl.int64) // CP_SIZE
        end = tl.load(cu_seqlens_ptr + (sequence + 1) * stride_cu, inside, 0).to(tl.int64) // CP_SIZE
        index = token - start
        length = end - start
        inside = inside & (index >= 0)
    position = index + offset
    if offset_ptr is not None:
        position += tl.load(offset_ptr + sequence * stride_offset, inside, 0).to(tl.int64)
    if CP_SIZE > 1:  # a rank holds chunk `cp_rank` and its mirror image of 2 * CP_SIZE chunks
        half = length // 2
        position += tl.where(index < half, cp_rank * half, length * CP_SIZE - (cp_rank + 2) * half)
    return tl.where(inside, position, -1)


@triton.jit
def _mrope_axis(pair, MROPE_T: tl.constexpr, MROPE_H: tl.constexpr, MROPE_W: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which of the three rows of positions each pair follows, int32 [BLOCK_P]."""
    if INTERLEAVED:
        axis = tl.where((pair % 3 == 1) & (pair < 3 * MROPE_H), 1, 0)
        axis = tl.where((pair % 3 == 2) & (pair < 3 * MROPE_W), 2, axis)
    else:
        axis = (pair >= MROPE_T).to(tl.int32) + (pair >= MROPE_T + MROPE_H).to(tl.int32)
    return axis


@triton.jit
def _cos_sin(
    cos_ptr, sin_ptr, entry, valid, X_DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ROUND_TABLE: tl.constexpr
):  # fmt: skip
    """Cosine and sine of one table column per pair, each [BLOCK_T, BLOCK_P]; no rotation where invalid."""
    if sin_ptr is None:  # the table holds angles
        angle = tl.load(cos_ptr + entry, valid, 0.0, eviction_policy="evict_last").to(COMPUTE)
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    else:
        cos = tl.load(cos_ptr + entry, valid, 1.0, eviction_policy="evict_last")
        sin = tl.load(sin_ptr + entry, valid, 0.0, eviction_policy="evict_last")
    if ROUND_TABLE:
        cos = cos.to(X_DTYPE)
        sin = sin.to(X_DTYPE)
    return cos.to(COMPUTE), sin.to(COMPUTE)


@triton.jit
def _matrix(
    cos_ptr, sin_ptr, position, pair, valid, stride_table_position, stride_table_dim,
    X_DTYPE: tl.constexpr, COMPUTE: tl.constexpr, N_PAIRS: tl.constexpr, FULL_TABLE: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROUND_TABLE: tl.constexpr, INVERSE: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """The 2 x 2 matrix of each pair, as its four entries, each [BLOCK_T, BLOCK_P] in the arithmetic's dtype."""
    if FULL_TABLE and INTERLEAVED:
        column_1 = 2 * pair
        column_2 = 2 * pair + 1
    else:
        column_1 = pair
        column_2 = pair + N_PAIRS
    column_1 = column_1.to(tl.int64)
    column_2 = column_2.to(tl.int64)
    row = position * stride_table_position
    cos_1, sin_1 = _cos_sin(cos_ptr, sin_ptr, row + column_1 * stride_table_dim, valid, X_DTYPE, COMPUTE, ROUND_TABLE)
    cos_2 = cos_1
    sin_2 = sin_1
    if FULL_TABLE:
        entry_2 = row + column_2 * stride_table_dim
        cos_2, sin_2 = _cos_sin(cos_ptr, sin_ptr, entry_2, valid, X_DTYPE, COMPUTE, ROUND_TABLE)
    m11 = cos_1
    m12 = -sin_1
    m21 = sin_2
    m22 = cos_2
    if INVERSE:
        determinant = cos_1 * cos_2 + sin_1 * sin_2
        m11 = cos_2 / determinant
        m12 = sin_1 / determinant
        m21 = -sin_2 / determinant
        m22 = cos_1 / determinant
    if TRANSPOSE:
        m12, m21 = m21, m12
    return m11, m12, m21, m22


@triton.jit
def rotation(
    cos_ptr, sin_ptr, position_ptr, offset_ptr, cu_seqlens_ptr, batch, token, token_mask, offset,
    stride_table_position, stride_table_dim,
    stride_position_row, stride_position_batch, stride_position_token, stride_offset, stride_cu,
    seqlen, n_positions, n_sequences, search_steps, cp_rank,
    X_DTYPE: tl.constexpr, COMPUTE: tl.constexpr, N_PAIRS: tl.constexpr, FULL_TABLE: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROUND_TABLE: tl.constexpr, INVERSE: tl.constexpr, TRANSPOSE: tl.constexpr,
    CP_SIZE: tl.constexpr, MROPE: tl.constexpr, MROPE_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What rotates each token's pairs: the matrix's four entries and whether it counts, each [BLOCK_T, BLOCK_P]."""
    pair = tl.arange(0, triton.next_power_of_2(N_PAIRS))
    if position_ptr is None:
        position = _computed_position(
            batch, token, token_mask, offset_ptr, cu_seqlens_ptr, offset, stride_offset, stride_cu, seqlen,
            n_sequences, search_steps, cp_rank, CP_SIZE,
        )[:, None]  # fmt: skip
    else:
        position_row = (batch * stride_position_batch + token * stride_position_token)[:, None]
        if MROPE is not None:
            axis = _mrope_axis(pair, MROPE[0], MROPE[1], MROPE[2], MROPE_INTERLEAVED)
            position_row += (axis.to(tl.int64) * stride_position_row)[None, :]
        position = tl.load(position_ptr + position_row, token_mask[:, None], -1).to(tl.int64)
    # A position outside the table leaves its token, under MRoPE its pair, unrotated; no access is out of bounds.
    valid = (position >= 0) & (position < n_positions) & (pair < N_PAIRS)[None, :]
    m11, m12, m21, m22 = _matrix(
        cos_ptr, sin_ptr, position, pair[None, :], valid, stride_table_position, stride_table_dim,
        X_DTYPE, COMPUTE, N_PAIRS, FULL_TABLE, INTERLEAVED, ROUND_TABLE, INVERSE, TRANSPOSE,
    )  # fmt: skip
    return m11, m12, m21, m22, valid


@triton.jit
def rotated(x_1, x_2, m11, m12, m21, m22, valid, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Pairs [BLOCK_T, BLOCK_H, BLOCK_P] times what :func:`rotation` gives, rounded."""
    y_1 = x_1.to(COMPUTE) * m11[:, None, :] + x_2.to(COMPUTE) * m12[:, None, :]
    y_2 = x_1.to(COMPUTE) * m21[:, None, :] + x_2.to(COMPUTE) * m22[:, None, :]
    y_1 = tl.where(valid[:, None, :], y_1.to(DTYPE), x_1)  # even infinities pass through untouched
    y_2 = tl.where(valid[:, None, :], y_2.to(DTYPE), x_2)
    return y_1, y_2


@triton.jit
def tile_of_grid(k_ptr, seqlen, n_q_heads, n_k_heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """This program's tile: which of its tokens' tiles of heads, how many of these are q's, batch and first token.

    The grid is one axis over (batch, tile of tokens, tile of q's heads then k's), heads fastest.
    """
    n_q_tiles = tl.cdiv(n_q_heads, BLOCK_H)
    n_tiles = n_q_tiles
    if k_ptr is not None:
        n_tiles += tl.cdiv(n_k_heads, BLOCK_H)
    n_token_tiles = tl.cdiv(seqlen, BLOCK_T)
    tile = tl.program_id(0) % n_tiles
    row = tl.program_id(0) // n_tiles
    batch = (row // n_token_tiles).to(tl.int64)
    return tile, n_q_tiles, batch, (row % n_token_tiles).to(tl.int64) * BLOCK_T


@triton.jit
def heads_of_tile(
    tile, n_q_tiles, q_ptr, k_ptr, q_out_ptr, k_out_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_q_out_batch, stride_q_out_token, stride_q_out_head,
    stride_k_out_batch, stride_k_out_token, stride_k_out_head,
    n_q_heads, n_k_heads, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Whose heads a tile has: pointers of input and output, the first head, their number, and the strides of both."""
    x_ptr = q_ptr
    y_ptr = q_out_ptr
    stride_x_batch = stride_q_batch
    stride_x_token = stride_q_token
    stride_x_head = stride_q_head
    stride_y_batch = stride_q_out_batch
    stride_y_token = stride_q_out_token
    stride_y_head = stride_q_out_head
    n_heads = n_q_heads
    first_head = tile * BLOCK_H
    if k_ptr is not None:  # noqa: SIM102 - the first is settled when compiling, the second when running
        if tile >= n_q_tiles:
            x_ptr = k_ptr
            y_ptr = k_out_ptr
            stride_x_batch = stride_k_batch
            stride_x_token = stride_k_token
            stride_x_head = stride_k_head
            stride_y_batch = stride_k_out_batch
            stride_y_token = stride_k_out_token
            stride_y_head = stride_k_out_head
            n_heads = n_k_heads
            first_head = (tile - n_q_tiles) * BLOCK_H
    x_strides = (stride_x_batch, stride_x_token, stride_x_head)
    y_strides = (stride_y_batch, stride_y_token, stride_y_head)
    return x_ptr, y_ptr, first_head.to(tl.int64), n_heads, x_strides, y_strides


@triton.jit
def load_pairs(
    x_ptr, x_row, row_mask, stride_x_dim,
    N_PAIRS: tl.constexpr, ROTARY_OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The first and the second members of all pairs, each [BLOCK_T, BLOCK_H, BLOCK_P]."""
    BLOCK_P: tl.constexpr = triton.next_power_of_2(N_PAIRS)
    if INTERLEAVED:  # one wide load, taken apart in registers
        column = tl.arange(0, 2 * BLOCK_P)
        mask = row_mask & (column < 2 * N_PAIRS)[None, None, :]
        dim = (ROTARY_OFFSET + column)[None, None, :]
        x = tl.load(x_ptr + x_row + dim * stride_x_dim, mask, 0.0)  # [BLOCK_T, BLOCK_H, 2 * BLOCK_P]
        x_1, x_2 = tl.split(tl.reshape(x, (BLOCK_T, BLOCK_H, BLOCK_P, 2)))
    else:
        pair = tl.arange(0, BLOCK_P)
        mask = row_mask & (pair < N_PAIRS)[None, None, :]
        dim = (ROTARY_OFFSET + pair)[None, None, :]
        x_1 = tl.load(x_ptr + x_row + dim * stride_x_dim, mask, 0.0)
        x_2 = tl.load(x_ptr + x_row + (dim + N_PAIRS) * stride_x_dim, mask, 0.0)
    return x_1, x_2


@triton.jit
def store_pairs(
    y_ptr, y_row, row_mask, stride_y_dim, y_1, y_2,
    N_PAIRS: tl.constexpr, ROTARY_OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Put back what :func:`load_pairs` took apart."""
    BLOCK_P: tl.constexpr = triton.next_power_of_2(N_PAIRS)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_P)
        mask = row_mask & (column < 2 * N_PAIRS)[None, None, :]
        dim = (ROTARY_OFFSET + column)[None, None, :]
        y = tl.reshape(tl.join(y_1, y_2), (BLOCK_T, BLOCK_H, 2 * BLOCK_P))
        tl.store(y_ptr + y_row + dim * stride_y_dim, y, mask)
    else:
        pair = tl.arange(0, BLOCK_P)
        mask = row_mask & (pair < N_PAIRS)[None, None, :]
        dim = (ROTARY_OFFSET + pair)[None, None, :]
        tl.store(y_ptr + y_row + dim * stride_y_dim, y_1, mask)
        tl.store(y_ptr + y_row + (dim + N_PAIRS) * stride_y_dim, y_2, mask)


@triton.jit
def _copy(
    x_ptr, y_ptr, x_row, y_row, row_mask, stride_x_dim, stride_y_dim,
    START: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Carry features START .. START + SIZE over unrotated."""
    dim = START + tl.arange(0, triton.next_power_of_2(SIZE))
    mask = row_mask & (dim < START + SIZE)[None, None, :]
    value = tl.load(x_ptr + x_row + dim[None, None, :] * stride_x_dim, mask)
    tl.store(y_ptr + y_row + dim[None, None, :] * stride_y_dim, value, mask)


@triton.jit(
    do_not_specialize=[
        "offset", "seqlen", "n_q_heads", "n_k_heads", "n_positions", "n_sequences", "search_steps", "cp_rank",
        "stride_q_dim", "stride_k_dim", "stride_q_out_dim", "stride_k_out_dim",
    ]
)  # fmt: skip
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, position_ptr, offset_ptr, cu_seqlens_ptr, q_out_ptr, k_out_ptr,
    offset,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_q_out_batch, stride_q_out_token, stride_q_out_head,
    stride_k_out_batch, stride_k_out_token, stride_k_out_head,
    stride_table_position, stride_table_dim,
    stride_position_row, stride_position_batch, stride_position_token, stride_offset, stride_cu,
    seqlen, n_q_heads, n_k_heads, n_positions, n_sequences, search_steps, cp_rank,
    stride_q_dim, stride_k_dim, stride_q_out_dim, stride_k_out_dim,
    UNIT_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, N_PAIRS: tl.constexpr, ROTARY_OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr, FULL_TABLE: tl.constexpr, ROUND_TABLE: tl.constexpr, INVERSE: tl.constexpr,
    TRANSPOSE: tl.constexpr, CP_SIZE: tl.constexpr, MROPE: tl.constexpr, MROPE_INTERLEAVED: tl.constexpr,
    COPY_REST: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate one tile."""
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
    head = first_head + tl.arange(0, BLOCK_H)
    row_mask = token_mask[:, None, None] & (head < n_heads)[None, :, None]
    x_ptr += batch * x_strides[0]
    y_ptr += batch * y_strides[0]
    x_row = (token * x_strides[1])[:, None, None] + (head * x_strides[2])[None, :, None]
    y_row = (token * y_strides[1])[:, None, None] + (head * y_strides[2])[None, :, None]
    if UNIT_DIM:
        stride_x_dim: tl.constexpr = 1
        stride_y_dim: tl.constexpr = 1
    else:
        stride_x_dim = stride_q_dim.to(tl.int64)
        stride_y_dim = stride_q_out_dim.to(tl.int64)
        if k_ptr is not None:
            stride_x_dim = tl.where(tile < n_q_tiles, stride_x_dim, stride_k_dim.to(tl.int64))
            stride_y_dim = tl.where(tile < n_q_tiles, stride_y_dim, stride_k_out_dim.to(tl.int64))

    x_1, x_2 = load_pairs(x_ptr, x_row, row_mask, stride_x_dim, N_PAIRS, ROTARY_OFFSET, INTERLEAVED, BLOCK_T, BLOCK_H)
    m11, m12, m21, m22, valid = rotation(
        cos_ptr, sin_ptr, position_ptr, offset_ptr, cu_seqlens_ptr, batch, token, token_mask, offset,
        stride_table_position, stride_table_dim,
        stride_position_row, stride_position_batch, stride_position_token, stride_offset, stride_cu,
        seqlen, n_positions, n_sequences, search_steps, cp_rank,
        q_ptr.dtype.element_ty, COMPUTE, N_PAIRS, FULL_TABLE, INTERLEAVED, ROUND_TABLE, INVERSE, TRANSPOSE,
        CP_SIZE, MROPE, MROPE_INTERLEAVED,
    )  # fmt: skip
    y_1, y_2 = rotated(x_1, x_2, m11, m12, m21, m22, valid, y_ptr.dtype.element_ty, COMPUTE)
    store_pairs(y_ptr, y_row, row_mask, stride_y_dim, y_1, y_2, N_PAIRS, ROTARY_OFFSET, INTERLEAVED, BLOCK_T, BLOCK_H)

    AFTER: tl.constexpr = ROTARY_OFFSET + 2 * N_PAIRS
    if COPY_REST and ROTARY_OFFSET > 0:
        _copy(x_ptr, y_ptr, x_row, y_row, row_mask, stride_x_dim, stride_y_dim, 0, ROTARY_OFFSET)
    if COPY_REST and AFTER < HEAD_DIM:
        _copy(x_ptr, y_ptr, x_row, y_row, row_mask, stride_x_dim, stride_y_dim, AFTER, HEAD_DIM - AFTER)


def plan(call: RopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
    """Prepare the launch for tensors of this metadata; ``inputs`` and ``outputs`` themselves are not kept."""
    q, k = inputs.q, inputs.k
    block = launch_parameters(call, q)
    n_tiles = -(-call.n_q_heads // block.heads) + -(-call.n_k_heads // block.heads)
    programs = call.batch * -(-call.seqlen // block.tokens) * n_tiles
    if programs == 0:
        return lambda tensors, offset: None
    check_programs(programs, "rope", "q")
    if not tables_agree(inputs):
        return _with_equal_tables(call, inputs, outputs)
    in_place = outputs[0] is q
    dim_strides = [1 if tensor is None else tensor.stride(-1) for tensor in (q, k, *outputs)]
    tail = (
        *walk(call, inputs, outputs),
        *dim_strides,
        all(stride == 1 for stride in dim_strides),
        call.head_dim,
        call.n_pairs,
        call.options.rotary_offset,
        call.options.interleaved,
        call.full_table,
        call.options.numerics == "hf",
        call.options.inverse,
        call.options.transpose,
        call.options.parallel_size,
        call.options.mrope_section,
        call.options.mrope_interleaved,
        not in_place,
        _COMPUTE[call.compute_dtype],
        block.tokens,
        block.heads,
    )
    options = {"num_warps": block.num_warps, "enable_fp_fusion": False}
    return BoundKernel(rope_kernel, programs, q.device, tail, options)


def walk(call: RopeCall, inputs: Inputs, outputs: Outputs) -> tuple[int, ...]:
    """How a kernel walks over these tensors: its arguments from the strides of ``q`` to ``cp_rank``."""
    axes = LAYOUTS[call.options.layout]
    rotated = (inputs.q, inputs.k, *outputs)
    strides = [s for tensor in rotated for s in ((0, 0, 0) if tensor is None else _strides(tensor, axes))]
    return (
        *strides,
        *inputs.cos.stride(),
        *_position_strides(call, inputs),
        0 if inputs.offsets is None else inputs.offsets.stride(0),
        0 if inputs.cu_seqlens is None else inputs.cu_seqlens.stride(0),
        call.seqlen,
        call.n_q_heads,
        call.n_k_heads,
        call.n_positions,
        call.n_sequences,
        call.n_sequences.bit_length(),
        0 if call.options.context_parallel is None else call.options.context_parallel[0],
    )


def tables_agree(inputs: Inputs) -> bool:
    """Whether one set of strides serves both tables; that of a dimension of one says nothing."""
    cos, sin = inputs.cos, inputs.cos if inputs.sin is None else inputs.sin
    return all(n <= 1 or s == t for n, s, t in zip(cos.shape, cos.stride(), sin.stride(), strict=True))


def _with_equal_tables(call: RopeCall, inputs: Inputs, outputs: Outputs) -> Runner:
    """The kernel has one set of strides for both tables: make them equal where they are not."""

    def equal(tensors: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        q, k, cos, sin, *rest = tensors
        assert cos is not None
        assert sin is not None
        return (q, k, cos.contiguous(), sin.contiguous(), *rest)

    run = plan(call, Inputs._make(equal(inputs)), outputs)
    return lambda tensors, offset: run(equal(tensors), offset)


def _strides(x: torch.Tensor, axes: tuple[int | None, int, int]) -> tuple[int, int, int]:
    batch, token, head = axes
    return (0 if batch is None else x.stride(batch), x.stride(token), x.stride(head))


def _position_strides(call: RopeCall, inputs: Inputs) -> tuple[int, int, int]:
    """Strides of position_ids over (row, batch, token); 0 where one position serves all."""
    position_ids = inputs.position_ids
    if position_ids is None:
        return (0, 0, 0)
    strides = list(position_ids.stride())
    row = strides.pop(0) if call.options.mrope_section is not None else 0
    batch = strides[0] if len(strides) == 2 and position_ids.shape[-2] > 1 else 0
    return (row, batch, strides[-1])
