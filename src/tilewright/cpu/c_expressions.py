"""Expressions as C."""

from __future__ import annotations

import math
import re
import struct
from typing import TYPE_CHECKING

from tilewright.cpu.pointwise import pointee_bytes
from tilewright.cpu.ttir import Bits
from tilewright.cpu.types import BF16, F8E4M3, F8E5M2, F16, F32, F64, I1, Element, Pointer, Scalar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tilewright.cpu.expressions import Expr, Expressions

    Names = Mapping[Expr, str]

FORMATS = {F16: "f16", BF16: "bf16", F8E4M3: "e4m3", F8E5M2: "e5m2"}
"""The names of the small floats in ``runtime.h``."""


def c_type(element: Element) -> str:
    """The C type of a value in a register or in local memory."""
    if isinstance(element, Pointer):
        return "char *"
    if element == I1:
        return "bool"
    if element.is_int:
        return f"int{element.bits}_t"
    return "double" if element == F64 else "float"


def memory_type(element: Element) -> str:
    """The C type of an element in the kernel's memory."""
    if element in FORMATS:
        return f"int{element.bits}_t"
    return "uint8_t" if element == I1 else c_type(element)


def format_of(element: Element) -> str:
    """The name of a small float in ``runtime.h``."""
    assert isinstance(element, Scalar)
    return FORMATS[element]


def from_memory(element: Element, text: str) -> str:
    """What lies in memory as a value."""
    if element in FORMATS:
        return f"tw_bits_{format_of(element)}({text})"
    return f"(bool)({text})" if element == I1 else text


def to_memory(element: Element, text: str) -> str:
    """A value as it lies in memory."""
    return f"tw_{format_of(element)}_bits({text})" if element in FORMATS else text


class Writer:
    """Writes expressions as C text.

    Args:
        make: makes the offsets of memory accesses.
        order: the loops of the nest, from outside.
        checked: every access asks first whether it is within the bounds; ``element`` is then the position in the tile.
    """

    def __init__(self, make: Expressions, order: Sequence[int] = (), checked: bool = False, element: str = "0") -> None:
        self.make = make
        self.order = order
        self.checked = checked
        self.element = element
        self.address_of: dict[Expr, tuple[Expr, Expr]] = {}

    def address(self, pointer: Expr) -> tuple[Expr, Expr, bool]:
        """A pointer as a start and an offset; the offset counts elements, or bytes where the last value is True."""
        assert isinstance(pointer.type, Pointer)
        size = pointer.type.pointee.bytes if isinstance(pointer.type.pointee, Scalar | Pointer) else 1
        steps: list[tuple[Expr, int]] = []
        base = pointer
        while base.op in {"addptr", "ptrcast"}:
            if base.op == "addptr":
                steps.append((base.args[1], pointee_bytes(base.type)))
            base = base.args[0]
        if all(step == size for _, step in steps):
            return base, self.make.offset([(offset, 1) for offset, _ in steps], self.order), False
        return base, self.make.offset(steps, self.order), True

    def parts(self, e: Expr) -> tuple[Expr, ...]:
        """The expressions whose values the expression's text needs."""
        if e.op in {"load", "addptr"}:
            pointer = e.args[0] if e.op == "load" else e
            base, offset, _ = self.address(pointer)
            return (base, offset, *(e.args[1:] if e.op == "load" else ()))
        if e.op == "element":
            return (self.position(e.args[0]),)
        return e.args

    def position(self, e: Expr) -> Expr:
        """A position in a buffer, as a 64-bit number that compilers know not to wrap."""
        return self.make.offset([(e, 1)], self.order)

    def place(self, pointer: Expr, names: Names) -> str:
        """The element that a pointer leads to."""
        base, offset, in_bytes = self.address(pointer)
        assert isinstance(pointer.type, Pointer)
        assert isinstance(pointer.type.pointee, Scalar | Pointer)
        type_ = memory_type(pointer.type.pointee)
        if in_bytes:
            return f"(*({type_} *)({self.text(base, names)} + {self.text(offset, names)}))"
        return f"(({type_} *){self.text(base, names)})[{self.text(offset, names)}]"

    def allowed(self, pointer: Expr, mask: str, site: int, roots: int, names: Names, load: Expr | None = None) -> str:
        """A condition: the mask holds and the access is within bounds, which is reported if not.

        A ``load`` may stand outside of loops that it does not depend on, whose indices it cannot name.
        """
        element = self.element
        if load is not None:
            seen = {str(part.attr) for part in load.walk(set()) if part.op == "index"}
            element = re.sub(r"\bi\d+\b", lambda index: index[0] if index[0] in seen else "0", element)
        assert isinstance(pointer.type, Pointer)
        assert isinstance(pointer.type.pointee, Scalar | Pointer)
        place = f"&{self.place(pointer, names)}"
        size = pointer.type.pointee.bytes
        return (
            f"({mask} && (tw_within(bounds, UINT64_C({roots}), {place}, {size}) || "
            f"(tw_raise(report, 2, {site}, program, {element}, (int64_t)(intptr_t){place}), false)))"
        )

    def text(self, e: Expr, names: Names) -> str:
        """The expression, where ``names`` are the variables that already hold parts of it."""
        known = names.get(e)
        if known is not None:
            return known
        if e.op == "const":
            return constant(e.attr, e.type)
        if e.op in {"var", "index"}:
            return str(e.attr)
        if e.op == "element":
            return f"{e.attr.name}[{self.text(self.position(e.args[0]), names)}]"
        if e.op == "load":
            return self._load(e, names)
        if e.op == "addptr":
            base, offset, in_bytes = self.address(e)
            step = 1 if in_bytes else pointee_bytes(e.type)
            return f"({self.text(base, names)} + {self.text(offset, names)} * {step})"
        args = [self.text(arg, names) for arg in e.args]
        return _WRITERS[e.op](e, args)

    def _load(self, e: Expr, names: Names) -> str:
        pointer, *rest = e.args
        place = self.place(pointer, names)
        mask = self.text(rest[0], names) if rest else "true"
        if self.checked:
            mask = self.allowed(pointer, mask, e.attr.number, e.attr.roots, names, e)
        elif not rest:
            return f"({from_memory(e.type, place)})"
        other = rest[1] if rest else None
        if e.type in FORMATS and other is not None and other.op == "const":
            pattern = small_pattern(other.attr, e.type)
            return f"({from_memory(e.type, f'({mask} ? {place} : {pattern})')})"
        fallback = "0" if other is None else self.text(other, names)
        return f"({mask} ? {from_memory(e.type, place)} : {fallback})"


