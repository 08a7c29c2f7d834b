"""Launch parameters of the Triton kernel: rotary embedding's tile, its rows cut as RMSNorm cuts them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from tilewright.ops.rms_norm.launch import THREADS_PER_WARP, RowBlock, row_block
from tilewright.ops.rope import launch as rope

if TYPE_CHECKING:
    import torch

    from tilewright.ops.qk_norm_rope.call import QkNormRopeCall
    from tilewright.platforms import DeviceFacts


class Blocks(NamedTuple):
    """Launch parameters: the tile of tokens and heads, and how each of its rows is summed."""

    tile: rope.Block
    row: RowBlock


def launch_parameters(call: QkNormRopeCall, q: torch.Tensor, device: DeviceFacts) -> Blocks:
    """The parameters for tensors like ``q``.

    Where threads share a row, a tile that gives each of them a wide load is laid over them as in RMSNorm's own kernel,
    and so a row is summed in the same order. Few tokens leave part of it empty.
    """
    tile = rope.launch_parameters(call.rotation, q)
    row = row_block(call.rotation.head_dim, q.element_size(), device)
    if device.kind != "cpu":
        rows = tile.num_warps * THREADS_PER_WARP * row.vector // row.chunk
        tile = replace(tile, tokens=max(tile.tokens, rows // tile.heads))
    return Blocks(tile, row)
