"""The ``npu`` dialect: what kernels for a tile NPU are made of, as operations of xdsl.

A program is a ``func.func`` whose arguments are memrefs, its tensors in memory; ``npu.block`` names a block of one, at
offsets that are static or read from memory, and everything between a load and a store is a tensor of static shape. A
run-time ``if`` is ``scf.if``. The semantics of each operation are those of the function of the language of the same
name; verification asks :mod:`tilewright.npu.shapes` again what the front end asked.
"""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    I64,
    DenseArrayBase,
    FloatAttr,
    IndexType,
    IntegerAttr,
    IntegerType,
    MemRefType,
    StringAttr,
    TensorType,
    f32,
    i1,
    i64,
)
from xdsl.ir import Attribute, Dialect, Operation, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import MemoryReadEffect, MemoryWriteEffect, Pure
from xdsl.utils.exceptions import VerifyException

from tilewright.npu import shapes
from tilewright.npu.shapes import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class _Move(NpuOperation):
    """What gives the elements that it is given: numbers, or truths."""

    def conditions(self) -> Sequence[SSAValue]:
        """All of it."""
        return (*self.operands, *self.results)

    def verify_elements(self) -> None:
        """The result's elements are the operand's."""
        super().verify_elements()
        self.require(self.results[0], element_of(self.operands[0]))


_FORMAT = "operands attr-dict `:` functional-type(operands, results)"
_STORE_FORMAT = "operands attr-dict `:` type(operands)"

# Memory


@irdl_op_definition
class BlockOp(NpuOperation):
    """A block of a tensor in memory. One index operand for each offset that is ``DYNAMIC``."""

    name = "npu.block"
    base = operand_def(MemRefType)
    offsets = var_operand_def(IndexType())
    static_offsets = prop_def(DenseArrayBase)
    result = result_def(MemRefType)
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _STORE_FORMAT
    traits = traits_def(MemoryWriteEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """None; the two agree."""
        _agree(self.value, self.block)
        return ()


@irdl_op_definition
class DynLoadOp(NpuOperation):
    """A block of which the first ``index`` entries along ``axis`` are sure to be what is in memory; all without one."""

    name = "npu.dyn_load"
    block = operand_def(MemRefType)
    index = opt_operand_def(IndexType())
    axis = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = _FORMAT
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
    assembly_format = _STORE_FORMAT
    traits = traits_def(MemoryWriteEffect())

    def expected(self) -> tuple[Shape | None, ...]:
        """None; the two agree."""
        _agree(self.value, self.block)
        shapes.axis(self.number("axis"), len(shape_of(self.block)))
        return ()


@irdl_op_definition
class ScalarOp(NpuOperation):
    """The value of a 0-d tensor in memory."""

    name = "npu.scalar"
    base = operand_def(MemRefType)
    result = result_def(TensorType)
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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


# Tensors


@irdl_op_definition
class ElementwiseOp(NpuOperation):
    """A function of the elements at one place; all operands have one shape."""

    name = "npu.elementwise"
    arguments = var_operand_def(TensorType)
    function = prop_def(StringAttr)
    result = result_def(TensorType)
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The product's."""
        return (shapes.matmul(shape_of(self.lhs), shape_of(self.rhs)),)


@irdl_op_definition
class TransposeOp(_Move):
    """The dimensions in another order."""

    name = "npu.transpose"
    argument = operand_def(TensorType)
    permutation = prop_def(DenseArrayBase)
    result = result_def(TensorType)
    assembly_format = _FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The sizes in that order."""
        return (shapes.permute(shape_of(self.argument), self.sizes("permutation")),)


@irdl_op_definition
class ReshapeOp(_Move):
    """The same elements in row-major order with another shape."""

    name = "npu.reshape"
    argument = operand_def(TensorType)
    result = result_def(TensorType)
    assembly_format = _FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """As the result says."""
        return (shapes.reshape(shape_of(self.argument), shape_of(self.result)),)


@irdl_op_definition
class BroadcastOp(_Move):
    """Repeated along dimensions of size 1; missing ones are added in front."""

    name = "npu.broadcast"
    argument = operand_def(TensorType)
    result = result_def(TensorType)
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The axis has as many entries more."""
        shape, low, high = shape_of(self.argument), self.number("low"), self.number("high")
        if low < 0 or high < 0:
            raise ShapeError(f"a padding of {low} and {high} entries")
        return (shapes.pad(shape, self.number("axis"), low, high),)


# Rows of a cache


@irdl_op_definition
class InsertOp(NpuOperation):
    """A tensor with rows of another in the place of its own, from ``index`` on; what does not fit is clipped."""

    name = "npu.insert"
    data = operand_def(TensorType)
    updates = operand_def(TensorType)
    index = operand_def(IndexType())
    axis = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
    traits = traits_def(Pure())

    def conditions(self) -> Sequence[SSAValue]:
        """The mask."""
        return (self.mask,)

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's; the mask stretches to it."""
        return (shapes.broadcast_to(shape_of(self.mask), _scores(self.argument)),)


@irdl_op_definition
class DynamicMaskedSoftmaxOp(NpuOperation):
    """Softmax where row ``i`` sees the columns ``j <= index + i``."""

    name = "npu.dynamic_masked_softmax"
    argument = operand_def(TensorType)
    index = operand_def(IndexType())
    result = result_def(TensorType)
    assembly_format = _FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's."""
        return (_scores(self.argument),)


@irdl_op_definition
class WindowSoftmaxOp(NpuOperation):
    """Softmax where row ``i`` sees the columns ``start + i - window_size < j <= start + i``."""

    name = "npu.window_softmax"
    argument = operand_def(TensorType)
    start = operand_def(IndexType())
    window_size = prop_def(IntegerAttr)
    result = result_def(TensorType)
    assembly_format = _FORMAT
    traits = traits_def(Pure())

    def expected(self) -> tuple[Shape | None, ...]:
        """The operand's."""
        return (_scores(self.argument),)


# Flash attention


class _FlashTile(NpuOperation):
    """One partition of a softmax: the row's maximum so far, the exponentials, their sum."""

    def expected(self) -> tuple[Shape | None, ...]:
        """Rows, scores, rows."""
        scores = _scores(self.operands[0])
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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
    assembly_format = _FORMAT
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


def _scores(value: SSAValue) -> tuple[int, ...]:
    shape = shape_of(value)
    if len(shape) < 2:
        raise ShapeError(f"{shapes.text(shape)} has no rows and columns")
    return shape


def _agree(value: SSAValue, block: SSAValue) -> None:
    if shape_of(value) != shape_of(block):
        message = f"a tensor {shapes.text(shape_of(value))} is written to a block {shapes.text(shape_of(block))}"
        raise ShapeError(message)


OPERATIONS: tuple[type[Operation], ...] = (
    BlockOp, LoadOp, StoreOp, DynLoadOp, DynStoreOp, ScalarOp, IndexOp, IndexAddOp, PartitionSkipOp, ElementwiseOp,
    ReduceOp, MatmulOp, TransposeOp, ReshapeOp, BroadcastOp, PadOp, InsertOp, WindowInsertOp, WindowSliceOp, SoftmaxOp,
    MaskedSoftmaxOp, DynamicMaskedSoftmaxOp, WindowSoftmaxOp, FlashTileOp, DynamicFlashTileOp, FlashRecomputeOp,
)  # fmt: skip
"""The operations of the dialect."""

Npu = Dialect("npu", list(OPERATIONS), [])
