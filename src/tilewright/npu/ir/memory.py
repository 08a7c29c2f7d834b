"""Blocks of tensors in memory, loads, stores, and indices that are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    DenseArrayBase,
    IndexType,
    IntegerAttr,
    IntegerType,
    MemRefType,
    TensorType,
    i1,
)
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import MemoryReadEffect, MemoryWriteEffect, Pure

from tilewright.npu import shapes
from tilewright.npu.ir.operation import (
    DYNAMIC,
    FORMAT,
    PADDING,
    STORE_FORMAT,
    NpuOperation,
    agree,
    element_of,
    shape_of,
)
from tilewright.npu.shapes import ShapeError

if TYPE_CHECKING:
    from tilewright.npu.shapes import Shape


@irdl_op_definition
class BlockOp(NpuOperation):
    """A block of a tensor in memory. One index operand for each offset that is ``DYNAMIC``."""

    name = "npu.block"
    base = operand_def(MemRefType)
    offsets = var_operand_def(IndexType())
    static_offsets = prop_def(DenseArrayBase)
    result = result_def(MemRefType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """As the result says; each dimension inside the base's, the last one inside its padding."""
        base, sizes = shape_of(self.base), shape_of(self.result)
        offsets = self.sizes("static_offsets")
        if element_of(self.base) != element_of(self.result):
            raise ShapeError(f"a block has elements {element_of(self.result)}, its base {element_of(self.base)}")
        if not len(base) == len(sizes) == len(offsets):
            raise ShapeError(f"a block {shapes.text(sizes)} at {offsets} of {shapes.text(base)}: ranks differ")
        if offsets.count(DYNAMIC) != len(self.offsets):
            raise ShapeError(f"{offsets.count(DYNAMIC)} offsets are operands, {len(self.offsets)} are given")
        for axis, (offset, size, whole) in enumerate(zip(offsets, sizes, base, strict=True)):
            if axis == len(base) - 1:
                whole = -(-whole // PADDING) * PADDING  # noqa: PLW2901
            if offset != DYNAMIC and (offset < 0 or offset + size > whole):
                raise ShapeError(f"rows {offset} to {offset + size} of dimension {axis} of {shapes.text(base)}")
        return (sizes,)


@irdl_op_definition
class LoadOp(NpuOperation):
    """A block as a tensor."""

    name = "npu.load"
    block = operand_def(MemRefType)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(MemoryReadEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """The block's."""
        return (shape_of(self.block),)


@irdl_op_definition
class StoreOp(NpuOperation):
    """Write a tensor to a block."""

    name = "npu.store"
    value = operand_def(TensorType)
    block = operand_def(MemRefType)
    assembly_format = STORE_FORMAT
    traits = traits_def(MemoryWriteEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """None; the two agree."""
        agree(self.value, self.block)
        return ()


@irdl_op_definition
class DynLoadOp(NpuOperation):
    """A block of which the first ``index`` entries along ``axis`` are sure to be what is in memory; all without one."""

    name = "npu.dyn_load"
    block = operand_def(MemRefType)
    index = opt_operand_def(IndexType())
    axis = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(MemoryReadEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """The block's."""
        shapes.axis(self.number("axis"), len(shape_of(self.block)))
        return (shape_of(self.block),)


@irdl_op_definition
class DynStoreOp(NpuOperation):
    """Write the first ``index`` entries along ``axis`` of a tensor to a block; all without an index."""

    name = "npu.dyn_store"
    value = operand_def(TensorType)
    block = operand_def(MemRefType)
    index = opt_operand_def(IndexType())
    axis = prop_def(IntegerAttr)
    assembly_format = STORE_FORMAT
    traits = traits_def(MemoryWriteEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """None; the two agree."""
        agree(self.value, self.block)
        shapes.axis(self.number("axis"), len(shape_of(self.block)))
        return ()


@irdl_op_definition
class ScalarOp(NpuOperation):
    """The value of a 0-d tensor in memory."""

    name = "npu.scalar"
    base = operand_def(MemRefType)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(MemoryReadEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """No dimensions, and the base has one element."""
        if any(size != 1 for size in shape_of(self.base)):
            raise ShapeError(f"{shapes.text(shape_of(self.base))} is no scalar")
        return ((),)


# Indices


@irdl_op_definition
class IndexOp(NpuOperation):
    """The integer in a block of one element. ``max`` is the largest that it can be, -1 if that is not known."""

    name = "npu.index"
    block = operand_def(MemRefType)
    max = prop_def(IntegerAttr)
    result = result_def(IndexType())
    assembly_format = FORMAT
    traits = traits_def(MemoryReadEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """None; the block has one integer."""
        if any(size != 1 for size in shape_of(self.block)):
            raise ShapeError(f"the block has shape {shapes.text(shape_of(self.block))}, expected ones")
        if not isinstance(element_of(self.block), IntegerType):
            raise ShapeError(f"the block has elements {element_of(self.block)}, expected integers")
        return (None,)


@irdl_op_definition
class IndexAddOp(NpuOperation):
    """An index plus a number."""

    name = "npu.index_add"
    index = operand_def(IndexType())
    value = prop_def(IntegerAttr)
    result = result_def(IndexType())
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """None."""
        return (None,)


@irdl_op_definition
class PartitionSkipOp(NpuOperation):
    """Whether a partition lies behind the one that is being written.

    ``position`` is the place ``(..., p)`` in a table of how many rows each partition of ``partition_size`` rows has:
    ``p > 0 and table[..., p] == 0 and table[..., p - 1] < partition_size``.
    """

    name = "npu.partition_skip"
    table = operand_def(MemRefType)
    position = prop_def(DenseArrayBase)
    partition_size = prop_def(IntegerAttr)
    result = result_def(i1)
    assembly_format = FORMAT
    traits = traits_def(MemoryReadEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """None; the position lies in the table, and partitions have rows."""
        table, position = shape_of(self.table), self.sizes("position")
        inside = len(table) == len(position) and all(0 <= at < size for at, size in zip(position, table, strict=True))
        if not inside or not table:
            raise ShapeError(f"{position} is no position in {shapes.text(table)}")
        if self.number("partition_size") < 1:
            raise ShapeError(f"a partition of {self.number('partition_size')} rows")
        if not isinstance(element_of(self.table), IntegerType):
            raise ShapeError(f"the table has elements {element_of(self.table)}, expected integers")
        return (None,)
