"""The definition of rotary embedding, in plain PyTorch: any device, any dtype up to float64.

Everything else is checked against this file. It is written to be read next to the README's formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilewright.ops.rope.call import LAYOUTS

if TYPE_CHECKING:
    from tilewright.ops.rope.call import Inputs, RopeCall


def positions(call: RopeCall, inputs: Inputs, offset: int) -> torch.Tensor:
    """Position of each token, int64 [1 or B, S], or [3, 1 or B, S] with MRoPE; -1 outside every packed sequence."""
    if inputs.position_ids is not None:
        given = inputs.position_ids.long()
        rank = 3 if call.options.mrope_section is not None else 2
        return given if given.dim() == rank else given.unsqueeze(-2)
    rank_of_cp, size = call.options.context_parallel or (0, 1)
    token = torch.arange(call.seqlen, device=inputs.q.device)
    if inputs.cu_seqlens is None:
        index = token.unsqueeze(0)
        length = torch.full_like(index, call.seqlen)
        inside = torch.ones_like(index, dtype=torch.bool)
        start = 0 if inputs.offsets is None else inputs.offsets.long().unsqueeze(1)
    elif call.n_sequences == 0:
        return torch.full_like(token, -1).unsqueeze(0)
    else:
        starts = inputs.cu_seqlens.long() // size
        sequence = torch.searchsorted(starts, token, right=True) - 1
        inside = ((sequence >= 0) & (sequence < call.n_sequences)).unsqueeze(0)
        sequence = sequence.clamp(0, call.n_sequences - 1)
        index = (token - starts[sequence]).unsqueeze(0)
        length = (starts[1:] - starts[:-1])[sequence].unsqueeze(0)
        start = 0 if inputs.offsets is None else inputs.offsets.long()[sequence].unsqueeze(0)
    position = index + offset + start
    if size > 1:  # a rank holds chunk `rank` and its mirror image of 2 * size chunks
        half = length // 2
        first = rank_of_cp * half
        second = length * size - (rank_of_cp + 2) * half
        position = position + torch.where(index < half, first, second)
    return torch.where(inside, position, -1)


def mrope_axis(call: RopeCall, device: torch.device) -> torch.Tensor:
    """Which of the three rows of positions each pair follows, int64 [pairs]."""
    section = call.options.mrope_section
    assert section is not None
    pair = torch.arange(call.n_pairs, device=device)
    if not call.options.mrope_interleaved:
        return (pair >= section[0]).long() + (pair >= section[0] + section[1]).long()
    axis = torch.zeros_like(pair)
    axis[(pair % 3 == 1) & (pair < 3 * section[1])] = 1
    axis[(pair % 3 == 2) & (pair < 3 * section[2])] = 2
    return axis


def rotation(call: RopeCall, inputs: Inputs, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The 2 x 2 matrix of each pair, m11, m12, m21, m22, and whether the pair is rotated, each [1 or B, S, pairs]."""
    compute, options = call.compute_dtype, call.options
    if inputs.sin is None:
        angle = inputs.cos.to(compute)
        cos, sin = torch.cos(angle), torch.sin(angle)
    else:
        cos, sin = inputs.cos, inputs.sin
    if options.numerics == "hf":
        cos, sin = cos.to(call.dtype), sin.to(call.dtype)
    cos, sin = cos.to(compute), sin.to(compute)
    valid = (position >= 0) & (position < call.n_positions)
    row = position.clamp(0, call.n_positions - 1)
    if options.mrope_section is not None:  # each pair has a position of its own
        axis = mrope_axis(call, row.device)
        row, valid = row[axis].movedim(0, -1), valid[axis].movedim(0, -1)
    else:
        row, valid = row[..., None], valid[..., None]
    pair = torch.arange(call.n_pairs, device=row.device)

    def gather(table: torch.Tensor, identity: float) -> torch.Tensor:
        return torch.where(valid, table[row, pair], identity)

    if not call.full_table:
        cos_1 = cos_2 = gather(cos, 1.0)
        sin_1 = sin_2 = gather(sin, 0.0)
    else:
        cos_1, cos_2 = (gather(half, 1.0) for half in _halves(call, cos))
        sin_1, sin_2 = (gather(half, 0.0) for half in _halves(call, sin))
    m11, m12, m21, m22 = cos_1, -sin_1, sin_2, cos_2
    if options.inverse:
        determinant = cos_1 * cos_2 + sin_1 * sin_2
        m11, m12, m21, m22 = cos_2 / determinant, sin_1 / determinant, -sin_2 / determinant, cos_1 / determinant
    if options.transpose:
        m12, m21 = m21, m12
    return m11, m12, m21, m22, valid.expand_as(m11)


def rotate(call: RopeCall, inputs: Inputs, offset: int, outputs: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Rotate ``q`` and ``k`` into ``outputs``, which may be ``q`` and ``k`` themselves."""
    if call.n_positions == 0:
        matrix = None
    else:
        axes = LAYOUTS[call.options.layout]
        matrix = tuple(_broadcast(entry, axes) for entry in rotation(call, inputs, positions(call, inputs, offset)))
    for x, y in ((inputs.q, outputs[0]), (inputs.k, outputs[1])):
        if x is not None and y is not None:
            _rotate_one(call, x, y, matrix)


def _broadcast(entry: torch.Tensor, axes: tuple[int | None, int, int]) -> torch.Tensor:
    """[1 or B, S, pairs] to the layout's axes, with one head."""
    batch, token, head = axes
    if batch is None:
        return entry[0].unsqueeze(head)
    if token < batch:
        entry = entry.transpose(0, 1)
    return entry.unsqueeze(head)


def _rotate_one(call: RopeCall, x: torch.Tensor, y: torch.Tensor, matrix: tuple[torch.Tensor, ...] | None) -> None:
    start = call.options.rotary_offset
    end = start + call.rotary_dim
    if matrix is None:
        rotated = None
    else:
        m11, m12, m21, m22, valid = matrix
        x_1, x_2 = _halves(call, x[..., start:end])
        wide_1, wide_2 = x_1.to(call.compute_dtype), x_2.to(call.compute_dtype)
        y_1 = (wide_1 * m11 + wide_2 * m12).to(x.dtype)
        y_2 = (wide_1 * m21 + wide_2 * m22).to(x.dtype)
        rotated = (torch.where(valid, y_1, x_1), torch.where(valid, y_2, x_2))
    if y is not x:
        pieces = ((0, call.head_dim),) if rotated is None else ((0, start), (end, call.head_dim))
        for low, high in pieces:
            y[..., low:high] = x[..., low:high]
    if rotated is not None:
        for half, value in zip(_halves(call, y[..., start:end]), rotated, strict=True):
            half.copy_(value)


def _halves(call: RopeCall, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second members of all pairs, as views."""
    if call.options.interleaved:
        return x[..., 0::2], x[..., 1::2]
    return x[..., : call.n_pairs], x[..., call.n_pairs :]
