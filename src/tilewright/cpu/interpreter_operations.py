"""Operations of the interpreter that are functions of their operands: arithmetic, conversions, shapes, ``tt.dot``.

A value of tile shape ``shape`` is a tensor that broadcasts to ``(programs, *shape)``: what is the same for all programs
or along an axis has size 1 there, and is computed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.cpu import interpreter_numerics as numerics
from tilewright.cpu.diagnostics import unsupported
from tilewright.cpu.interpreter_libdevice import FUNCTIONS, LIBRARY
from tilewright.cpu.ttir import Bits, Dense
from tilewright.cpu.types import Element, Opaque, Pointer, element_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tilewright.cpu.ttir import Operation

    Apply = Callable[[Operation, Sequence[Tensor]], Tensor | list[Tensor]]


def broadcast(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A value with its tile's shape written out; programs may still share it."""
    return x.expand(x.shape[0], *shape)


def together(operation: Operation, operands: Sequence[Tensor]) -> list[Tensor]:
    """Operands with their tiles' shapes written out, for the same number of programs."""
    lead = max(x.shape[0] for x in operands)
    return [x.expand(lead, *shape_of(v.type)) for v, x in zip(operation.operands, operands, strict=True)]


def _source(operation: Operation) -> Element:
    return element_of(operation.operands[0].type)


def _target(operation: Operation) -> Element:
    return element_of(operation.result.type)


