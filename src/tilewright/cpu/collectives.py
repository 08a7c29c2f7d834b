"""Operations on whole tiles: reductions, scans, products, histograms, atomic operations, printing, assertions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.cpu import pointwise
from tilewright.cpu.diagnostics import unsupported
from tilewright.cpu.loops import (
    Assert,
    Atomic,
    Combine,
    Dot,
    Fold,
    Histogram,
    Print,
    Scan,
    Store,
    Write,
)  # fmt: skip
from tilewright.cpu.ttir import Operation
from tilewright.cpu.types import BF16, F16, F32, F64, I1, I8, I32, Tensor, element_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.cpu.expressions import Expr
    from tilewright.cpu.loops import Buffer, Sink
    from tilewright.cpu.lowering import Lowering
    from tilewright.cpu.ttir import Region, Value
    from tilewright.cpu.types import Element

    Index = tuple[Expr, ...]


def roots_of(sink: Sink) -> list[Expr]:
    """The expressions that a sink evaluates."""
    if isinstance(sink, Write):
        return [sink.value, sink.position]
    if isinstance(sink, Store):
        return [sink.pointer, sink.value, *([] if sink.mask is None else [sink.mask])]
    if isinstance(sink, Fold):
        return [*sink.values, sink.position]
    optional = [e for e in (sink.mask, sink.compare) if e is not None]
    return [sink.pointer, sink.value, sink.position, *optional]


# Reductions and scans


def combine_of(lowering: Lowering, operation: Operation) -> Combine:
    """The combine function of a reduction or a scan."""
    region = operation.regions[0]
    arguments = region.block.arguments
    half = len(arguments) // 2
    names = [lowering.name(hint) for hint in ["left"] * half + ["right"] * half]
    variables = [
        lowering.make.var(name, element_of(argument.type)) for name, argument in zip(names, arguments, strict=True)
    ]
    results = region_values(lowering, region, variables)
    left, right = variables[:half], variables[half:]
    identity = [_identity(lowering, *ends) for ends in zip(left, right, results, strict=True)]
    return Combine(left, right, results, [e for e in identity if e is not None] if all(identity) else None)


def region_values(lowering: Lowering, region: Region, arguments: Sequence[Expr]) -> list[Expr]:
    """What a region of scalar operations yields, as expressions of its arguments."""
    for argument, expression in zip(region.block.arguments, arguments, strict=True):
        lowering.bindings[argument] = expression
    for operation in region.block.operations[:-1]:
        if operation.name == "arith.constant":
            found = pointwise.constant(lowering.make, operation)
            assert found is not None
            lowering.bindings[operation.result] = found
        elif pointwise.is_pointwise(operation):
            args = [lowering.scalar(operand) for operand in operation.operands]
            lowering.bindings[operation.result] = pointwise.build(lowering.make, operation, args)
        elif operation.name == "scf.if":
            _choose(lowering, operation)
        else:
            raise unsupported(operation, f"{operation.name} in a combine function")
    return [lowering.scalar(value) for value in region.block.operations[-1].operands]


def _choose(lowering: Lowering, operation: Operation) -> None:
    """An ``scf.if`` in a combine function: both sides are free of effects, so both are computed and one is taken."""
    condition = lowering.scalar(operation.operands[0])
    sides = [region_values(lowering, region, []) for region in operation.regions]
    for result, yes, no in zip(operation.results, *sides, strict=True):
        lowering.bindings[result] = yes if yes is no else lowering.make.make("select", yes.type, (condition, yes, no))


def _identity(lowering: Lowering, left: Expr, right: Expr, result: Expr) -> Expr | None:
    """What changes nothing when combined, if the function is one of the known ones, which may also be reordered."""
    inner = result.args[0] if result.op == "fcast" and result.attr is None else result
    if set(inner.args) != {left, right} or len(inner.args) != 2:
        return None
    type_ = left.type
    if type_.is_int:
        low, high = (0, 1) if type_ == I1 else (-(1 << (type_.bits - 1)), (1 << (type_.bits - 1)) - 1)
        known = {
            "add": 0, "mul": 1, "or": 0, "xor": 0, "and": 1 if type_ == I1 else -1, "maxs": low, "mins": high,
            "maxu": 0, "minu": 1 if type_ == I1 else -1,
        }  # fmt: skip
        return lowering.make.const(known[inner.op], type_) if inner.op in known else None
    infinity = float("inf")
    known_floats = {
        "fadd": -0.0, "fmul": 1.0, "maxnum": float("nan"), "minnum": float("nan"), "maximum": -infinity,
        "minimum": infinity,
    }  # fmt: skip
    return lowering.make.const(known_floats[inner.op], type_) if inner.op in known_floats else None


def _reduce(lowering: Lowering, operation: Operation) -> None:
    axis: int = operation.attributes["axis"]
    shape = shape_of(operation.operands[0].type)
    rest = shape[:axis] + shape[axis + 1 :]
    combine = combine_of(lowering, operation)
    if shape[axis] == 1:
        _take(lowering, operation, axis)
        return
    targets: list[Buffer | str] = []
    for result in operation.results:
        element = element_of(result.type)
        targets.append(lowering.buffer(result.name, element, rest) if rest else lowering.name(result.name))

    def build(index: Index) -> list[Sink]:
        values = [lowering.element(operand, index) for operand in operation.operands]
        position = lowering.make.flat(index[:axis] + index[axis + 1 :], rest)
        return [Fold(sum(size > 1 for size in shape[:axis]), values, targets, position, combine)]

    lowering.sink(shape, build, alone=combine.identity is None)
    if combine.identity is None:
        lowering.out[-1].serial = True  # type: ignore[attr-defined]
    for result, target in zip(operation.results, targets, strict=True):
        if isinstance(target, str):
            lowering.bindings[result] = lowering.make.var(target, element_of(result.type))
            if lowering.open is not None:
                lowering.open.names.add(target)
        else:
            lowering.bindings[result] = target
            if lowering.open is not None:
                lowering.open.produced.setdefault(target, {})


def _take(lowering: Lowering, operation: Operation, axis: int) -> None:
    """A reduction of an axis of one element takes that element."""
    for operand, result in zip(operation.operands, operation.results, strict=True):
        buffer = lowering.stored(operand)
        if isinstance(result.type, Tensor):
            shape = shape_of(result.type)
            target = lowering.buffer(result.name, element_of(result.type), shape)

            def build(index: Index, source: Buffer = buffer, target: Buffer = target) -> list[Sink]:
                value = lowering.read(source, (*index[:axis], lowering.make.const(0, I32), *index[axis:]))
                return [Write(target, lowering.make.flat(index, target.shape), value)]

            lowering.sink(shape, build)
            lowering.bindings[result] = target
        else:
            first = lowering.make.make("element", buffer.element, (lowering.make.const(0, I32),), buffer)
            lowering.let(result, first)


def _scan(lowering: Lowering, operation: Operation) -> None:
    shape = shape_of(operation.operands[0].type)
    combine = combine_of(lowering, operation)
    buffers = [lowering.buffer(r.name, element_of(r.type), shape) for r in operation.results]
    for operand, buffer in zip(operation.operands, buffers, strict=True):
        lowering.write(buffer, operand)
    lowering.flush()
    reverse = bool(operation.attributes.get("reverse", False))
    lowering.out.append(Scan(shape, operation.attributes["axis"], reverse, buffers, combine))
    for result, buffer in zip(operation.results, buffers, strict=True):
        lowering.bindings[result] = buffer


# Products


def _dot(lowering: Lowering, operation: Operation) -> None:
    a, b, _ = operation.operands
    *batch, m, k = shape_of(a.type)
    n = shape_of(b.type)[-1]
    wide = element_of(operation.result.type)
    narrow = element_of(a.type)
    if narrow.is_int:
        compute: Element = narrow if narrow == I8 else I32
        if wide != I32 or narrow not in (I8, I32):
            raise unsupported(operation, f"a dot of {narrow} into {wide}")
    else:
        compute = F64 if narrow == F64 else F32
        if wide not in (F32, F64, F16) or (wide == F64) != (narrow == F64):
            raise unsupported(operation, f"a dot of {narrow} into {wide}")
    left, right = _operand(lowering, operation, a, compute), _operand(lowering, operation, b, compute)
    sizes = (batch[0] if batch else 1, m, n, k)
    _multiply(lowering, operation, left, right, sizes, pairs=narrow == BF16 and element_of(b.type) == BF16)


def _multiply(
    lowering: Lowering, operation: Operation, left: Buffer, right: Buffer, sizes: tuple[int, int, int, int], pairs: bool
) -> None:
    """The product of two stored tiles, added to the operation's third operand."""
    c, result = operation.operands[2], operation.result
    wide = element_of(result.type)
    zero = _is_zero(lowering, c)
    home = lowering.homes.get(operation)
    target = home or lowering.buffer(result.name, F32 if wide == F16 else wide, shape_of(result.type))
    if not zero:
        _start_from(lowering, target, c, home is not None)
    lowering.flush()
    lowering.out.append(Dot(left, right, target, *sizes, accumulate=not zero, pairs=pairs))
    if wide == F16:
        half = lowering.buffer(result.name, F16, shape_of(result.type))

        def build(index: Index) -> list[Sink]:
            e = lowering.make.make("fcast", F16, (lowering.read(target, index),))
            return [Write(half, lowering.make.flat(index, half.shape), e)]

        lowering.sink(half.shape, build)
        target = half
    lowering.bindings[result] = target