def constant(value: object, type_: Element) -> str:
    """A number as C."""
    if isinstance(type_, Pointer):
        return f"((char *)(intptr_t){value})"
    if type_ == I1:
        return "true" if value else "false"
    if type_.is_int:
        assert isinstance(value, int)
        if type_.bits == 64:
            return f"(INT64_C({value}))" if value != -(1 << 63) else "INT64_MIN"
        if value == -(1 << 31):
            return "INT32_MIN"
        return f"({value})" if type_.bits == 32 else f"((int{type_.bits}_t)({value}))"
    suffix = "" if type_ == F64 else "f"
    if isinstance(value, Bits):
        if type_ == F64:
            return f"tw_bits_double(INT64_C({_signed(value.pattern, 64)}))"
        if type_ == F32:
            return f"tw_bits_float({_signed(value.pattern, 32)})"
        return f"tw_bits_{format_of(type_)}({_signed(value.pattern, type_.bits)})"
    assert isinstance(value, float)
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return f"({'-' if value < 0 else ''}__builtin_inf{suffix}())"
    if type_ in FORMATS:
        return f"tw_bits_{format_of(type_)}({small_pattern(value, type_)})"
    if type_ == F32:
        value = struct.unpack("f", struct.pack("f", value))[0]
        assert isinstance(value, float)
    return f"({value.hex()}{suffix})"


def small_pattern(value: object, type_: Element) -> int:
    """The bits of a constant of a small float type, as a signed integer."""
    if isinstance(value, Bits):
        return _signed(value.pattern, type_.bits)
    assert isinstance(value, float)
    if type_ == F16:
        found: int = struct.unpack("<h", struct.pack("<e", value))[0]
        return found
    if type_ == BF16:
        bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
        if value == value:  # noqa: PLR0124 - NaN
            bits += 0x7FFF + (bits >> 16 & 1)
        return _signed(bits >> 16 & 0xFFFF, 16)
    digits, low, largest = (3, -6, 0x7E) if type_ == F8E4M3 else (2, -14, 0x7B)
    if value != value:  # noqa: PLR0124 - NaN
        return 0x7F
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    size = abs(value)
    if math.isinf(size):
        return _signed(largest | sign, 8)
    exponent = max(math.frexp(size)[1] - 1, low) if size else low
    steps = round(size / 2.0 ** (exponent - digits))
    # Steps count within the exponent's range; the next exponent follows on without a gap.
    code = ((exponent - low) << digits) + steps
    return _signed(min(code, largest) | sign, 8)


def _signed(pattern: int, bits: int) -> int:
    return pattern - (1 << bits) if pattern >> (bits - 1) & 1 else pattern


def _unsigned(e: Expr, text: str) -> str:
    return text if e.type == I1 else f"(uint{e.type.bits}_t){text}"


