"""Operations that work element by element, as expressions: one table for scalars, tiles and combine functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilewright.cpu.diagnostics import unsupported
from tilewright.cpu.libdevice import NATIVE
from tilewright.cpu.ttir import Bits, Dense
from tilewright.cpu.types import F32, F64, I1, I8, Element, Pointer, Tensor, element_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.cpu.expressions import Expr, Expressions
    from tilewright.cpu.ttir import Operation

# MLIR's numbers for the predicates of comparisons.
INT_PREDICATES = ("eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge")
FLOAT_PREDICATES = (
    "false", "oeq", "ogt", "oge", "olt", "ole", "one", "ord", "ueq", "ugt", "uge", "ult", "ule", "une", "uno", "true",
)  # fmt: skip

_INTEGER = {
    "arith.addi": "add", "arith.subi": "sub", "arith.muli": "mul", "arith.andi": "and", "arith.ori": "or",
    "arith.xori": "xor", "arith.shli": "shl", "arith.shrsi": "shrs", "arith.shrui": "shru", "arith.divsi": "divs",
    "arith.divui": "divu", "arith.remsi": "rems", "arith.remui": "remu", "arith.maxsi": "maxs", "arith.minsi": "mins",
    "arith.maxui": "maxu", "arith.minui": "minu", "tt.mulhiui": "mulhu",
}  # fmt: skip
_FLOAT = {
    "arith.addf": "fadd", "arith.subf": "fsub", "arith.mulf": "fmul", "arith.divf": "fdiv", "arith.remf": "fmod",
    "arith.maxnumf": "maxnum", "arith.minnumf": "minnum", "arith.maximumf": "maximum", "arith.minimumf": "minimum",
    "tt.precise_divf": "fdiv",
}  # fmt: skip
_MATH = {
    "math.exp": "exp", "math.exp2": "exp2", "math.log": "log", "math.log2": "log2", "math.sin": "sin",
    "math.cos": "cos", "math.sqrt": "sqrt", "tt.precise_sqrt": "sqrt", "math.rsqrt": "rsqrt", "math.erf": "erf",
    "math.floor": "floor", "math.ceil": "ceil", "math.absf": "fabs", "math.fma": "fma", "math.tanh": "tanh",
}  # fmt: skip
_CASTS = {
    "arith.extsi": "sext", "arith.extui": "zext", "arith.trunci": "trunc", "arith.extf": "fcast",
    "arith.truncf": "fcast", "arith.sitofp": "sitofp", "arith.uitofp": "uitofp", "arith.fptosi": "fptosi",
    "arith.fptoui": "fptoui", "arith.bitcast": "bitcast", "tt.bitcast": "bitcast", "tt.int_to_ptr": "inttoptr",
    "tt.ptr_to_int": "ptrtoint", "arith.index_cast": "sext",
}  # fmt: skip

COSTS = {
    "load": 4,
    "exp": 16,
    "exp2": 16,
    "log": 16,
    "log2": 16,
    "sin": 24,
    "cos": 24,
    "fdiv": 6,
    "sqrt": 6,
    "rsqrt": 8,
}
"""What an expression costs, in additions; 1 unless it stands here."""


def is_pointwise(operation: Operation) -> bool:
    """Whether each element of the results depends on the operands' elements at the same index alone."""
    return operation.name in _BUILDERS


def cost(operation: Operation) -> int:
    """About how many additions the operation's elements cost."""
    short = _MATH.get(operation.name) or _FLOAT.get(operation.name) or ""
    if operation.name in {"arith.divsi", "arith.divui", "arith.remsi", "arith.remui"}:
        return 8
    if operation.name in {"tt.fp_to_fp", "arith.truncf"}:
        return 4
    if operation.name == "tt.extern_elementwise":
        return 24
    return COSTS.get(short, 1)