_E2M1 = 4
"""Triton's number for pairs of 4-bit floats in a byte."""


def _dot_scaled(lowering: Lowering, operation: Operation) -> None:
    """A product of tiles with a power of two for each group along k, which multiplies the elements exactly."""
    attributes = operation.attributes
    a, b, c, *rest = operation.operands
    has_a, has_b = attributes["operandSegmentSizes"][3:]
    a_scale = rest.pop(0) if has_a else None
    b_scale = rest.pop(0) if has_b else None
    *batch, m, n = shape_of(c.type)
    packed = attributes["a_elem_type"] == _E2M1, attributes["b_elem_type"] == _E2M1
    k = shape_of(a.type)[-1] * (2 if packed[0] and attributes["lhs_k_pack"] else 1)
    left = _scaled(lowering, a, a_scale, (*batch, m, k), -1, packed[0] and (-1 if attributes["lhs_k_pack"] else -2))
    right = _scaled(lowering, b, b_scale, (*batch, k, n), -2, packed[1] and (-2 if attributes["rhs_k_pack"] else -1))
    _multiply(lowering, operation, left, right, (batch[0] if batch else 1, m, n, k), pairs=False)


def _scaled(
    lowering: Lowering, value: Value, scale: Value | None, shape: tuple[int, ...], k_axis: int, packed: int | bool
) -> Buffer:
    """An operand as fp32, its elements times their groups' scales.

    Args:
        lowering: the kernel's.
        value: the elements.
        scale: the exponents of the groups along k, their axis of k last; None for none.
        shape: the operand's shape.
        k_axis: its axis of k, from the end.
        packed: the axis, from the end, along which bytes hold two elements; False if they hold one.
    """
    make = lowering.make
    target = lowering.buffer(value.name, F32, shape)
    group = 1 if scale is None else shape[k_axis] // shape_of(scale.type)[-1]

    def shifted(index: Index, axis: int, bits: int) -> Index:
        at = list(index)
        at[axis] = make.int_op("shru", at[axis], make.const(bits, I32))
        return tuple(at)

    def build(index: Index) -> list[Sink]:
        if packed:
            byte = lowering.element(value, shifted(index, packed, 1))
            half = make.int_op("and", index[packed], make.const(1, I32))
            e = make.make("call", F32, (byte, half), "tw_bits_e2m1")
        else:
            e = make.make("fcast", F32, (lowering.element(value, index),))
        if scale is not None:
            at = shifted(index, k_axis, group.bit_length() - 1)
            if k_axis == -2:  # the scales of the right operand lie as [n, groups]
                at = (*at[:-2], at[-1], at[-2])
            power = make.make("call", F32, (lowering.element(scale, at),), "tw_bits_e8m0")
            e = make.make("fmul", F32, (e, power))
        return [Write(target, make.flat(index, shape), e)]

    lowering.sink(shape, build)
    lowering.flush()
    return target


