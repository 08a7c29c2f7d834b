"""Rows of a cache, softmax, and flash attention partition by partition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    IndexType,
    IntegerAttr,
    TensorType,
)
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure

from tilewright.npu import shapes
from tilewright.npu.ir.operation import (
    FORMAT,
    NpuOperation,
    scores_of,
    shape_of,
)
from tilewright.npu.shapes import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xdsl.ir import SSAValue

    from tilewright.npu.shapes import Shape


@irdl_op_definition
class InsertOp(NpuOperation):
    """A tensor with rows of another in the place of its own, from ``index`` on; what does not fit is clipped."""

    name = "npu.insert"
    data = operand_def(TensorType)
    updates = operand_def(TensorType)
    index = operand_def(IndexType())
    axis = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """That of the data."""
        return (shapes.insert(shape_of(self.data), shape_of(self.updates), self.number("axis")),)


@irdl_op_definition
class WindowInsertOp(NpuOperation):
    """The first ``start`` rows of ``base``, then all of ``state``, then zeros."""

    name = "npu.window_insert"
    base = operand_def(TensorType)
    state = operand_def(TensorType)
    start = operand_def(IndexType())
    axis = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """As many rows as both have."""
        return (shapes.window_insert(shape_of(self.base), shape_of(self.state), self.number("axis")),)


@irdl_op_definition
class WindowSliceOp(NpuOperation):
    """The last rows before ``end``, as many as the result has; zeros behind if there are fewer."""

    name = "npu.window_slice"
    argument = operand_def(TensorType)
    end = operand_def(IndexType())
    axis = prop_def(IntegerAttr)
    size = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """With ``size`` rows."""
        return (shapes.with_size(shape_of(self.argument), self.number("axis"), self.number("size")),)


# Softmax along the last axis


@irdl_op_definition
class SoftmaxOp(NpuOperation):
    """Softmax."""

    name = "npu.softmax"
    argument = operand_def(TensorType)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's."""
        shapes.axis(-1, len(shape_of(self.argument)))
        return (shape_of(self.argument),)


@irdl_op_definition
class MaskedSoftmaxOp(NpuOperation):
    """Softmax of what the mask shows: where it is greater than zero."""

    name = "npu.masked_softmax"
    argument = operand_def(TensorType)
    mask = operand_def(TensorType)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def conditions(self) -> Sequence[SSAValue]:
        """The mask."""
        return (self.mask,)

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's; the mask stretches to it."""
        return (shapes.broadcast_to(shape_of(self.mask), scores_of(self.argument)),)


@irdl_op_definition
class DynamicMaskedSoftmaxOp(NpuOperation):
    """Softmax where row ``i`` sees the columns ``j <= index + i``."""

    name = "npu.dynamic_masked_softmax"
    argument = operand_def(TensorType)
    index = operand_def(IndexType())
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's."""
        return (scores_of(self.argument),)


@irdl_op_definition
class WindowSoftmaxOp(NpuOperation):
    """Softmax where row ``i`` sees the columns ``start + i - window_size < j <= start + i``."""

    name = "npu.window_softmax"
    argument = operand_def(TensorType)
    start = operand_def(IndexType())
    window_size = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's."""
        return (scores_of(self.argument),)


# Flash attention


class _FlashTile(NpuOperation):
    """One partition of a softmax: the row's maximum so far, the exponentials, their sum."""

    def expected(self) -> tuple[Shape | None, ...]:
        """Rows, scores, rows."""
        scores = scores_of(self.operands[0])
        rows = shapes.reduce(scores, -1)
        previous = self.operands[2] if len(self.operands) > 2 else None
        if previous is not None and shape_of(previous) != rows:
            raise ShapeError(f"row_max_prev has shape {shapes.text(shape_of(previous))}, expected {shapes.text(rows)}")
        return rows, scores, rows


@irdl_op_definition
class FlashTileOp(_FlashTile):
    """One partition of a softmax of what the mask shows."""

    name = "npu.flash_tile"
    argument = operand_def(TensorType)
    mask = operand_def(TensorType)
    previous = opt_operand_def(TensorType)
    row_max = result_def(TensorType)
    row_exp = result_def(TensorType)
    row_sum = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def conditions(self) -> Sequence[SSAValue]:
        """The mask."""
        return (self.mask,)

    def expected(self) -> tuple[Shape | None, ...]:
        """Rows, scores, rows; the mask stretches to the scores."""
        shapes.broadcast_to(shape_of(self.mask), shape_of(self.argument))
        return super().expected()


@irdl_op_definition
class DynamicFlashTileOp(_FlashTile):
    """One partition of a softmax where row ``i`` sees the columns ``j <= index + i``."""

    name = "npu.dynamic_flash_tile"
    argument = operand_def(TensorType)
    index = operand_def(IndexType())
    previous = opt_operand_def(TensorType)
    row_max = result_def(TensorType)
    row_exp = result_def(TensorType)
    row_sum = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())


@irdl_op_definition
class FlashRecomputeOp(NpuOperation):
    """Two partitions put together: ``a = exp(max_prev - max)``; ``a * sum_prev + sum`` and ``a * out_prev + out``."""

    name = "npu.flash_recompute"
    max_prev = operand_def(TensorType)
    max = operand_def(TensorType)
    sum_prev = operand_def(TensorType)
    sum = operand_def(TensorType)
    out_prev = operand_def(TensorType)
    out = operand_def(TensorType)
    sum_result = result_def(TensorType)
    out_result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """Rows and outputs."""
        rows, out = shape_of(self.max_prev), shape_of(self.out_prev)
        for each in (self.max, self.sum_prev, self.sum):
            if shape_of(each) != rows:
                raise ShapeError(f"rows have shapes {shapes.text(rows)} and {shapes.text(shape_of(each))}")
        if shape_of(self.out) != out:
            raise ShapeError(f"outputs have shapes {shapes.text(out)} and {shapes.text(shape_of(self.out))}")
        shapes.broadcast_to(rows, out)
        return rows, out