def build(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    """The expression of one element of the operation's result, given those of its operands."""
    return _BUILDERS[operation.name](make, operation, args)


def constant(make: Expressions, operation: Operation) -> Expr | None:
    """The value that all elements of an ``arith.constant`` have; None if they differ."""
    value = operation.attributes["value"]
    element = element_of(operation.result.type)
    if isinstance(value, Dense):
        if not value.splat:
            return None
        value = value.values
    return literal(make, value, element)


def literal(make: Expressions, value: Any, element: Element) -> Expr:
    """A number as an expression."""
    if isinstance(value, Bits):
        return make.const(value, element)
    if element.is_float:
        return make.const(float(value), element)
    return make.const(int(value), element)


def binary(make: Expressions, op: str, a: Expr, b: Expr) -> Expr:
    """A float operation, rounded to the type where that is narrower than what is computed in."""
    return rounded(make, make.make(op, _compute(a.type), (a, b)), a.type)


def rounded(make: Expressions, e: Expr, element: Element) -> Expr:
    """The fp32 expression rounded to ``element``, where that is narrower."""
    return make.make("fcast", element, (e,)) if element.is_small_float else e


def _compute(element: Element) -> Element:
    """The type that arithmetic on ``element`` is done in."""
    return F32 if element.is_small_float else element


def _integer(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    return make.int_op(_INTEGER[operation.name], *args)


def _float(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    return binary(make, _FLOAT[operation.name], *args)


def _negate(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    return make.make("fneg", args[0].type, args)


def _math(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    if operation.name == "math.fma" and args[0].type.is_small_float:
        return make.make("fcast", args[0].type, (make.make("oddfma", F64, args),))
    return rounded(make, make.make(_MATH[operation.name], _compute(args[0].type), args), args[0].type)


def _absolute(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    return make.make("abs", args[0].type, args)


def _cast(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    target = element_of(operation.result.type)
    source = args[0].type
    op = _CASTS[operation.name]
    if source == target:
        return args[0]
    if op == "bitcast" and isinstance(source, Pointer) and isinstance(target, Pointer):
        return make.make("ptrcast", target, args)
    if op == "bitcast" and source.is_int and target.is_int and source.bits == target.bits:
        return args[0]
    if args[0].op == "const" and isinstance(args[0].attr, int) and op in {"sext", "trunc"} and source != I1:
        return make.const(args[0].attr, target)
    return make.make(op, target, args)


def _fp_to_fp(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    target = element_of(operation.result.type)
    towards_zero = operation.attributes.get("rounding") == 0
    if args[0].type == target:
        return args[0]
    return make.make("fcast", target, args, "rtz" if towards_zero else None)


def _compare_ints(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    return make.make("cmpi", I1, args, INT_PREDICATES[operation.attributes["predicate"]])


def _compare_floats(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    return make.make("cmpf", I1, args, FLOAT_PREDICATES[operation.attributes["predicate"]])


def _select(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    condition, yes, no = args
    if condition.op == "const":
        return yes if condition.attr else no
    return yes if yes is no else make.make("select", yes.type, args)


def _clamp(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    propagate = bool(operation.attributes.get("propagateNan", 0))
    low, high = ("maximum", "minimum") if propagate else ("maxnum", "minnum")
    x, minimum, maximum = args
    return binary(make, high, binary(make, low, x, minimum), maximum)


def _add_pointer(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    pointer, offset = args
    if offset.op == "const" and offset.attr == 0:
        return pointer
    return make.make("addptr", pointer.type, args)


def _extern(make: Expressions, operation: Operation, args: list[Expr]) -> Expr:
    symbol = operation.attributes["symbol"]
    if symbol not in NATIVE:
        raise unsupported(operation, f"the library function {symbol!r}")
    return make.make("call", element_of(operation.result.type), args, NATIVE[symbol])


_BUILDERS: dict[str, Callable[[Expressions, Operation, list[Expr]], Expr]] = {
    **dict.fromkeys(_INTEGER, _integer),
    **dict.fromkeys(_FLOAT, _float),
    **dict.fromkeys(_MATH, _math),
    **dict.fromkeys(_CASTS, _cast),
    "arith.negf": _negate,
    "math.absi": _absolute,
    "arith.cmpi": _compare_ints,
    "arith.cmpf": _compare_floats,
    "arith.select": _select,
    "tt.fp_to_fp": _fp_to_fp,
    "tt.clampf": _clamp,
    "tt.addptr": _add_pointer,
    "tt.extern_elementwise": _extern,
}


def pointee_bytes(pointer: Element) -> int:
    """By how many bytes an offset of 1 moves a pointer."""
    assert isinstance(pointer, Pointer)
    assert not isinstance(pointer.pointee, Tensor)
    return I8.bytes if pointer.pointee == I1 else pointer.pointee.bytes