def _operand(lowering: Lowering, operation: Operation, value: Value, compute: Element) -> Buffer:
    """An operand of a product in memory, converted to the type that is multiplied in.

    Small floats lie in buffers as fp32 anyway.
    """
    own = element_of(value.type)
    buffer = lowering.stored(value, None if own.is_small_float or own == compute else compute)
    same_block = isinstance(value.owner, Operation) and value.owner in lowering.facts.block_of
    if same_block and lowering.facts.block_of[value.owner] is lowering.facts.block_of.get(operation):  # type: ignore[index]
        lowering.bindings.setdefault(value, buffer)
    return buffer


def _is_zero(lowering: Lowering, value: Value) -> bool:
    owner = value.owner
    if not isinstance(owner, Operation) or owner.name != "arith.constant" or value in lowering.facts.stored:
        return False
    found = pointwise.constant(lowering.make, owner)
    return found is not None and found.attr == 0


def _start_from(lowering: Lowering, target: Buffer, c: Value, is_home: bool) -> None:
    """Fill the accumulator; one that a loop carries may hold the right values already."""
    if is_home:
        lowering.flush()
        if lowering.bindings.get(c) is target:
            return

    def build(index: Index) -> list[Sink]:
        position = lowering.make.flat(index, target.shape)
        e = lowering.element(c, index)
        if e.type != target.element:
            e = lowering.make.make("fcast", target.element, (e,))
        return [Write(target, position, e)]

    lowering.sink(target.shape, build)


