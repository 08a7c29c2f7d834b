"""Launch parameters of the Triton kernels: how rows are cut into tiles, and how many warps work on one.

A thread takes one 16-byte load of each chunk, so that Triton lays out every tile of a row alike, whatever else a kernel
does with it. How a row is cut depends on the row alone, never on how many rows there are: its result is the same in
every batch, and the fused kernels sum in the same order as the plain ones; only groups that nothing is summed for are
cut as their number suggests (:func:`cut_block`). How many rows share a sum for the weight's
gradient depends on their number and on the device as well.

The numbers for GPUs are the best of those measured on an H200 (``benchmarks/results/norm-experiments-nvidia-h200.json``
and the README beside this file), in between by the same pattern; those for a CPU keep a tile in its first cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tilewright.dispatch.launch import power_of_2

if TYPE_CHECKING:
    from tilewright.platforms import DeviceFacts

VECTOR_BYTES = 16
"""The widest load of a thread."""

THREADS_PER_WARP = 32
_SMALL_TILE_WARPS = 4
_FEW_PROGRAMS_PER_UNIT = 2
_CPU_CHUNK = 1024

_WARPS = {
    "plain": ((4096, 1), (16384, 4), (32768, 8), (131072, 16)),
    "residual": ((4096, 2), (8192, 8), (32768, 16), (65536, 32)),
    "gated": ((4096, 2), (32768, 8), (65536, 16)),
}
"""Up to so many bytes of a row, so many warps: for one tensor, for two that are added, for the two halves of one. Rows
beyond the last entry are read once for each pass."""

_REGISTERS = {1: 64, 4: 72, 8: 80}
"""For so many warps on one tensor: the compiler would take more, and leave room for fewer programs."""

_CUT_WARPS = {"plain": 4, "gated": 2}
_CUT_ROWS_PER_UNIT = 16
_CUT_WASTE = 1.25
"""A row of groups is cut among programs of so many warps where there are no more rows than this for each unit, or where
the chunks of one program would be so much wider than the row."""


@dataclass(frozen=True)
class RowBlock:
    """Launch parameters.

    Attributes:
        rows: rows per program, a power of two.
        chunk: columns per chunk, a power of two.
        vector: columns that a thread holds side by side, a power of two of at most ``chunk``.
        resident: whether a row's chunks stay in registers between the passes over it.
        num_warps: warps per program.
        registers: the most registers a thread may have, where leaving more to the compiler leaves too few programs.
    """

    rows: int
    chunk: int
    vector: int
    resident: bool
    num_warps: int
    registers: int | None = None

    def programs(self, n_rows: int) -> int:
        """How many programs so many rows take."""
        return -(-n_rows // self.rows)

    def chunks(self, n_cols: int) -> int:
        """How many chunks so many columns take."""
        return -(-n_cols // self.chunk)

    def preloads(self, programs: int, device: DeviceFacts, *, light: bool) -> bool:
        """Whether the weight is loaded together with the rows: that is sooner, but leaves room for fewer programs.

        Args:
            programs: how many there are.
            device: where they run.
            light: whether the kernel needs few registers besides.
        """
        return self.resident and (light or self.num_warps == 1 or programs <= _FEW_PROGRAMS_PER_UNIT * device.n_units)

    def options(self, device: DeviceFacts, *, preloads: bool = False) -> dict[str, Any]:
        """Launch options."""
        return _options(self.num_warps, None if preloads else self.registers, device)


def _options(num_warps: int, registers: int | None, device: DeviceFacts) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    if registers is not None and device.limits_registers:
        options["maxnreg"] = registers
    return options


def row_block(n_cols: int, itemsize: int, device: DeviceFacts, kind: str = "plain") -> RowBlock:
    """The parameters for rows of ``n_cols`` elements.

    Args:
        n_cols: columns of a row.
        itemsize: bytes of an element.
        device: where it runs.
        kind: what is read of a row: ``"plain"``, one tensor; ``"residual"``, two that are added; ``"gated"``, the two
            halves of one.
    """
    width = power_of_2(n_cols)
    vector = min(VECTOR_BYTES // itemsize, max(width, 2))
    if device.kind == "cpu":  # a row stays in the cache, and one body for all chunks compiles faster than many
        chunk = max(min(width, _CPU_CHUNK), vector)
        return RowBlock(max(1, _CPU_CHUNK // chunk), chunk, vector, resident=False, num_warps=1)
    table = _WARPS[kind]
    num_warps = next((warps for most, warps in table if n_cols * itemsize <= most), table[-1][1])
    chunk = num_warps * THREADS_PER_WARP * vector
    if width < chunk or width <= THREADS_PER_WARP * vector:
        rows = _SMALL_TILE_WARPS * THREADS_PER_WARP * vector // max(width, vector)
        return RowBlock(rows, max(width, vector), vector, resident=True, num_warps=_SMALL_TILE_WARPS)
    resident = n_cols * itemsize <= table[-1][0]
    registers = _REGISTERS.get(num_warps) if kind == "plain" else None
    return RowBlock(1, chunk, vector, resident, num_warps, registers)


def cut_block(n_rows: int, n_cols: int, block: RowBlock, kind: str, device: DeviceFacts) -> RowBlock | None:
    """The parameters for chunks of rows with a program each, where that is faster; None where it is not.

    That is for chunks that do not need each other.

    Args:
        n_rows: rows.
        n_cols: columns of a row.
        block: what :func:`row_block` says.
        kind: likewise.
        device: where it runs.
    """
    chunk = _CUT_WARPS[kind] * THREADS_PER_WARP * block.vector
    if device.kind == "cpu" or block.rows > 1 or n_cols <= chunk:
        return None
    wasteful = block.chunks(n_cols) * block.chunk >= _CUT_WASTE * n_cols
    if n_rows > _CUT_ROWS_PER_UNIT * device.n_units and not wasteful:
        return None
    return RowBlock(1, chunk, block.vector, resident=False, num_warps=_CUT_WARPS[kind])


@dataclass(frozen=True)
class SumBlock:
    """Launch parameters of a kernel whose programs each sum over a block of rows.

    Attributes:
        rows: rows of a tile, a power of two.
        columns: columns of a tile, a power of two.
        rows_per_program: how many rows a program walks over.
        programs: how many programs share the rows.
        num_warps: warps per program.
        registers: the most registers a thread may have.
    """

    rows: int
    columns: int
    rows_per_program: int
    programs: int
    num_warps: int
    registers: int | None = None

    def options(self, device: DeviceFacts) -> dict[str, Any]:
        """Launch options."""
        return _options(self.num_warps, self.registers, device)


_WALK_ELEMENTS = 16
"""Elements of a row that a thread holds in a backward that walks over rows: gradient, input, both of the next rows, the
weight and a sum for each fill some 120 registers."""

_WALK_REGISTERS = 128
_WALK_MAX_COLS = 8192
_WALK_WARPS = 16
"""Warps of a multiprocessor: with so many registers it holds no more."""


def backward_block(n_cols: int, n_rows: int, device: DeviceFacts) -> SumBlock | None:
    """The parameters of a backward in one pass; None where rows are too long for it, or stay in the cache anyway."""
    if device.kind == "cpu" or n_cols > _WALK_MAX_COLS:
        return None
    width = power_of_2(n_cols)
    num_warps = max(_SMALL_TILE_WARPS, width // (_WALK_ELEMENTS * THREADS_PER_WARP))
    rows = num_warps * THREADS_PER_WARP * _WALK_ELEMENTS // width
    walk = _shared(n_rows, rows, width, device.n_units * _WALK_WARPS // num_warps, num_warps)
    return replace(walk, registers=_WALK_REGISTERS)


def sum_block(n_cols: int, n_rows: int, device: DeviceFacts) -> SumBlock:
    """The parameters of the weight's gradient in a pass of its own."""
    if device.kind == "cpu":
        return _shared(n_rows, 4, min(power_of_2(n_cols), _CPU_CHUNK), device.n_units, 1)
    columns = min(power_of_2(n_cols), 512)
    tiles = -(-n_cols // columns)
    return _shared(n_rows, 8, columns, max(1, 8 * device.n_units // tiles), 4)


def _shared(n_rows: int, rows: int, columns: int, most: int, num_warps: int) -> SumBlock:
    """Rows spread evenly over at most so many programs, in whole tiles."""
    tiles = -(-n_rows // rows)
    per_program = -(-tiles // max(1, min(most, tiles)))
    return SumBlock(rows, columns, per_program * rows, -(-tiles // per_program), num_warps)
