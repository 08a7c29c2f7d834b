"""Exact scalar arithmetic on torch tensors, as the interpreter of the CPU target needs it.

torch has few kernels for unsigned integers, rounds some conversions twice and lets others overflow. Here every
operation is rounded once, to nearest even, and integers wrap. A value is held in the torch dtype of its element type,
except that an fp8 value is held as its byte and a pointer as an int64 address.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from tilewright.cpu.types import Element, Pointer, Scalar

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CPU = torch.device("cpu")
_FP8 = {"f8E4M3FN": torch.float8_e4m3fn, "f8E5M2": torch.float8_e5m2}
_FP8_LARGEST = {"f8E4M3FN": 448.0, "f8E5M2": 57344.0}
_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
_INTS = {1: torch.bool, 8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def held_dtype(element: Element) -> torch.dtype:
    """The dtype in which values of a type are held."""
    if isinstance(element, Pointer):
        return torch.int64
    if element.name in _FP8:
        return torch.uint8
    return _FLOATS[element.name] if element.is_float else _INTS[element.bits]


def constant(value: float | int | bool, element: Element) -> Tensor:
    """A number as a held value of one element; integers wrap."""
    if isinstance(element, Scalar) and element.is_float:
        return narrow(torch.tensor([value], dtype=torch.float64, device=CPU), element)
    if element.bits == 1:
        return torch.tensor([bool(int(value) & 1)], device=CPU)
    return torch.tensor([wrapped(int(value), element.bits)], dtype=held_dtype(element), device=CPU)


def wrapped(value: int, bits: int) -> int:
    """``value`` in two's complement of ``bits`` bits."""
    half = 1 << (bits - 1)
    return ((value + half) & (2 * half - 1)) - half


def from_pattern(pattern: int, element: Element) -> Tensor:
    """A held value of one element from its bit pattern."""
    dtype = held_dtype(element)
    if dtype == torch.uint8:
        return torch.tensor([pattern], dtype=dtype, device=CPU)
    return torch.tensor([wrapped(pattern, element.bits)], dtype=_INTS[element.bits], device=CPU).view(dtype)


def reinterpret(x: Tensor, source: Element, target: Element) -> Tensor:
    """The same bits as another type of the same width."""
    if 1 in {source.bits, target.bits} or held_dtype(source) == held_dtype(target):
        return x
    return x.view(held_dtype(target))


# Floating point: rounding


def widen(x: Tensor, element: Element) -> Tensor:
    """A held floating point value in the dtype that its arithmetic is done in: f64 for f64, otherwise f32. Exact."""
    name = str(element)
    if name in _FP8:
        return x.view(_FP8[name]).to(torch.float32)
    return x.to(torch.float32) if x.dtype in {torch.float16, torch.bfloat16} else x


def narrow(x: Tensor, element: Element) -> Tensor:
    """Round an f32 or f64 tensor to a type, once and to nearest even; fp8 saturates, infinity too."""
    name = str(element)
    if name in {"f32", "f64"}:
        return x.to(_FLOATS[name])
    if x.dtype == torch.float64:
        x = _round_to_odd(x)
    if name in _FP8:
        largest = _FP8_LARGEST[name]
        return x.clamp(-largest, largest).to(_FP8[name]).view(torch.uint8)
    return x.to(_FLOATS[name])


def _round_to_odd(x: Tensor) -> Tensor:
    """f64 to f32 such that rounding the result again gives what rounding ``x`` would: inexact results become odd."""
    rounded = x.to(torch.float32)
    back = rounded.to(torch.float64)
    bits = rounded.view(torch.int32) - (back.abs() > x.abs()).to(torch.int32)
    return (bits | (back != x).to(torch.int32)).view(torch.float32)