def _wrapping(sign: str) -> Callable[[Expr, Sequence[str]], str]:
    def write(e: Expr, args: Sequence[str]) -> str:
        if e.type == I1:
            return f"({args[0]} {'&' if sign == '*' else '^'} {args[1]})"
        if e.type.bits < 32:
            return f"(({c_type(e.type)})({args[0]} {sign} {args[1]}))"
        unsigned = f"uint{e.type.bits}_t"
        return f"(({c_type(e.type)})(({unsigned}){args[0]} {sign} ({unsigned}){args[1]}))"

    return write


def _infix(sign: str) -> Callable[[Expr, Sequence[str]], str]:
    return lambda e, args: f"({args[0]} {sign} {args[1]})"


def _bitwise(sign: str) -> Callable[[Expr, Sequence[str]], str]:
    return lambda e, args: f"(({c_type(e.type)})({args[0]} {sign} {args[1]}))"


def _integer(name: str) -> Callable[[Expr, Sequence[str]], str]:
    """A function of ``runtime.h``; with a harmless constant on the right the plain operator."""
    signs = {"divs": "/", "rems": "%", "divu": "/", "remu": "%", "shl": "<<", "shru": ">>", "shrs": ">>"}

    def write(e: Expr, args: Sequence[str]) -> str:
        bits = 8 if e.type == I1 else e.type.bits
        right = e.args[1]
        if right.op == "const" and e.type != I1 and 0 < right.attr < (bits if name.startswith("sh") else 1 << 62):
            left = args[0] if name in {"divs", "rems", "shrs"} else _unsigned(e, args[0])
            return f"(({c_type(e.type)})({left} {signs[name]} {args[1]}))"
        return f"(({c_type(e.type)})tw_{name}{bits}({args[0]}, {args[1]}))"

    return write


def _extreme(sign: str, unsigned: bool) -> Callable[[Expr, Sequence[str]], str]:
    def write(e: Expr, args: Sequence[str]) -> str:
        if e.type == I1:  # as signed numbers true is -1
            larger = (sign == ">") == unsigned
            return f"({args[0]} {'|' if larger else '&'} {args[1]})"
        a, b = (_unsigned(e, arg) if unsigned else arg for arg in args)
        return f"({a} {sign} {b} ? {args[0]} : {args[1]})"

    return write


def _float_function(name: str) -> Callable[[Expr, Sequence[str]], str]:
    return lambda e, args: f"{name}{'' if e.type == F64 else 'f'}({', '.join(args)})"


def _absolute(e: Expr, args: Sequence[str]) -> str:
    if e.type.is_int:
        return args[0] if e.type == I1 else f"tw_abs{e.type.bits}({args[0]})"
    return f"fabs{'' if e.type == F64 else 'f'}({args[0]})"


_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _compare_ints(e: Expr, args: Sequence[str]) -> str:
    predicate: str = e.attr
    a, b = args
    operand = e.args[0]
    if isinstance(operand.type, Pointer) or predicate in {"eq", "ne"}:
        return f"({a} {_SIGNS[predicate[-2:]]} {b})"
    sign = _SIGNS[predicate[1:]]
    if predicate.startswith("u"):
        return f"({_unsigned(operand, a)} {sign} {_unsigned(operand, b)})"
    return f"(-(int){a} {sign} -(int){b})" if operand.type == I1 else f"({a} {sign} {b})"


def _compare_floats(e: Expr, args: Sequence[str]) -> str:
    predicate: str = e.attr
    a, b = args
    if predicate in {"true", "false"}:
        return predicate
    if predicate == "ord":
        return f"(({a} == {a}) & ({b} == {b}))"
    if predicate == "uno":
        return f"(({a} != {a}) | ({b} != {b}))"
    if predicate == "one":
        return f"(({a} < {b}) | ({a} > {b}))"
    if predicate == "ueq":
        return f"(!(({a} < {b}) | ({a} > {b})))"
    if predicate == "une":
        return f"({a} != {b})"
    if predicate.startswith("o"):
        return f"({a} {_SIGNS[predicate[1:]]} {b})"
    opposite = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}[predicate[1:]]
    return f"(!({a} {opposite} {b}))"


def _sign_extend(e: Expr, args: Sequence[str]) -> str:
    return f"(({c_type(e.type)}){'-(int)' if e.args[0].type == I1 else ''}{args[0]})"


def _zero_extend(e: Expr, args: Sequence[str]) -> str:
    return f"(({c_type(e.type)}){_unsigned(e.args[0], args[0])})"


def _truncate(e: Expr, args: Sequence[str]) -> str:
    return f"((bool)({args[0]} & 1))" if e.type == I1 else f"(({c_type(e.type)}){args[0]})"


