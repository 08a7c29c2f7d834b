"""Launch parameters of the Triton kernels that compute mixes and collapse streams.

What decides a token's bits, besides its own numbers, is into how many ranges the columns are split: each range is
summed by itself. A call that is to give a token the same bits in every batch fixes their number; else few tokens get
many ranges, so that the machine is full. Nothing else here changes a bit, and no compiled kernel depends on how many
tokens there are: one serves few of them, one many.

The numbers for GPUs are the best of those measured on an H200
(``benchmarks/results/mhc-experiments-nvidia-h200.json``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.dispatch.launch import power_of_2
from tilewright.ops.rms_norm.launch import THREADS_PER_WARP, row_block

if TYPE_CHECKING:
    from tilewright.ops.rms_norm.launch import RowBlock
    from tilewright.platforms import DeviceFacts

BLOCK_H = 64
"""Columns of a chunk, of whose products a tensor core keeps the sum: a part of the arithmetic, the same everywhere."""

EIGHTHS = 3
"""Halvings that bring an eighth of a chunk to one column."""

GROUPS = 4
"""Groups in which partial sums are added, each by other threads: a part of the arithmetic, too."""

MIX_TOKENS = 32
"""Tokens of which a program can work out gates and matrices, one a thread."""

PACK_BLOCK = 2048
"""Weights per program that splits them."""

_FEW_TOKENS = 256
_INVARIANT_SPLITS = 16
_WIDE_MIXES = 32
_MOST_LOADS = {True: 64, False: 2}
"""Ranges of a group whose partial sums are loaded at once, for few tokens, which have many ranges, and for many."""

_PARTIALS = 64 * THREADS_PER_WARP
"""Partial sums that a warp loads at once, at most."""

_RESIDENT_LOADS = 32
_RESIDENT_REGISTERS = 168
"""Of a program of four warps whose streams are resident: the compiler would take more, and two of them would fit
instead of three."""


@dataclass(frozen=True)
class MixBlock:
    """Launch parameters of the product with the mixing weights.

    Attributes:
        tokens: tokens per program, a power of two.
        mixes: columns of the product, a power of two with room for the sum of squares.
        packed: whether the weights are split into their parts once, before: many programs use them then.
        stages: how many chunks are on their way at once.
        num_warps: warps per program.
        n_splits: ranges into which the columns are split.
    """

    tokens: int
    mixes: int
    packed: bool
    stages: int
    num_warps: int
    n_splits: int

    def programs(self, n_tokens: int) -> int:
        """How many programs so many tokens take."""
        return -(-n_tokens // self.tokens) * self.n_splits

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def padded(n_cols: int) -> int:
    """Columns of a stream in whole chunks."""
    return -(-n_cols // BLOCK_H) * BLOCK_H


def padded_mixes(n_mixes: int) -> int:
    """Columns of the product, with one for the sum of squares; matrix units take at least 16."""
    return max(16, power_of_2(n_mixes + 1))


def is_few(n_tokens: int, device: DeviceFacts) -> bool:
    """Whether so many tokens take the kernels for few of them, on a CPU all."""
    return n_tokens <= _FEW_TOKENS or device.kind == "cpu"


def mix_block(
    n_tokens: int,
    n_cols: int,
    n_sources: int,
    n_mixes: int,
    itemsize: int,
    device: DeviceFacts,
    *,
    few: bool,
    invariant: bool,
) -> MixBlock:
    """The parameters of the product.

    Args:
        n_tokens: how many tokens there are.
        n_cols: columns of a stream.
        n_sources: how many streams are read.
        n_mixes: rows of the weights.
        itemsize: bytes of a stream's element.
        device: where it runs.
        few: whether to take the kernel for few tokens.
        invariant: whether a token's bits may not depend on the other tokens.
    """
    mixes = padded_mixes(n_mixes)
    quick = mixes <= _WIDE_MIXES and itemsize == 2
    tokens = 128 if quick and not few else 64
    n_chunks = padded(n_cols) // BLOCK_H
    if invariant:
        n_splits = _splits(n_sources * n_chunks, _INVARIANT_SPLITS)
    else:
        places = device.n_units * (1 if device.kind == "cpu" else 2)
        n_splits = _splits(n_sources * n_chunks, places // -(-n_tokens // tokens))
    return MixBlock(
        tokens=tokens,
        mixes=mixes,
        packed=not few and itemsize == 2,
        stages=4 if quick else 2,
        num_warps=4,
        n_splits=n_splits,
    )


def _splits(n_chunks: int, most: int) -> int:
    """Into how many ranges to split so many chunks: no more than make the longest one shorter."""
    longest = -(-n_chunks // max(1, min(most, GROUPS * _MOST_LOADS[True])))
    return -(-n_chunks // longest)


@dataclass(frozen=True)
class FinishBlock:
    """Launch parameters of what follows.

    Attributes:
        rows: how the collapse cuts a token's columns: as ``rms_norm`` does.
        resident: whether a token's streams stay in registers until the gates are known.
        mix_tokens_each: tokens whose gates and matrices a program works out, at most ``MIX_TOKENS``.
        mix_block: tokens whose partial sums it adds at a time, a power of two.
        splits: ranges of each group of which partial sums are loaded at once.
        registers: the most registers a thread of a resident program may have.
    """

    rows: RowBlock
    resident: bool
    mix_tokens_each: int
    mix_block: int
    splits: int
    registers: int | None

    def options(self, device: DeviceFacts) -> dict[str, Any]:
        """Launch options."""
        options: dict[str, Any] = {"num_warps": self.rows.num_warps, "enable_fp_fusion": False}
        if self.resident and self.registers and self.rows.num_warps <= 4 and device.limits_registers:
            options["maxnreg"] = self.registers
        return options


def finish_block(
    n_tokens: int, n_cols: int, n_sources: int, mixes: int, itemsize: int, device: DeviceFacts, *, few: bool
) -> FinishBlock:
    """The parameters of gates, matrices and collapse.

    Args:
        n_tokens: how many tokens there are.
        n_cols: columns of a stream.
        n_sources: how many streams are read.
        mixes: columns of a partial sum.
        itemsize: bytes of a stream's element.
        device: where it runs.
        few: whether to take the kernel for few tokens.
    """
    rows = row_block(n_cols, itemsize, device)
    loads = n_sources * -(-n_cols // rows.chunk)
    threads = rows.num_warps * THREADS_PER_WARP
    block = 4 if device.kind == "cpu" or not few else min(MIX_TOKENS, max(1, threads // (mixes * GROUPS)))
    most = _PARTIALS * rows.num_warps // (mixes * GROUPS * max(block, rows.rows))
    return FinishBlock(
        rows=rows,
        resident=rows.resident and loads <= _RESIDENT_LOADS,
        mix_tokens_each=min(MIX_TOKENS, max(block, -(-n_tokens // device.n_units))) if few else MIX_TOKENS,
        mix_block=block,
        splits=1 if device.kind == "cpu" else min(_MOST_LOADS[few], max(1, most)),  # there a load waits for none
        registers=None if few else _RESIDENT_REGISTERS,
    )