def narrow_towards_zero(x: Tensor, element: Element) -> Tensor:
    """Round an f32 or f64 tensor to a narrower type towards zero. Infinity stays infinity where the type has one."""
    nearest = narrow(x, element)
    too_far = widen(nearest, element).to(torch.float64).abs() > x.to(torch.float64).abs()
    if nearest.dtype == torch.uint8:
        beyond = x.isinf() if str(element) == "f8E5M2" else torch.zeros_like(too_far)
        return nearest - too_far.to(torch.uint8) + beyond.to(torch.uint8)  # the next code is infinity
    bits = nearest.view(_INTS[element.bits])
    return (bits - too_far.to(bits.dtype)).view(nearest.dtype)


def by_element(compute: Callable[..., float]) -> Callable[..., Tensor]:
    """A function of Python floats for f64 tensors, for what torch gets wrong or lacks; NaN outside of its domain."""

    def one(*numbers: float) -> float:
        try:
            return compute(*numbers)
        except ValueError:
            return math.nan

    def apply(*operands: Tensor) -> Tensor:
        shape = tuple(map(max, zip(*(x.shape for x in operands), strict=True)))
        columns = [x.expand(shape).reshape(-1).tolist() for x in operands]
        return torch.tensor(list(map(one, *columns)), dtype=torch.float64, device=CPU).reshape(shape)

    return apply


remainder = by_element(math.fmod)
"""C's ``fmod`` for f64 tensors. It is exact; torch's is not where the quotient is large."""

_exact_root = by_element(math.sqrt)


def square_root(x: Tensor, element: Element) -> Tensor:
    """The nearest to the square root, which torch's vectorised one sometimes misses."""
    wide = widen(x, element).to(torch.float64)
    # Half way between two f32 or narrower numbers lies no root, nor so near that an error in f64 could matter.
    return narrow(_exact_root(wide) if str(element) == "f64" else wide.sqrt(), element)


def _add_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """The f64 sum rounded to odd: where it is inexact, the neighbour with an odd last bit."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(torch.int64)
    away = (error > 0) == (total > 0)
    step = torch.where(away, 1, -1)
    move = (error != 0) & ((bits & 1) == 0) & total.isfinite()
    return torch.where(move, bits + step, bits).view(torch.float64)


def exact_fma(a: float, b: float, c: float) -> float:
    """``a * b + c``, rounded once to f64."""
    plain = a * b + c
    if not (math.isfinite(a) and math.isfinite(b)):
        return plain
    if not math.isfinite(c):  # the product may overflow to the other infinity
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if not exact:  # plain has the right sign
        return plain
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def fma(a: Tensor, b: Tensor, c: Tensor, element: Element) -> Tensor:
    """``a * b + c`` of held values, rounded once."""
    a, b, c = (widen(x, element).to(torch.float64) for x in (a, b, c))
    if str(element) == "f64":
        return by_element(exact_fma)(a, b, c)
    return narrow(_add_to_odd(a * b, c), element)  # the product of two f32 is exact in f64


def max_number(a: Tensor, b: Tensor) -> Tensor:
    """The larger one; of a NaN, signalling ones included, and a number the number."""
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.maximum(a, b)))


def min_number(a: Tensor, b: Tensor) -> Tensor:
    """The smaller one; of a NaN, signalling ones included, and a number the number."""
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.minimum(a, b)))


def round_half_away(x: Tensor) -> Tensor:
    """The nearest integer, of two the one farther from zero, as C's ``round``."""
    whole = x.trunc()
    return (whole + torch.where((x - whole).abs() >= 0.5, x.sign(), 0)).copysign(x)


# Integers: the unsigned view of held values


def signed(x: Tensor) -> Tensor:
    """A truth value as the integer of one bit that it is: 0 or -1. Others as they are."""
    return -x.to(torch.int8) if x.dtype == torch.bool else x


def unsigned(x: Tensor) -> Tensor:
    """The value in int64 if the type has fewer than 64 bits. Integers of 64 bits come back unchanged."""
    if x.dtype == torch.bool:
        return x.to(torch.int64)
    if x.dtype == torch.int64:
        return x
    return x.to(torch.int64) & ((1 << (8 * x.itemsize)) - 1)