def _float_cast(e: Expr, args: Sequence[str]) -> str:
    source, target = e.args[0].type, e.type
    x = args[0]
    towards_zero = e.attr == "rtz"
    if target == F64:
        return f"((double){x})"
    if target == F32:
        return f"tw_rtz_f32({x})" if towards_zero and source == F64 else f"((float){x})"
    if source in (F8E4M3, F8E5M2) and target in (F16, BF16):
        return x
    if source == F64:
        x = f"tw_odd_double({x})"
    return f"tw_{'rtz' if towards_zero else 'round'}_{format_of(target)}({x})"


def _from_int(e: Expr, args: Sequence[str], unsigned: bool) -> str:
    source, target = e.args[0], e.type
    x = args[0]
    if source.type == I1 and not unsigned:
        x = f"(-(int){x})"
    elif unsigned:
        x = _unsigned(source, x)
    if target in (F32, F64):
        return f"(({c_type(target)}){x})"
    odd = x if source.type.bits <= 16 else f"tw_odd_{'unsigned' if unsigned else 'signed'}({x})"
    return f"tw_round_{format_of(target)}((float)({odd}))"


def _to_int(e: Expr, args: Sequence[str], unsigned: bool) -> str:
    bits = e.type.bits
    if e.type == I1:
        return f"({args[0]} != 0)"
    if bits == 64:
        return f"((int64_t)({'uint64_t' if unsigned else 'int64_t'}){args[0]})"
    wide = "uint32_t" if unsigned and bits == 32 else "int32_t"
    return f"((int{bits}_t)({wide}){args[0]})"


def _bitcast(e: Expr, args: Sequence[str]) -> str:
    source, target = e.args[0].type, e.type
    x = args[0]
    if source in FORMATS:
        x = f"tw_{format_of(source)}_bits({x})"
    elif source.is_float:
        x = f"tw_{'double' if source == F64 else 'float'}_bits({x})"
    if target in FORMATS:
        return f"tw_bits_{format_of(target)}({x})"
    if target.is_float:
        return f"tw_bits_{'double' if target == F64 else 'float'}({x})"
    return f"(({c_type(target)}){x})"


_WRITERS: dict[str, Callable[[Expr, Sequence[str]], str]] = {
    "add": _wrapping("+"), "sub": _wrapping("-"), "mul": _wrapping("*"), "addn": _infix("+"), "muln": _infix("*"),
    "and": _bitwise("&"), "or": _bitwise("|"), "xor": _bitwise("^"),
    **{name: _integer(name) for name in ("divs", "divu", "rems", "remu", "shl", "shrs", "shru")},
    "maxs": _extreme(">", False), "mins": _extreme("<", False),
    "maxu": _extreme(">", True), "minu": _extreme("<", True),
    "mulhu": lambda e, args: f"tw_mulhu{e.type.bits}({args[0]}, {args[1]})",
    "fadd": _infix("+"), "fsub": _infix("-"), "fmul": _infix("*"), "fdiv": _infix("/"), "fmod": _float_function("fmod"),
    "fneg": lambda e, args: f"(-{args[0]})",
    "maxnum": _float_function("tw_maxnum"), "minnum": _float_function("tw_minnum"),
    "maximum": _float_function("tw_maximum"), "minimum": _float_function("tw_minimum"),
    "exp": lambda e, args: f"exp({args[0]})" if e.type == F64 else f"tw_expf({args[0]})",
    "exp2": lambda e, args: f"exp2({args[0]})" if e.type == F64 else f"tw_exp2f({args[0]})",
    **{n: _float_function(n) for n in ("log", "log2", "sin", "cos", "sqrt", "erf", "floor", "ceil", "fma", "tanh")},
    "oddfma": lambda e, args: f"tw_odd_fma({', '.join(args)})",
    "fabs": _float_function("fabs"), "rsqrt": _float_function("tw_rsqrt"), "abs": _absolute,
    "cmpi": _compare_ints, "cmpf": _compare_floats,
    "select": lambda e, args: f"({args[0]} ? {args[1]} : {args[2]})",
    "sext": _sign_extend, "zext": _zero_extend, "trunc": _truncate, "fcast": _float_cast,
    "sitofp": lambda e, args: _from_int(e, args, False), "uitofp": lambda e, args: _from_int(e, args, True),
    "fptosi": lambda e, args: _to_int(e, args, False), "fptoui": lambda e, args: _to_int(e, args, True),
    "bitcast": _bitcast, "ptrcast": lambda e, args: args[0],
    "inttoptr": lambda e, args: f"((char *)(intptr_t){args[0]})",
    "ptrtoint": lambda e, args: f"((int64_t)(intptr_t){args[0]})",
    "call": lambda e, args: f"{e.attr}({', '.join(args)})",
}  # fmt: skip