# Others


def _histogram(lowering: Lowering, operation: Operation) -> None:
    values = lowering.stored(operation.operands[0])
    mask = lowering.stored(operation.operands[1]) if len(operation.operands) > 1 else None
    bins = lowering.buffer(operation.result.name, element_of(operation.result.type), shape_of(operation.result.type))
    lowering.out.append(Histogram(values, mask, bins))
    lowering.bindings[operation.result] = bins


# The numbers of Triton's RMWOp.
_ATOMICS = {
    1: "and", 2: "or", 3: "xor", 4: "add", 5: "fadd", 6: "max", 7: "min", 8: "umax", 9: "umin", 10: "exchange",
}  # fmt: skip


def _atomic(lowering: Lowering, operation: Operation) -> None:
    pointer, *rest = operation.operands
    compare = rest.pop(0) if operation.name == "tt.atomic_cas" else None
    value = None if operation.name == "tt.atomic_load" else rest.pop(0)
    mask = rest.pop(0) if rest else None
    named = {"tt.atomic_cas": "compare", "tt.atomic_load": "load", "tt.atomic_store": "exchange"}
    kind = named.get(operation.name) or _ATOMICS.get(operation.attributes["atomic_rmw_op"])
    if kind is None:
        raise unsupported(operation, "this atomic operation")
    element = element_of(operation.results[0].type if value is None else value.type)
    if element.is_float and element.bits < 16:
        raise unsupported(operation, f"atomic operations on {element}")
    if element.bits < 16 or (kind in {"max", "min"} and element.is_small_float):
        raise unsupported(operation, f"atomic {kind} on {element}")
    site = lowering.site(operation.location, pointer)
    shape = shape_of(pointer.type)
    result = operation.results[0] if operation.results else None
    target: Buffer | str | None = None
    if result is not None and lowering.facts.uses.get(result):
        target = lowering.buffer(result.name, element, shape) if shape else lowering.name(result.name)

    def build(index: Index) -> list[Sink]:
        def at(operand: Value) -> Expr:
            return lowering.element(operand, index)

        operand = pointwise.literal(lowering.make, 0, element) if value is None else at(value)
        when = None if mask is None else at(mask)
        expected = None if compare is None else at(compare)
        return [Atomic(kind, at(pointer), operand, when, expected, target, lowering.make.flat(index, shape), site)]

    lowering.sink(shape, build, alone=True)
    if result is None:
        return
    if isinstance(target, str):
        lowering.bindings[result] = lowering.make.var(target, element)
    elif target is not None:
        lowering.bindings[result] = target


def _print(lowering: Lowering, operation: Operation) -> None:
    signed = operation.attributes.get("isSigned") or [1] * len(operation.operands)
    values: list[tuple[Buffer | Expr, bool]] = []
    for operand, is_signed in zip(operation.operands, signed, strict=True):
        tile = isinstance(operand.type, Tensor)
        values.append((lowering.stored(operand) if tile else lowering.scalar(operand), bool(is_signed)))
    lowering.flush()
    hexadecimal = bool(operation.attributes.get("hex", False))
    lowering.out.append(Print(operation.attributes.get("prefix", ""), values, hexadecimal))


def _assert(lowering: Lowering, operation: Operation) -> None:
    condition = operation.operands[0]
    tile = isinstance(condition.type, Tensor)
    value = lowering.stored(condition) if tile else lowering.scalar(condition)
    lowering.flush()
    message = operation.attributes.get("message", "")
    lowering.out.append(Assert(value, message, lowering.site(operation.location)))


def _nothing(lowering: Lowering, operation: Operation) -> None:
    """A program runs on one thread: there is nothing to wait for; hints to optimisers are not needed."""


HANDLERS: dict[str, Callable[[Lowering, Operation], None]] = {
    "tt.reduce": _reduce,
    "tt.scan": _scan,
    "tt.dot": _dot,
    "tt.dot_scaled": _dot_scaled,
    "tt.histogram": _histogram,
    "tt.atomic_rmw": _atomic,
    "tt.atomic_cas": _atomic,
    "tt.atomic_load": _atomic,
    "tt.atomic_store": _atomic,
    "tt.print": _print,
    "tt.assert": _assert,
    "gpu.barrier": _nothing,
    "ttg.barrier": _nothing,
    "ttg.local_barrier": _nothing,
    "llvm.intr.assume": _nothing,
}