def shrink(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep the low bits."""
    return (x & 1).to(torch.bool) if dtype == torch.bool else x.to(dtype)


def _sortable(x: Tensor) -> Tensor:
    """Integers whose signed order is the unsigned order of ``x``."""
    return x ^ torch.iinfo(torch.int64).min if x.dtype == torch.int64 else unsigned(x)


def unsigned_less(a: Tensor, b: Tensor) -> Tensor:
    """``a < b`` without sign."""
    return _sortable(a) < _sortable(b)


def shift_right_unsigned(x: Tensor, by: Tensor) -> Tensor:
    """Shift zeros in; by the width or more gives 0."""
    bits = 1 if x.dtype == torch.bool else 8 * x.itemsize
    amount = unsigned(by)
    good = (amount >= 0) & (amount < bits)
    amount = torch.where(good, amount, 0)
    shifted = unsigned(x) >> amount
    if bits == 64:  # the sign came in
        shifted = torch.where(amount == 0, shifted, shifted & ~(-1 << (64 - amount).clamp(max=63)))
    return shrink(torch.where(good, shifted, 0), x.dtype)


def _without_sign(x: Tensor, by: int) -> Tensor:
    """Shift an int64 tensor right by a number from 1 to 63, zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def shift_left(x: Tensor, by: Tensor) -> Tensor:
    """Shift; by the width or more gives 0."""
    bits = 1 if x.dtype == torch.bool else 8 * x.itemsize
    amount = unsigned(by)
    good = (amount >= 0) & (amount < bits)
    return shrink(torch.where(good, unsigned(x) << torch.where(good, amount, 0), 0), x.dtype)


def shift_right_signed(x: Tensor, by: Tensor) -> Tensor:
    """Shift the sign in; by the width or more gives the sign."""
    bits = 1 if x.dtype == torch.bool else 8 * x.itemsize
    amount = unsigned(by)
    amount = torch.where((amount >= 0) & (amount < bits), amount, bits - 1)
    return shrink(signed(x).to(torch.int64) >> amount, x.dtype)


def divide(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Signed quotient, rounded towards zero, and remainder; by zero they are -1 and ``a``."""
    dtype = a.dtype
    a, b = signed(a), signed(b)
    # The processor traps where the divisor is zero and where the quotient overflows.
    negate, safe = b == -1, torch.where((b == 0) | (b == -1), 1, b)
    quotient = torch.div(a, safe, rounding_mode="trunc")
    quotient = torch.where(negate, -a, torch.where(b == 0, -1, quotient)).to(a.dtype)
    return shrink(quotient, dtype), shrink(a - quotient * b, dtype)


def divide_unsigned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Unsigned quotient and remainder; by zero they are the largest number and ``a``."""
    dtype = a.dtype
    x, y = unsigned(a), unsigned(b)
    safe = torch.where(y > 0, y, 1)
    if dtype == torch.int64:
        # Halve, divide, double: at most one short. A divisor with its top bit set goes in once or not at all.
        quotient = torch.div(_without_sign(x, 1), safe, rounding_mode="trunc") << 1
        rest = x - quotient * safe
        quotient = quotient + (~unsigned_less(rest, safe)).to(torch.int64)
        quotient = torch.where(y < 0, (~unsigned_less(x, y)).to(torch.int64), quotient)
    else:
        quotient = torch.div(x, safe, rounding_mode="trunc")
    quotient = torch.where(y == 0, -1, quotient)
    return shrink(quotient, dtype), shrink(x - quotient * y, dtype)


def multiply_high(a: Tensor, b: Tensor) -> Tensor:
    """The upper half of the unsigned product."""
    dtype, bits = a.dtype, 8 * a.itemsize
    x, y = unsigned(a), unsigned(b)
    if bits < 64:
        return shrink(_without_sign(x * y, bits), dtype)
    mask = (1 << 32) - 1
    x_low, x_high, y_low, y_high = x & mask, _without_sign(x, 32), y & mask, _without_sign(y, 32)
    middle = x_high * y_low + _without_sign(x_low * y_low, 32)
    other = x_low * y_high + (middle & mask)
    return x_high * y_high + _without_sign(middle, 32) + _without_sign(other, 32)


def multiply_high_signed(a: Tensor, b: Tensor) -> Tensor:
    """The upper half of the signed product."""
    return multiply_high(a, b) - torch.where(a < 0, b, 0) - torch.where(b < 0, a, 0)


def population_count(x: Tensor) -> Tensor:
    """How many bits are set."""
    wide = x.to(torch.int64)
    count = torch.zeros_like(wide)
    for place in range(8 * x.itemsize):
        count += (wide >> place) & 1
    return count.to(x.dtype)


def leading_zeros(x: Tensor) -> Tensor:
    """How many bits above the highest one that is set."""
    bits = 8 * x.itemsize
    smeared = x
    for step in (1, 2, 4, 8, 16, 32):
        if step < bits:
            smeared = smeared | shift_right_unsigned(smeared, torch.full_like(smeared, step))
    return bits - population_count(smeared)


def trailing_zeros(x: Tensor) -> Tensor:
    """How many bits below the lowest one that is set."""
    return population_count((x & -x) - 1)


# Conversions between integers and floating point


def int_to_float(x: Tensor, element: Element, *, is_signed: bool) -> Tensor:
    """An integer as a held floating point value, rounded once."""
    x = signed(x) if is_signed else unsigned(x)
    if x.dtype != torch.int64:
        return narrow(x.to(torch.float64), element)
    if str(element) == "f64":
        if is_signed:
            return x.to(torch.float64)
        halved = (_without_sign(x, 1) | (x & 1)).to(torch.float64) * 2
        return torch.where(x < 0, halved, x.to(torch.float64))
    # Of a large integer 53 bits; the last is set where anything was cut off, so that rounding again cannot err.
    upper = x >> 11 if is_signed else _without_sign(x, 11)
    sticky = (upper | ((x & 2047) != 0).to(torch.int64)).to(torch.float64) * 2048
    small = (x >= (-(1 << 53) if is_signed else 0)) & (x < (1 << 53))
    return narrow(torch.where(small, x.to(torch.float64), sticky), element)


def float_to_int(x: Tensor, element: Element, bits: int, *, is_signed: bool) -> Tensor:
    """A held floating point value as an integer, rounded towards zero. What does not fit gives some integer."""
    wide = widen(x, element).to(torch.float64)
    whole = wide.to(torch.int64)
    if bits == 64 and not is_signed:
        upper = (wide - 2.0**63).to(torch.int64) ^ torch.iinfo(torch.int64).min
        whole = torch.where(wide >= 2.0**63, upper, whole)
    return shrink(whole, _INTS[bits])


# Comparisons

COMPARE_FLOATS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda a, b: torch.zeros_like(a != b),
    torch.eq,
    torch.gt,
    torch.ge,
    torch.lt,
    torch.le,
    lambda a, b: (a < b) | (a > b),
    lambda a, b: ~(a.isnan() | b.isnan()),
    lambda a, b: ~((a < b) | (a > b)),
    lambda a, b: ~(a <= b),
    lambda a, b: ~(a < b),
    lambda a, b: ~(a >= b),
    lambda a, b: ~(a > b),
    torch.ne,
    lambda a, b: a.isnan() | b.isnan(),
    lambda a, b: torch.ones_like(a != b),
)
"""By MLIR's number: false, oeq, ogt, oge, olt, ole, one, ord, ueq, ugt, uge, ult, ule, une, uno, true."""

COMPARE_INTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.eq,
    torch.ne,
    lambda a, b: signed(a) < signed(b),
    lambda a, b: signed(a) <= signed(b),
    lambda a, b: signed(a) > signed(b),
    lambda a, b: signed(a) >= signed(b),
    unsigned_less,
    lambda a, b: ~unsigned_less(b, a),
    lambda a, b: unsigned_less(b, a),
    lambda a, b: ~unsigned_less(a, b),
)
"""By MLIR's number: eq, ne, slt, sle, sgt, sge, ult, ule, ugt, uge."""
