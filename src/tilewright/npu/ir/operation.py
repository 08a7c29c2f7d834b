"""What the operations of the ``npu`` dialect have in common."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    I64,
    DenseArrayBase,
    IntegerAttr,
    MemRefType,
    TensorType,
    f32,
    i1,
    i64,
)
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
)
from xdsl.utils.exceptions import VerifyException

from tilewright.npu import shapes
from tilewright.npu.shapes import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xdsl.ir import Attribute, SSAValue

    from tilewright.npu.shapes import Shape

DYNAMIC = -(2**63)
"""Stands for an offset that is an operand, as in MLIR."""

PADDING = 64
"""Up to a multiple of this a block may reach into zeros behind the last dimension; what is written there is lost."""

UNARY = (
    "abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "neg", "rsqrt", "sigmoid", "sin", "sqrt",
)  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", *COMPARISONS)
TERNARY = ("select",)
ARITY = {**dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY, 2), **dict.fromkeys(TERNARY, 3)}
REDUCTIONS = ("max", "min", "sum")


def shape_of(value: SSAValue) -> tuple[int, ...]:
    """The sizes of a tensor or memref."""
    type_ = value.type
    assert isinstance(type_, TensorType | MemRefType)
    return tuple(type_.get_shape())


def element_of(value: SSAValue) -> Attribute:
    """The element type of a tensor or memref."""
    type_ = value.type
    assert isinstance(type_, TensorType | MemRefType)
    element: Attribute = type_.get_element_type()
    return element


def tensor(shape: Sequence[int], element: Attribute = f32) -> TensorType[Attribute]:
    """The type of a tensor."""
    return TensorType(element, list(shape))


def integers(values: Sequence[int]) -> DenseArrayBase[I64]:
    """An attribute of integers."""
    return DenseArrayBase.from_list(i64, list(values))


class NpuOperation(IRDLOperation, ABC):
    """What the operations of the dialect have in common: one way to be written, and shapes that are verified."""

    irdl_options = (ParsePropInAttrDict(),)

    def expected(self) -> tuple[Shape | None, ...]:
        """The shapes of the results, from operands and attributes; None for what has none.

        Raises:
            ShapeError: operands and attributes do not fit.
        """
        raise NotImplementedError

    def verify_(self) -> None:
        """Sizes are static, elements are what the operation takes, the results' shapes are those expected."""
        for attribute in self.properties.values():
            if isinstance(attribute, DenseArrayBase) and attribute.elt_type != i64:
                raise VerifyException(f"{self.name}: integers have 64 bits, not {attribute.elt_type}")
        for value in (*self.operands, *self.results):
            if isinstance(value.type, TensorType | MemRefType) and any(size < 1 for size in shape_of(value)):
                raise VerifyException(f"{self.name}: {value.type} has a size that is not known, or none")
        self.verify_elements()
        try:
            expected = self.expected()
        except ShapeError as error:
            raise VerifyException(f"{self.name}: {error}") from error
        for result, shape in zip(self.results, expected, strict=True):
            if shape is not None and shape_of(result) != shape:
                message = (
                    f"{self.name}: a result has shape {shapes.text(shape_of(result))}, expected {shapes.text(shape)}"
                )
                raise VerifyException(message)

    def conditions(self) -> Sequence[SSAValue]:
        """The operands and results that may be the truths of a comparison; all others are float32."""
        return ()

    def verify_elements(self) -> None:
        """Tensors hold numbers, or the truths of a comparison where those may stand."""
        free = self.conditions()
        for value in (*self.operands, *self.results):
            self.require(value, *((f32, i1) if any(value is each for each in free) else (f32,)))

    def require(self, value: SSAValue, *allowed: Attribute) -> None:
        """Make sure that a tensor has elements of one of these types."""
        if isinstance(value.type, TensorType) and element_of(value) not in allowed:
            expected = " or ".join(str(each) for each in allowed)
            raise VerifyException(f"{self.name}: a tensor has elements {element_of(value)}, expected {expected}")

    def sizes(self, name: str) -> tuple[int, ...]:
        """The integers of an attribute."""
        attribute = self.properties[name]
        assert isinstance(attribute, DenseArrayBase)
        return tuple(int(each) for each in attribute.iter_values())

    def number(self, name: str) -> int:
        """The integer of an attribute."""
        attribute = self.properties[name]
        assert isinstance(attribute, IntegerAttr)
        return attribute.value.data


class Move(NpuOperation):
    """What gives the elements that it is given: numbers, or truths."""

    def conditions(self) -> Sequence[SSAValue]:
        """All of it."""
        return (*self.operands, *self.results)

    def verify_elements(self) -> None:
        """The result's elements are the operand's."""
        super().verify_elements()
        self.require(self.results[0], element_of(self.operands[0]))


FORMAT = "operands attr-dict `:` functional-type(operands, results)"
STORE_FORMAT = "operands attr-dict `:` type(operands)"


def scores_of(value: SSAValue) -> tuple[int, ...]:
    """The sizes of scores: rows and columns at least."""
    shape = shape_of(value)
    if len(shape) < 2:
        raise ShapeError(f"{shapes.text(shape)} has no rows and columns")
    return shape


def agree(value: SSAValue, block: SSAValue) -> None:
    """Make sure that a tensor fits the block that it is written to."""
    if shape_of(value) != shape_of(block):
        message = f"a tensor {shapes.text(shape_of(value))} is written to a block {shapes.text(shape_of(block))}"
        raise ShapeError(message)