def _float(compute: Callable[..., Tensor]) -> Apply:
    """An operation on floating point numbers that ``compute`` rounds once, as IEEE 754 asks."""

    def apply(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
        element = _source(operation)
        return numerics.narrow(compute(*(numerics.widen(x, element) for x in operands)), element)

    return apply


def _function(compute: Callable[..., Tensor]) -> Apply:
    """A function that is computed in f64 and rounded."""

    def apply(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
        element = _source(operation)
        wide = [numerics.widen(x, element).to(torch.float64) for x in operands]
        return numerics.narrow(compute(*wide), element)

    return apply


def _int(compute: Callable[..., Tensor]) -> Apply:
    """An operation on integers; ``compute`` may give more bits than the type has."""

    def apply(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
        dtype = operands[0].dtype
        return numerics.shrink(compute(*(numerics.signed(x) for x in operands)), dtype)

    return apply


def _raw(compute: Callable[..., Tensor]) -> Apply:
    """An operation on values as they are held."""

    def apply(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
        return compute(*operands)

    return apply


# Arithmetic


def _compare_floats(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    element = _source(operation)
    a, b = (numerics.widen(x, element) for x in operands)
    compare: Callable[[Tensor, Tensor], Tensor] = numerics.COMPARE_FLOATS[operation.attributes["predicate"]]
    return compare(a, b)


def _compare_ints(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    compare: Callable[[Tensor, Tensor], Tensor] = numerics.COMPARE_INTS[operation.attributes["predicate"]]
    return compare(operands[0], operands[1])


def _fma(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    a, b, c = operands
    return numerics.fma(a, b, c, _source(operation))


def _square_root(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    return numerics.square_root(operands[0], _source(operation))


def _clamp(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    element = _source(operation)
    x, low, high = (numerics.widen(value, element) for value in operands)
    bounded = numerics.min_number(numerics.max_number(x, low), high)
    if operation.attributes.get("propagateNan", 0):
        bounded = torch.where(x.isnan(), x, bounded)
    return numerics.narrow(bounded, element)


def _select(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    condition, a, b = operands
    condition = condition.reshape(*condition.shape, *[1] * (a.dim() - condition.dim()))
    return torch.where(condition, a, b)


def _multiply_extended(operation: Operation, operands: Sequence[Tensor]) -> list[Tensor]:
    a, b = operands
    high = numerics.multiply_high if operation.name == "arith.mului_extended" else numerics.multiply_high_signed
    return [a * b, high(a, b)]


def _add_extended(operation: Operation, operands: Sequence[Tensor]) -> list[Tensor]:
    a, b = operands
    total = numerics.shrink(numerics.signed(a) + numerics.signed(b), a.dtype)
    return [total, numerics.unsigned_less(total, a)]


def _floor_divide(a: Tensor, b: Tensor) -> Tensor:
    quotient, rest = numerics.divide(a, b)
    return quotient - ((rest != 0) & ((rest < 0) != (b < 0)) & (b != 0)).to(quotient.dtype)


def _ceil_divide(a: Tensor, b: Tensor) -> Tensor:
    quotient, rest = numerics.divide(a, b)
    return quotient + ((rest != 0) & ((rest < 0) == (b < 0)) & (b != 0)).to(quotient.dtype)


def _ceil_divide_unsigned(a: Tensor, b: Tensor) -> Tensor:
    quotient, rest = numerics.divide_unsigned(a, b)
    return quotient + ((rest != 0) & (b != 0)).to(quotient.dtype)


def _unsigned_max(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(numerics.unsigned_less(a, b), b, a)


def _unsigned_min(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(numerics.unsigned_less(b, a), b, a)


# Conversions


def _convert_float(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    wide = numerics.widen(operands[0], _source(operation))
    rounding = operation.attributes.get("rounding")  # of tt.fp_to_fp
    named = operation.attributes.get("roundingmode", 0)  # of arith.truncf
    if rounding == 0 or named == 3:
        return numerics.narrow_towards_zero(wide, _target(operation))
    if rounding not in {None, 1} or named:
        raise unsupported(operation, f"the rounding mode {rounding if named == 0 else named}")
    return numerics.narrow(wide, _target(operation))


def _to_float(is_signed: bool) -> Apply:
    def apply(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
        return numerics.int_to_float(operands[0], _target(operation), is_signed=is_signed)

    return apply


def _to_int(is_signed: bool) -> Apply:
    def apply(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
        bits = _target(operation).bits
        return numerics.float_to_int(operands[0], _source(operation), bits, is_signed=is_signed)

    return apply


def _resize(extend: Callable[[Tensor], Tensor]) -> Apply:
    def apply(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
        return numerics.shrink(extend(operands[0]), numerics.held_dtype(_target(operation)))

    return apply


def _bitcast(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    source, target = _source(operation), _target(operation)
    if source.bits != target.bits:
        raise unsupported(operation, f"a bitcast from {source} to {target}")
    return numerics.reinterpret(operands[0], source, target)


def _add_pointer(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    pointer = _target(operation)
    assert isinstance(pointer, Pointer)
    if not hasattr(pointer.pointee, "bytes"):
        raise unsupported(operation, "arithmetic on a block pointer")
    return operands[0] + operands[1].to(torch.int64) * pointer.pointee.bytes


# Constants


def _constant(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    value, type_ = operation.attributes["value"], operation.result.type
    if isinstance(type_, Opaque):
        raise unsupported(operation, f"a constant of type {type_}")
    element, rank = element_of(type_), len(shape_of(type_))

    def one(number: Any) -> Tensor:
        return (
            numerics.from_pattern(number.pattern, element)
            if isinstance(number, Bits)
            else numerics.constant(number, element)
        )

    if isinstance(value, Dense):
        if not value.splat:
            return torch.cat([one(number) for number in value.values]).reshape(1, *shape_of(type_))
        value = value.values
    return one(value).reshape(1, *[1] * rank)


def _poison(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    rank = len(shape_of(operation.result.type))
    return torch.zeros([1] * (1 + rank), dtype=numerics.held_dtype(_target(operation)), device=numerics.CPU)


def _make_range(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    start, end = operation.attributes["start"], operation.attributes["end"]
    return torch.arange(start, end, dtype=torch.int32, device=numerics.CPU)[None]


# Shapes


def _splat(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    return operands[0].reshape(-1, *[1] * len(shape_of(operation.result.type)))


def _expand_dims(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    return operands[0].unsqueeze(operation.attributes["axis"] + 1)


def _reshape(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    (x,) = together(operation, operands)
    return x.reshape(x.shape[0], *shape_of(operation.result.type))


def _transpose(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    return operands[0].permute(0, *(axis + 1 for axis in operation.attributes["order"]))


def _concatenate(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    return torch.cat(together(operation, operands), dim=1)


def _join(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    return torch.stack(together(operation, operands), dim=-1)


def _split(operation: Operation, operands: Sequence[Tensor]) -> list[Tensor]:
    (x,) = together(operation, operands)
    return [x[..., 0], x[..., 1]]


def _gather(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    source, index = together(operation, operands)
    axis = operation.attributes["axis"] + 1
    return torch.gather(source, axis, index.to(torch.int64) % source.shape[axis])


def _histogram(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    source, *masks = (x.to(torch.int64) for x in together(operation, operands))
    (bins,) = shape_of(operation.result.type)
    counted = (source >= 0) & (source < bins)
    for mask in masks:
        counted = counted & (mask != 0)
    counts = torch.zeros(source.shape[0], bins, dtype=torch.int64, device=numerics.CPU)
    counts.scatter_add_(1, torch.where(counted, source, 0), counted.to(torch.int64))
    return counts.to(numerics.held_dtype(_target(operation)))


def _dot(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    """Products and sums of floating point numbers are accumulated in f64 and rounded once; integers wrap."""
    a, b, c = (broadcast(x, shape_of(v.type)) for v, x in zip(operation.operands, operands, strict=True))
    element = _target(operation)
    if element.is_float:
        left, right = (
            numerics.widen(x, element_of(v.type)).to(torch.float64)
            for v, x in zip(operation.operands, (a, b), strict=False)
        )
        return numerics.narrow(left @ right + numerics.widen(c, element).to(torch.float64), element)
    if a.dtype == torch.int8:  # exact in f64, whose matrix product is fast
        product = (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int64)
    else:
        product = a.to(torch.int64) @ b.to(torch.int64)
    return numerics.shrink(product + c, c.dtype)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _dot_scaled(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    """A product whose operands are scaled by a power of two per group along k, accumulated in f64 and rounded once."""
    attributes = operation.attributes
    values = [broadcast(x, shape_of(v.type)) for v, x in zip(operation.operands, operands, strict=True)]
    types = [element_of(v.type) for v in operation.operands]
    has_left, has_right = attributes["operandSegmentSizes"][3:]
    scales = values[3:]
    packed = attributes["a_elem_type"] == 4, attributes["b_elem_type"] == 4
    left = _elements(values[0], types[0], packed[0] and (-1 if attributes["lhs_k_pack"] else -2))
    right = _elements(values[1], types[1], packed[1] and (-2 if attributes["rhs_k_pack"] else -1))
    if has_left:
        left = left * _powers(scales[0], left.shape[-1])
    if has_right:
        right = right * _powers(scales[-1], right.shape[-2]).transpose(-1, -2)
    total = numerics.widen(values[2], types[2]).to(torch.float64)
    return numerics.narrow(left @ right + total, types[2])


def _elements(x: Tensor, element: Element, axis: int | bool) -> Tensor:
    """Elements as f64; bytes that hold two 4-bit floats are taken apart along ``axis``, the low half first."""
    if not axis:
        return numerics.widen(x, element).to(torch.float64)
    table = torch.tensor(_E2M1, dtype=torch.float64)
    codes = x.to(torch.int64) & 0xFF
    halves = torch.stack((table[codes & 15], table[codes >> 4]), dim=-1)
    if axis == -1:
        return halves.flatten(-2)
    return halves.transpose(-1, -2).flatten(-3, -2)


def _powers(scale: Tensor, size: int) -> Tensor:
    """Exponents of groups as powers of two for ``size`` elements; 255 is NaN."""
    codes = scale.to(torch.int64) & 0xFF
    powers = torch.ldexp(torch.ones_like(codes, dtype=torch.float64), codes - 127)
    powers = torch.where(codes == 255, torch.nan, powers)
    return powers.repeat_interleave(size // scale.shape[-1], dim=-1)


def _external(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    symbol: str = operation.attributes.get("symbol", "")
    if symbol not in LIBRARY:
        raise unsupported(operation, f"the library function {symbol!r}")
    values = [
        numerics.widen(x, element_of(v.type)).to(torch.float64) if element_of(v.type).is_float else x
        for v, x in zip(operation.operands, operands, strict=True)
    ]
    found, target = LIBRARY[symbol](*values), _target(operation)
    return numerics.narrow(found, target) if target.is_float else found.to(numerics.held_dtype(target))


def _same(operation: Operation, operands: Sequence[Tensor]) -> Tensor:
    return operands[0]


_FLOATING: dict[str, Apply] = {
    "arith.addf": _float(torch.add),
    "arith.subf": _float(torch.sub),
    "arith.mulf": _float(torch.mul),
    "arith.divf": _float(torch.div),
    "arith.remf": _function(numerics.remainder),
    "arith.negf": _float(torch.neg),
    "arith.maxnumf": _float(numerics.max_number),
    "arith.minnumf": _float(numerics.min_number),
    "arith.maximumf": _float(torch.maximum),
    "arith.minimumf": _float(torch.minimum),
    "tt.precise_divf": _float(torch.div),
    "tt.precise_sqrt": _square_root,
    "math.sqrt": _square_root,
    "math.absf": _float(torch.abs),
    "math.floor": _float(torch.floor),
    "math.ceil": _float(torch.ceil),
    "math.trunc": _float(torch.trunc),
    "math.roundeven": _float(torch.round),
    "math.round": _float(numerics.round_half_away),
    "math.copysign": _float(torch.copysign),
    "math.powf": _function(torch.pow),
    "math.fma": _fma,
    "arith.cmpf": _compare_floats,
    "tt.clampf": _clamp,
} | {f"math.{name}": _function(compute) for name, compute in FUNCTIONS.items()}

_INTEGER: dict[str, Apply] = {
    "arith.addi": _int(torch.add),
    "arith.subi": _int(torch.sub),
    "arith.muli": _int(torch.mul),
    "arith.divsi": _raw(lambda a, b: numerics.divide(a, b)[0]),
    "arith.remsi": _raw(lambda a, b: numerics.divide(a, b)[1]),
    "arith.divui": _raw(lambda a, b: numerics.divide_unsigned(a, b)[0]),
    "arith.remui": _raw(lambda a, b: numerics.divide_unsigned(a, b)[1]),
    "arith.floordivsi": _raw(_floor_divide),
    "arith.ceildivsi": _raw(_ceil_divide),
    "arith.ceildivui": _raw(_ceil_divide_unsigned),
    "arith.andi": _raw(torch.bitwise_and),
    "arith.ori": _raw(torch.bitwise_or),
    "arith.xori": _raw(torch.bitwise_xor),
    "arith.shli": _raw(numerics.shift_left),
    "arith.shrsi": _raw(numerics.shift_right_signed),
    "arith.shrui": _raw(numerics.shift_right_unsigned),
    "arith.maxsi": _int(torch.maximum),
    "arith.minsi": _int(torch.minimum),
    "arith.maxui": _raw(_unsigned_max),
    "arith.minui": _raw(_unsigned_min),
    "arith.addui_extended": _add_extended,
    "arith.mului_extended": _multiply_extended,
    "arith.mulsi_extended": _multiply_extended,
    "arith.cmpi": _compare_ints,
    "math.absi": _int(torch.abs),
    "math.ctlz": _raw(numerics.leading_zeros),
    "math.cttz": _raw(numerics.trailing_zeros),
    "math.ctpop": _raw(numerics.population_count),
    "tt.mulhiui": _raw(numerics.multiply_high),
}

_CONVERSIONS: dict[str, Apply] = {
    "arith.extf": _convert_float,
    "arith.truncf": _convert_float,
    "tt.fp_to_fp": _convert_float,
    "arith.sitofp": _to_float(True),
    "arith.uitofp": _to_float(False),
    "arith.fptosi": _to_int(True),
    "arith.fptoui": _to_int(False),
    "arith.extsi": _resize(numerics.signed),
    "arith.extui": _resize(numerics.unsigned),
    "arith.trunci": _resize(numerics.signed),
    "arith.index_cast": _resize(numerics.signed),
    "arith.index_castui": _resize(numerics.unsigned),
    "arith.bitcast": _bitcast,
    "tt.bitcast": _bitcast,
    "tt.int_to_ptr": _same,
    "tt.ptr_to_int": _same,
    "tt.addptr": _add_pointer,
}

_SHAPES: dict[str, Apply] = {
    "arith.constant": _constant,
    "ub.poison": _poison,
    "tt.make_range": _make_range,
    "tt.splat": _splat,
    "tt.unsplat": lambda operation, operands: operands[0].reshape(-1),
    "tt.broadcast": _same,
    "tt.expand_dims": _expand_dims,
    "tt.reshape": _reshape,
    "tt.trans": _transpose,
    "tt.cat": _concatenate,
    "tt.join": _join,
    "tt.split": _split,
    "tt.gather": _gather,
    "tt.histogram": _histogram,
    "tt.dot": _dot,
    "tt.dot_scaled": _dot_scaled,
    "arith.select": _select,
    "tt.extern_elementwise": _external,
}

OPERATIONS: dict[str, Apply] = _FLOATING | _INTEGER | _CONVERSIONS | _SHAPES
"""By name, for operations whose results depend on nothing but their operands."""
