"""Arithmetic, products and shapes of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    DenseArrayBase,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    TensorType,
    f32,
    i1,
)
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import Pure

from tilewright.npu import shapes
from tilewright.npu.ir.operation import (
    ARITY,
    COMPARISONS,
    FORMAT,
    REDUCTIONS,
    Move,
    NpuOperation,
    shape_of,
)
from tilewright.npu.shapes import ShapeError

if TYPE_CHECKING:
    from tilewright.npu.shapes import Shape


@irdl_op_definition
class ElementwiseOp(NpuOperation):
    """A function of the elements at one place; all operands have one shape."""

    name = "npu.elementwise"
    arguments = var_operand_def(TensorType)
    function = prop_def(StringAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def verify_elements(self) -> None:
        """A comparison gives truths, a choice takes some; everything else is numbers."""
        truths = self.results if self.function.data in COMPARISONS else ()
        truths = (*truths, *(self.operands[:1] if self.function.data == "select" else ()))
        for value in (*self.operands, *self.results):
            self.require(value, i1 if any(value is each for each in truths) else f32)

    def expected(self) -> tuple[Shape | None, ...]:
        """That of the operands."""
        function = self.function.data
        if ARITY.get(function) != len(self.arguments):
            raise ShapeError(f"'{function}' of {len(self.arguments)} operands is unknown")
        first = shape_of(self.arguments[0])
        for each in self.arguments:
            if shape_of(each) != first:
                raise ShapeError(f"operands have shapes {shapes.text(first)} and {shapes.text(shape_of(each))}")
        return (first,)


@irdl_op_definition
class ReduceOp(NpuOperation):
    """The greatest, the least or the sum along an axis, which keeps size 1."""

    name = "npu.reduce"
    argument = operand_def(TensorType)
    function = prop_def(StringAttr)
    axis = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's, but for the axis."""
        if self.function.data not in REDUCTIONS:
            raise ShapeError(f"there is no reduction '{self.function.data}'")
        return (shapes.reduce(shape_of(self.argument), self.number("axis")),)


@irdl_op_definition
class MatmulOp(NpuOperation):
    """The product of the matrices in the last two dimensions; the others are equal."""

    name = "npu.matmul"
    lhs = operand_def(TensorType)
    rhs = operand_def(TensorType)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The product's."""
        return (shapes.matmul(shape_of(self.lhs), shape_of(self.rhs)),)


@irdl_op_definition
class TransposeOp(Move):
    """The dimensions in another order."""

    name = "npu.transpose"
    argument = operand_def(TensorType)
    permutation = prop_def(DenseArrayBase)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The sizes in that order."""
        return (shapes.permute(shape_of(self.argument), self.sizes("permutation")),)


@irdl_op_definition
class ReshapeOp(Move):
    """The same elements in row-major order with another shape."""

    name = "npu.reshape"
    argument = operand_def(TensorType)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """As the result says."""
        return (shapes.reshape(shape_of(self.argument), shape_of(self.result)),)


@irdl_op_definition
class BroadcastOp(Move):
    """Repeated along dimensions of size 1; missing ones are added in front."""

    name = "npu.broadcast"
    argument = operand_def(TensorType)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """As the result says."""
        return (shapes.broadcast_to(shape_of(self.argument), shape_of(self.result)),)


@irdl_op_definition
class PadOp(NpuOperation):
    """A constant before and behind the entries of an axis."""

    name = "npu.pad"
    argument = operand_def(TensorType)
    axis = prop_def(IntegerAttr)
    low = prop_def(IntegerAttr)
    high = prop_def(IntegerAttr)
    value = prop_def(FloatAttr)
    result = result_def(TensorType)
    assembly_format = FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The axis has as many entries more."""
        shape, low, high = shape_of(self.argument), self.number("low"), self.number("high")
        if low < 0 or high < 0:
            raise ShapeError(f"a padding of {low} and {high} entries")
        return (shapes.pad(shape, self.number("axis"), low, high),)
