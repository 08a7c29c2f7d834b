"""Tiles that are computed where they are needed: where an element comes from, and loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.cpu import pointwise
from tilewright.cpu.diagnostics import unsupported
from tilewright.cpu.types import I1, I32, Pointer, Scalar, Tensor, element_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.cpu.expressions import Expr
    from tilewright.cpu.loops import Site
    from tilewright.cpu.lowering import Lowering
    from tilewright.cpu.ttir import Operation, Value

    Index = tuple[Expr, ...]


def element(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    """The element of a tile at ``index``, from the operation that yields the tile."""
    rule = _RULES.get(operation.name)
    if rule is not None:
        return rule(lowering, operation, value, index)
    args = [lowering.element(operand, index) for operand in operation.operands]
    if operation.name == "arith.cmpi":
        assert lowering.open is not None
        predicate = pointwise.INT_PREDICATES[operation.attributes["predicate"]]
        return lowering.make.compare(predicate, args[0], args[1], lowering.open.bounds)
    return pointwise.build(lowering.make, operation, args)


def _constant(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    found = pointwise.constant(lowering.make, operation)
    if found is None:
        raise unsupported(operation, "a constant tile whose elements differ")
    return found


def _poison(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    return pointwise.literal(lowering.make, 0, element_of(value.type))


def _splat(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    return lowering.element(operation.operands[0], ())


def _broadcast(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    zero = lowering.make.const(0, I32)
    shape = shape_of(operation.operands[0].type)
    return lowering.element(
        operation.operands[0], tuple(zero if size == 1 else i for size, i in zip(shape, index, strict=True))
    )


def _expand_dims(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    axis = operation.attributes["axis"]
    return lowering.element(operation.operands[0], index[:axis] + index[axis + 1 :])


def _reshape(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    assert lowering.open is not None
    source = shape_of(operation.operands[0].type)
    target = shape_of(value.type)
    # Unit axes do not matter; if nothing else changes, the index stays as it is.
    if [s for s in source if s > 1] == [s for s in target if s > 1]:
        kept = iter([i for i, size in zip(index, target, strict=True) if size > 1])
        zero = lowering.make.const(0, I32)
        return lowering.element(operation.operands[0], tuple(next(kept) if size > 1 else zero for size in source))
    position = lowering.make.flat(index, target)
    return lowering.element(operation.operands[0], lowering.make.unflat(position, source, lowering.open.bounds))


def _trans(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    source: list[Expr | None] = [None] * len(index)
    for axis, i in zip(operation.attributes["order"], index, strict=True):
        source[axis] = i
    return lowering.element(operation.operands[0], tuple(i for i in source if i is not None))


def _join(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    *rest, which = index
    return _either(lowering, operation, which, tuple(rest), tuple(rest))


def _either(lowering: Lowering, operation: Operation, which: Expr, first: Index, second: Index) -> Expr:
    """The first operand's element where ``which`` is 0, the second's where not."""
    if which.op == "const":
        return lowering.element(operation.operands[which.attr != 0], second if which.attr else first)
    make = lowering.make
    is_first = make.make("cmpi", I1, (which, make.const(0, which.type)), "eq")
    a, b = lowering.element(operation.operands[0], first), lowering.element(operation.operands[1], second)
    return a if a is b else make.make("select", a.type, (is_first, a, b))


def _cat(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    make = lowering.make
    size = shape_of(operation.operands[0].type)[0]
    if size != shape_of(operation.operands[1].type)[0]:
        raise unsupported(operation, "tl.cat of tiles of different size")
    # Both indices stay within bounds, whichever element is taken.
    inner = (make.int_op("and", index[0], make.const(size - 1, I32)), *index[1:])
    return _either(
        lowering, operation, make.int_op("shru", index[0], make.const(size.bit_length() - 1, I32)), inner, inner
    )


def _split(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    return lowering.element(operation.operands[0], (*index, lowering.make.const(value.index, I32)))


def _make_range(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    start = operation.attributes["start"]
    return lowering.make.int_op("add", index[0], lowering.make.const(start, I32))


def _gather(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    source, indices = operation.operands
    axis = operation.attributes["axis"]
    size = shape_of(source.type)[axis]
    make = lowering.make
    at = lowering.element(indices, index)
    if at.type.bits > 32:
        at = make.make("trunc", I32, (at,))
    elif at.type.bits < 32:
        at = make.make("zext", I32, (at,))
    # The mask keeps an index that is out of range from leaving the tile.
    at = make.int_op("and", at, make.const(size - 1, I32))
    return lowering.element(source, (*index[:axis], at, *index[axis + 1 :]))


def _load(lowering: Lowering, operation: Operation, value: Value, index: Index) -> Expr:
    pointer, *rest = operation.operands
    lowering.note_read(pointer)
    return load(lowering, operation, lowering.element(pointer, index), [lowering.element(r, index) for r in rest])


def load(lowering: Lowering, operation: Operation, pointer: Expr, rest: list[Expr]) -> Expr:
    """A load of one element; where the mask does not hold, ``other``, or 0 where that is not given."""
    if operation.attributes.get("boundaryCheck"):
        raise unsupported(operation, "a load through a block pointer")
    assert isinstance(pointer.type, Pointer)
    pointee = pointer.type.pointee
    assert isinstance(pointee, Scalar | Pointer)
    if rest and rest[0].op == "const" and rest[0].attr in (1, True):
        rest = []
    if len(rest) == 1:
        rest = [*rest, pointwise.literal(lowering.make, 0, pointee)]
    return lowering.make.make("load", pointee, (pointer, *rest), _site(lowering, operation))


def _site(lowering: Lowering, operation: Operation) -> Site:
    """One site for each load, however often its elements are computed."""
    if operation not in lowering.load_sites:
        lowering.load_sites[operation] = lowering.site(operation.location, operation.operands[0])
    return lowering.load_sites[operation]


_RULES: dict[str, Callable[[Lowering, Operation, Value, Index], Expr]] = {
    "arith.constant": _constant,
    "ub.poison": _poison,
    "tt.splat": _splat,
    "tt.broadcast": _broadcast,
    "tt.expand_dims": _expand_dims,
    "tt.reshape": _reshape,
    "tt.trans": _trans,
    "tt.join": _join,
    "tt.cat": _cat,
    "tt.split": _split,
    "tt.make_range": _make_range,
    "tt.gather": _gather,
    "tt.load": _load,
}


def _scalar_constant(lowering: Lowering, operation: Operation) -> None:
    found = pointwise.constant(lowering.make, operation)
    assert found is not None
    lowering.bindings[operation.result] = found


def _scalar_poison(lowering: Lowering, operation: Operation) -> None:
    lowering.bindings[operation.result] = pointwise.literal(lowering.make, 0, element_of(operation.result.type))


def _scalar_load(lowering: Lowering, operation: Operation) -> None:
    lowering.flush()
    pointer, *rest = (lowering.scalar(operand) for operand in operation.operands)
    lowering.let(operation.result, load(lowering, operation, pointer, rest))


def _unsplat(lowering: Lowering, operation: Operation) -> None:
    """The element of a tile that has only one."""
    source = operation.operands[0]
    assert isinstance(source.type, Tensor)
    buffer = lowering.stored(source)
    zero = lowering.make.const(0, I32)
    lowering.let(operation.result, lowering.make.make("element", buffer.element, (zero,), buffer))


def _program_id(lowering: Lowering, operation: Operation) -> None:
    lowering.bindings[operation.result] = lowering.make.var(f"pid{operation.attributes['axis']}", I32)


def _num_programs(lowering: Lowering, operation: Operation) -> None:
    lowering.bindings[operation.result] = lowering.make.var(f"grid{operation.attributes['axis']}", I32)


HANDLERS: dict[str, Callable[[Lowering, Operation], None]] = {
    "arith.constant": _scalar_constant,
    "ub.poison": _scalar_poison,
    "tt.load": _scalar_load,
    "tt.unsplat": _unsplat,
    "tt.get_program_id": _program_id,
    "tt.get_num_programs": _num_programs,
}
