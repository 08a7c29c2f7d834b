"""The ``npu`` dialect: what kernels for a tile NPU are made of, as operations of xdsl.

A program is a ``func.func`` whose arguments are memrefs, its tensors in memory; ``npu.block`` names a block of one, at
offsets that are static or read from memory, and everything between a load and a store is a tensor of static shape. A
run-time ``if`` is ``scf.if``. The semantics of each operation are those of the function of the language of the same
name; verification asks :mod:`tilewright.npu.shapes` again what the front end asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.ir import Dialect

from tilewright.npu.ir.attention import (
    DynamicFlashTileOp,
    DynamicMaskedSoftmaxOp,
    FlashRecomputeOp,
    FlashTileOp,
    InsertOp,
    MaskedSoftmaxOp,
    SoftmaxOp,
    WindowInsertOp,
    WindowSliceOp,
    WindowSoftmaxOp,
)
from tilewright.npu.ir.memory import (
    BlockOp,
    DynLoadOp,
    DynStoreOp,
    IndexAddOp,
    IndexOp,
    LoadOp,
    PartitionSkipOp,
    ScalarOp,
    StoreOp,
)
from tilewright.npu.ir.operation import (
    ARITY,
    BINARY,
    COMPARISONS,
    DYNAMIC,
    PADDING,
    REDUCTIONS,
    TERNARY,
    UNARY,
    NpuOperation,
    element_of,
    integers,
    shape_of,
    tensor,
)
from tilewright.npu.ir.tensors import (
    BroadcastOp,
    ElementwiseOp,
    MatmulOp,
    PadOp,
    ReduceOp,
    ReshapeOp,
    TransposeOp,
)

if TYPE_CHECKING:
    from xdsl.ir import Operation

__all__ = [
    "ARITY",
    "BINARY",
    "COMPARISONS",
    "DYNAMIC",
    "OPERATIONS",
    "PADDING",
    "REDUCTIONS",
    "TERNARY",
    "UNARY",
    "BlockOp",
    "BroadcastOp",
    "DynLoadOp",
    "DynStoreOp",
    "DynamicFlashTileOp",
    "DynamicMaskedSoftmaxOp",
    "ElementwiseOp",
    "FlashRecomputeOp",
    "FlashTileOp",
    "IndexAddOp",
    "IndexOp",
    "InsertOp",
    "LoadOp",
    "MaskedSoftmaxOp",
    "MatmulOp",
    "Npu",
    "NpuOperation",
    "PadOp",
    "PartitionSkipOp",
    "ReduceOp",
    "ReshapeOp",
    "ScalarOp",
    "SoftmaxOp",
    "StoreOp",
    "TransposeOp",
    "WindowInsertOp",
    "WindowSliceOp",
    "WindowSoftmaxOp",
    "element_of",
    "integers",
    "shape_of",
    "tensor",
]

OPERATIONS: tuple[type[Operation], ...] = (
    BlockOp, LoadOp, StoreOp, DynLoadOp, DynStoreOp, ScalarOp, IndexOp, IndexAddOp, PartitionSkipOp, ElementwiseOp,
    ReduceOp, MatmulOp, TransposeOp, ReshapeOp, BroadcastOp, PadOp, InsertOp, WindowInsertOp, WindowSliceOp, SoftmaxOp,
    MaskedSoftmaxOp, DynamicMaskedSoftmaxOp, WindowSoftmaxOp, FlashTileOp, DynamicFlashTileOp, FlashRecomputeOp,
)  # fmt: skip
"""The operations of the dialect."""

Npu = Dialect("npu", list(OPERATIONS), [])
