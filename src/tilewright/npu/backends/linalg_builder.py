"""Building linalg on tensors: tiles that are read through index maps, and the loops over them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from xdsl.dialects import arith, tensor
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    AffineMapAttr,
    AnyFloat,
    ArrayAttr,
    FloatAttr,
    IndexType,
    IntegerAttr,
    IntegerType,
    LocationAttr,
    TensorType,
    UnknownLoc,
    f32,
    i1,
    i64,
)
from xdsl.dialects.linalg import ops as linalg
from xdsl.dialects.linalg.attrs import IteratorTypeAttr
from xdsl.ir import Block, Region
from xdsl.ir.affine import AffineExpr, AffineMap

from tilewright.npu.ir.dialect import shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    from xdsl.ir import Attribute, Operation, SSAValue

    Offset: TypeAlias = int | SSAValue
    Body: TypeAlias = Callable[..., SSAValue]

INDEX = IndexType()


@dataclass(frozen=True)
class Tile:
    """A tensor as the program sees it.

    Transpositions and repetitions are no operations of their own: whatever reads the tile does it through a map.

    Attributes:
        value: a tensor, or a number that the whole tile consists of.
        axes: which dimension of ``shape`` each dimension of the tensor is; along the others its entries repeat.
        shape: the tile's sizes.
    """

    value: SSAValue
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    @property
    def element(self) -> Attribute:
        """The type of its elements."""
        type_ = self.value.type
        return type_.get_element_type() if isinstance(type_, TensorType) else type_

    def placed(self, dims: Sequence[int], shape: Sequence[int]) -> Tile:
        """Read inside a space of ``shape``: dimension ``n`` is dimension ``dims[n]`` of it."""
        return Tile(self.value, tuple(dims[axis] for axis in self.axes), tuple(shape))

    def transposed(self, order: Sequence[int]) -> Tile:
        """With the dimensions in this order."""
        return self.placed([order.index(axis) for axis in range(self.rank)], [self.shape[axis] for axis in order])


def whole(value: SSAValue) -> Tile:
    """A tensor as it is."""
    shape = shape_of(value)
    return Tile(value, tuple(range(len(shape))), shape)


class Builder:
    """Collects the operations of a function in their order.

    Attributes:
        body: the function's block.
        location: the place in the source that is given to what is added.
    """

    def __init__(self, types: Sequence[Attribute], location: LocationAttr) -> None:
        self.body = self._block = Block(arg_types=list(types))
        self.location = location
        self._constants: dict[tuple[object, Attribute], SSAValue] = {}

    def add(self, operation: Operation) -> SSAValue:
        """Append an operation; its first result."""
        self.append(operation)
        return operation.results[0]

    def append(self, operation: Operation) -> None:
        """Append an operation, which need not have results."""
        operation.location = self.location
        self._block.add_op(operation)

    @contextmanager
    def inside(self, block: Block) -> Iterator[None]:
        """What is added meanwhile goes into a block of a region."""
        outer, self._block = self._block, block
        try:
            yield
        finally:
            self._block = outer

    # Numbers

    def constant(self, value: float, type_: Attribute = f32) -> SSAValue:
        """A number, at the head of the function."""
        key = (repr(value), type_)
        if key not in self._constants:
            attribute: FloatAttr[Any] | IntegerAttr[Any]
            if isinstance(type_, AnyFloat):
                attribute = FloatAttr(value, type_)
            else:
                assert isinstance(type_, IndexType | IntegerType)
                attribute = IntegerAttr(int(value), type_)
            operation = arith.ConstantOp(attribute)
            operation.location = UnknownLoc()
            operation.result.name_hint = f"c{int(value)}" if type_ == INDEX else "cst"
            first = self.body.first_op
            if first is None:
                self.body.add_op(operation)
            else:
                self.body.insert_op_before(operation, first)
            self._constants[key] = operation.result
        return self._constants[key]

    def index(self, value: Offset) -> SSAValue:
        """An index as a value."""
        return self.constant(value, INDEX) if isinstance(value, int) else value

    def number(self, value: SSAValue, type_: Attribute = f32) -> SSAValue:
        """A number as one of another floating-point type; a truth is 0 or 1."""
        given = value.type
        if given == type_:
            return value
        if given == i1:
            return self.add(arith.UIToFPOp(value, type_))  # type: ignore[arg-type]
        if isinstance(given, IntegerType):
            return self.add(arith.SIToFPOp(value, type_))  # type: ignore[arg-type]
        assert isinstance(given, AnyFloat)
        assert isinstance(type_, AnyFloat)
        cast = arith.ExtFOp if given.bitwidth < type_.bitwidth else arith.TruncFOp
        return self.add(cast(value, type_))

    # Loops

    def generic(
        self,
        body: Body,
        tiles: Sequence[Tile],
        shape: Sequence[int],
        *,
        element: Attribute = f32,
        reduced: Sequence[int] = (),
        start: float = 0.0,
    ) -> Tile:
        """A ``linalg.generic``.

        Args:
            body: what computes an element, of one of each tile; where dimensions are reduced, of the result so far too.
            tiles: what is read; all have ``shape``.
            shape: the space that the loops run over.
            element: the type of the result's elements.
            reduced: the dimensions that are reduced; they have size 1 in the result.
            start: what a reduction starts from.
        """
        tiles = [self._covering(reduced, tiles[0]), *tiles[1:]] if reduced else list(tiles)
        kept = [axis for axis in range(len(shape)) if axis not in reduced]
        empty = self.empty([shape[axis] for axis in kept], element)
        into = self.fill(self.constant(start, element), empty) if reduced else empty
        tensors = [tile for tile in tiles if isinstance(tile.value.type, TensorType)]
        block = Block(arg_types=[*(tile.element for tile in tensors), element])
        given = iter(block.args)
        elements = [next(given) if isinstance(tile.value.type, TensorType) else tile.value for tile in tiles]
        for argument in block.args:
            argument.location = self.location
        with self.inside(block):
            self.append(linalg.YieldOp(body(*elements, *([block.args[-1]] if reduced else []))))
        maps = [_map(len(shape), axes) for axes in (*(tile.axes for tile in tensors), kept)]
        parallel, reduction = IteratorTypeAttr.parallel(), IteratorTypeAttr.reduction()
        iterators = [reduction if axis in reduced else parallel for axis in range(len(shape))]
        values = [tile.value for tile in tensors]
        result = self.add(linalg.GenericOp(values, [into], Region(block), maps, iterators, [into.type]))
        return Tile(result, tuple(kept), tuple(1 if axis in reduced else size for axis, size in enumerate(shape)))

    def _covering(self, reduced: Sequence[int], tile: Tile) -> Tile:
        """A tile whose tensor has the dimensions that are reduced: they say how long the loops are."""
        return tile if set(reduced) <= set(tile.axes) else whole(self.plain(tile))

    def map(self, body: Body, *tiles: Tile, element: Attribute = f32) -> Tile:
        """A function of the elements of tiles of one shape."""
        return self.generic(body, tiles, tiles[0].shape, element=element)

    def reduce(self, body: Body, tile: Tile, axis: int, start: float) -> Tile:
        """The elements along an axis put together, from a start; the axis keeps size 1."""
        return self.generic(
            lambda x, so_far: body(so_far, self.number(x)), [tile], tile.shape, reduced=[axis], start=start
        )

    def place(self, axis: int) -> SSAValue:
        """Where a loop over a dimension is; inside a body."""
        return self.add(linalg.IndexOp(axis))

    # Tensors

    def empty(self, shape: Sequence[int], element: Attribute = f32) -> SSAValue:
        """A tensor that is to be written."""
        return self.add(tensor.EmptyOp([], TensorType(element, list(shape))))

    def fill(self, number: SSAValue, into: SSAValue) -> SSAValue:
        """The same number everywhere."""
        return self.add(linalg.FillOp([number], [into], [into.type]))

    def zeros(self, shape: Sequence[int]) -> SSAValue:
        """Zeros."""
        return self.fill(self.constant(0.0), self.empty(shape))

    def plain(self, tile: Tile) -> SSAValue:
        """A tile as a tensor of its shape."""
        if not isinstance(tile.value.type, TensorType):
            return self.fill(tile.value, self.empty(tile.shape, tile.element))
        if tile.axes == tuple(range(tile.rank)):
            return tile.value
        missing = prod(size for axis, size in enumerate(tile.shape) if axis not in tile.axes)
        if tile.axes and missing == 1 and list(tile.axes) == sorted(tile.axes):
            return self.reshaped(tile.value, tile.shape)
        return self.map(lambda x: x, tile, element=tile.element).value

    def reshaped(self, value: SSAValue, shape: Sequence[int]) -> SSAValue:
        """The same elements in row-major order with another shape."""
        given, element = shape_of(value), value.type.get_element_type()  # type: ignore[attr-defined]
        groups = _groups(given, shape)
        between = [prod(given[axis] for axis in before) for before, _ in groups]
        if len(between) < len(given):
            value = self.add(
                tensor.CollapseShapeOp.build(
                    operands=[value],
                    properties={"reassociation": _lists([before for before, _ in groups])},
                    result_types=[TensorType(element, between)],
                )
            )
        if len(between) < len(shape):
            after = _lists([after for _, after in groups])
            value = self.add(tensor.ExpandShapeOp(value, [], after, list(shape), TensorType(element, list(shape))))
        return value

    def reshape(self, tile: Tile, shape: Sequence[int]) -> Tile:
        """A tile with another shape of as many elements."""
        if not tile.axes:  # the same number everywhere
            return Tile(tile.value, (), tuple(shape))
        return whole(self.reshaped(self.plain(tile), shape))

    def broadcast(self, tile: Tile, shape: Sequence[int]) -> Tile:
        """A tile repeated along its dimensions of size 1; missing ones are added in front."""
        added = len(shape) - tile.rank
        stretched = [axis for axis in tile.axes if tile.shape[axis] != shape[axis + added]]
        if stretched:
            kept = tuple(axis for axis in tile.axes if axis not in stretched)
            tile = Tile(self.reshaped(tile.value, [tile.shape[axis] for axis in kept]), kept, tile.shape)
        return tile.placed(range(added, len(shape)), shape)

    def converted(self, tile: Tile, element: Attribute) -> Tile:
        """A tile with elements of another floating-point type."""
        if tile.element == element:
            return tile
        return self.map(lambda x: self.number(x, element), tile, element=element)

    def pad(self, value: SSAValue, axis: int, low: int, high: int, number: float = 0.0) -> SSAValue:
        """A number before and behind the entries of an axis."""
        shape, element = list(shape_of(value)), value.type.get_element_type()  # type: ignore[attr-defined]
        block = Block(arg_types=[INDEX] * len(shape))
        with self.inside(block):
            self.append(tensor.YieldOp(self.constant(number, element)))
        before, behind = ([each if at == axis else 0 for at in range(len(shape))] for each in (low, high))
        shape[axis] += low + high
        return self.add(tensor.PadOp(value, [], [], Region(block), before, behind, TensorType(element, shape)))

    def extract(self, value: SSAValue, offsets: Sequence[Offset], sizes: Sequence[Offset]) -> SSAValue:
        """A block of a tensor."""
        if tuple(sizes) == shape_of(value):
            return value
        shape = [size if isinstance(size, int) else DYNAMIC_INDEX for size in sizes]
        type_ = TensorType(value.type.get_element_type(), shape)  # type: ignore[attr-defined]
        return self.add(tensor.ExtractSliceOp(value, offsets, sizes, [1] * len(sizes), type_))

    def insert(self, value: SSAValue, into: SSAValue, offsets: Sequence[Offset], sizes: Sequence[Offset]) -> SSAValue:
        """A tensor with another in the place of a block of it."""
        if tuple(sizes) == shape_of(into):
            return value
        at, indices = _split(offsets)
        counts, numbers = _split(sizes)
        return self.add(
            tensor.InsertSliceOp.get(value, into, counts, at, [1] * len(counts), offsets=indices, sizes=numbers)
        )

    def element_at(self, value: SSAValue, offsets: Sequence[Offset]) -> SSAValue:
        """One element of a tensor."""
        element = value.type.get_element_type()  # type: ignore[attr-defined]
        return self.add(tensor.ExtractOp(value, [self.index(each) for each in offsets], element))


def _map(rank: int, axes: Sequence[int]) -> AffineMapAttr:
    return AffineMapAttr(AffineMap(rank, 0, tuple(AffineExpr.dimension(axis) for axis in axes)))


def _split(values: Sequence[Offset]) -> tuple[list[int], list[SSAValue]]:
    """Numbers with a mark where one is known at run time only, and those."""
    static = [each if isinstance(each, int) else DYNAMIC_INDEX for each in values]
    return static, [each for each in values if not isinstance(each, int)]


def _lists(groups: Sequence[Sequence[int]]) -> ArrayAttr[ArrayAttr[IntegerAttr]]:
    return ArrayAttr([ArrayAttr([IntegerAttr(axis, i64) for axis in group]) for group in groups])


def _groups(given: Sequence[int], wanted: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of one shape are which of another with as many elements: the finest groups of equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(given) and j < len(wanted):
        before, after = [i], [j]
        while (left := prod(given[n] for n in before)) != (right := prod(wanted[n] for n in after)):
            if left < right:
                before.append(before[-1] + 1)
            else:
                after.append(after[-1] + 1)
        groups.append((before, after))
        i, j = before[-1] + 1, after[-1] + 1
    if groups:  # ones are left over
        groups[-1][0].extend(range(i, len(given)))
        groups[-1][1].extend(range(j, len(wanted)))
    return groups
