"""Launch parameters of the Triton kernel: how many tokens and heads a program rotates, with how many warps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright.dispatch.launch import power_of_2
from tilewright.ops.rope.call import LAYOUTS

if TYPE_CHECKING:
    import torch

    from tilewright.ops.rope.call import RopeCall

BYTES_PER_PROGRAM = 4096
"""Two 16-byte loads for each of 128 threads: the smallest program that keeps memory busy, and the evenest to spread."""

MOST_COVERED = 1.125
"""How many heads the tiles may cover for each head that there is: idle lanes cost as much as busy ones."""


@dataclass(frozen=True)
class Block:
    """Launch parameters.

    Attributes:
        tokens: tokens per program, a power of two.
        heads: heads per program, a power of two.
        num_warps: warps per program.
    """

    tokens: int
    heads: int
    num_warps: int


def launch_parameters(call: RopeCall, x: torch.Tensor) -> Block:
    """Cover BYTES_PER_PROGRAM of contiguous memory: heads first where heads lie closest, else tokens first."""
    axes = LAYOUTS[call.options.layout]
    rows = max(1, BYTES_PER_PROGRAM // (power_of_2(call.head_dim) * x.element_size()))
    most_tokens = power_of_2(max(call.seqlen, 1))
    if x.stride(axes.head) <= x.stride(axes.token) or call.seqlen == 1:
        heads = _heads(call, rows)
        tokens = min(rows // heads, most_tokens)
    else:
        tokens = min(rows, most_tokens)
        heads = _heads(call, rows // tokens)
    return Block(tokens, heads, num_warps=4)


def _heads(call: RopeCall, most: int) -> int:
    """The most heads, a power of two up to ``most``, whose tiles of q and of k together are hardly ever empty."""
    heads = min(most, power_of_2(max(call.n_q_heads, call.n_k_heads, 1)))
    wanted = call.n_q_heads + call.n_k_heads
    while heads > 1:
        covered = sum(-(-n // heads) * heads for n in (call.n_q_heads, call.n_k_heads))
        if covered <= MOST_COVERED * wanted:
            break
        heads //= 2
    return heads
