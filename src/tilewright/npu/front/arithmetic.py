"""Python's operators in a kernel: between sizes, between tensors, and where there is none."""

from __future__ import annotations

import ast
import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from xdsl.dialects.arith import ConstantOp
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, IndexType, IntegerAttr, StringAttr, TensorType, f32, i1

from tilewright.npu import shapes
from tilewright.npu.front.values import (
    FLOAT,
    UNDECIDED,
    UNKNOWN,
    Argument,
    Block,
    Flag,
    Index,
    Origin,
    Runtime,
    Tensor,
    guess,
)
from tilewright.npu.ir import dialect
from tilewright.npu.language import float32, int1
from tilewright.npu.shapes import ShapeError
from tilewright.npu.symbols import Symbolic, equal, less

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.npu.front.interpreter import Interpreter
    from tilewright.npu.shapes import Shape
    from tilewright.npu.symbols import Size

_PYTHON: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_TENSOR = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_COMPARE = {ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne"}
_NUMBER = (int, float, bool)
_GREATEST = torch.finfo(torch.float32).max


def binary(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    """The value of ``left op right``."""
    left, right = (UNKNOWN if each is UNDECIDED else each for each in (left, right))
    if left is UNKNOWN and right is UNKNOWN:
        return UNKNOWN
    for each in (left, right):
        if isinstance(each, Flag | Runtime | Block):
            k.report("SYNTAX", node, "this cannot be calculated with")
            return UNKNOWN
    if isinstance(left, Index) or isinstance(right, Index):
        return _index(k, node, op, left, right)
    if isinstance(left, Argument) or isinstance(right, Argument):
        return _argument(k, node, op, left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        function = _TENSOR.get(type(op))
        if function is None:
            k.report("UNSUPPORTED_OP", node, "tensors have +, -, * and / only")
            return guessed(node, left, right)
        return elementwise(k, node, function, left, right)
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    return _sizes(k, node, op, left, right)


def unary(k: Interpreter, node: ast.AST, op: ast.unaryop, value: Any) -> Any:
    """The value of ``op value``."""
    if value in (UNKNOWN, UNDECIDED):
        return value
    if isinstance(op, ast.Not):
        if isinstance(value, Flag):
            return Flag(value.value, not value.negated)
        if isinstance(value, Tensor | Index | Argument | Block | Runtime):
            return Runtime("not")
        truth = k.truth(node, value)
        return UNDECIDED if truth is UNDECIDED else not truth
    if value is FLOAT:
        return _unsupported(k, node) if isinstance(op, ast.Invert) else FLOAT
    if isinstance(value, Tensor):
        if isinstance(op, ast.USub):
            return elementwise(k, node, "neg", value)
        return value if isinstance(op, ast.UAdd) else _unsupported(k, node)
    if isinstance(value, int | float | Symbolic):
        if isinstance(op, ast.USub):
            return -value
        if isinstance(op, ast.UAdd):
            return value
        return ~value if isinstance(value, int) else _unsupported(k, node)
    k.report("DYN_USE" if isinstance(value, Index) else "SYNTAX", node, "this cannot be calculated with")
    return UNKNOWN


def compare(k: Interpreter, node: ast.Compare, op: ast.cmpop, left: Any, right: Any) -> Any:
    """The value of ``left op right``: a bool, UNDECIDED, a tensor of truths, a flag."""
    if isinstance(right, Flag):
        left, right = right, left
    if isinstance(left, Flag) and isinstance(right, bool) and isinstance(op, ast.Eq):
        return Flag(left.value, left.negated == right, compared=True)
    if any(each in (UNKNOWN, UNDECIDED, FLOAT) for each in (left, right)):
        return UNDECIDED
    if isinstance(op, ast.Is | ast.IsNot) and (left is None or right is None):
        if isinstance(left, Symbolic) or isinstance(right, Symbolic):
            return _symbolic(k, op, left, right)
        return (left is right) == isinstance(op, ast.Is)
    function = _COMPARE.get(type(op))
    if isinstance(left, Tensor | Argument) and isinstance(right, Tensor | Argument) and function:
        return elementwise(k, node, function, left, right)
    if isinstance(left, Index | Argument | Flag | Block) or isinstance(right, Index | Argument | Flag | Block):
        if isinstance(left, Index) or isinstance(right, Index):
            k.report("DYN_USE", node, "an index that was read from memory cannot be compared")
        return Runtime("comparison")
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return elementwise(k, node, function, left, right) if function else _unsupported(k, node)
    if isinstance(left, Symbolic) or isinstance(right, Symbolic):
        return _symbolic(k, op, left, right)
    if isinstance(left, tuple) and isinstance(right, tuple) and isinstance(op, ast.Eq | ast.NotEq):
        return _tuples(op, left, right)
    if any(_is_open(each) for each in (left, right)):
        return UNDECIDED
    match op:
        case ast.In():
            return left in right
        case ast.NotIn():
            return left not in right
        case ast.Is():
            return left is right
        case ast.IsNot():
            return left is not right
    try:
        return getattr(operator, _COMPARE[type(op)])(left, right)
    except TypeError as error:
        k.report("SYNTAX", node, str(error))
        return UNKNOWN


def elementwise(k: Interpreter, node: ast.AST, function: str, *operands: Any) -> Any:
    """A function of the elements of tensors and numbers; shapes broadcast."""
    with k.judging(*operands):
        return _elementwise(k, node, function, operands)


def guessed(node: ast.AST, *operands: Any) -> Any:
    """What a function of tensors and of what is not known gives most likely."""
    shape: Shape | None = None
    for each in operands:
        if isinstance(each, Tensor):
            try:
                shape = shapes.broadcast(shape or (), each.shape)
            except ShapeError:
                return UNKNOWN
    return UNKNOWN if shape is None else guess(Origin("guess", node), shape)


def _elementwise(k: Interpreter, node: ast.AST, function: str, operands: tuple[Any, ...]) -> Any:
    shape: Shape = ()
    try:
        for each in operands:
            if isinstance(each, Tensor):
                shape = shapes.broadcast(shape, each.shape)
    except ShapeError as error:
        k.report("SHAPE", node, str(error))
        return UNKNOWN
    for each in operands:
        if isinstance(each, Argument) and function != "mul":
            message = f"'{each.name}' is not loaded; what a 0-d tensor holds can only be multiplied with a tensor"
            k.report("SCALAR_PARAM", node, message, "pass it as a tensor of full shape, and load it")
    if any(_is_condition(k, node, each) for each in (operands[1:] if function == "select" else operands)):
        return guessed(node, *operands)
    given = [operand(k, node, each, shape) for each in operands]
    if any(each is UNKNOWN for each in given):
        return guessed(node, *operands)
    for each in operands:
        if isinstance(each, Tensor) and each.origin.name == "zeros":
            _judge_zeros(k, node)
    of = int1 if function in set(_COMPARE.values()) else float32
    element = i1 if of is int1 else f32
    return k.tensor(
        node,
        function,
        shape,
        tuple(given),
        lambda: dialect.ElementwiseOp.build(
            operands=[[each.value for each in given]],
            properties={"function": StringAttr(function)},
            result_types=[dialect.tensor(shape, element)],  # type: ignore[arg-type]
        ),
        of,
    )


def _is_condition(k: Interpreter, node: ast.AST, value: Any) -> bool:
    """Whether a comparison stands where a number should, which is reported."""
    if not isinstance(value, Tensor) or not value.is_condition:
        return False
    message = "what a comparison gives is a condition for tl.where, and no number"
    k.report("UNSUPPORTED_OP", node, message, "tl.where(condition, 1.0, 0.0)")
    return True


def numbers(k: Interpreter, node: ast.AST, value: Tensor | None) -> Tensor | None:
    """A tensor that holds numbers; None, and a report, if it holds conditions."""
    return None if value is None or _is_condition(k, node, value) else value


def operand(k: Interpreter, node: ast.AST, value: Any, shape: Shape) -> Any:
    """A tensor or a number as a tensor of this shape; unknown if it is neither."""
    if isinstance(value, _NUMBER):
        value = number(k, node, value)
    if isinstance(value, Argument):
        value = scalar(k, node, value)
    if isinstance(value, Symbolic) or value is FLOAT:
        value = Tensor((), float32, Origin("number", node))
    if not isinstance(value, Tensor):
        if isinstance(value, Index):
            k.report("DYN_USE", node, "an index that was read from memory cannot be calculated with")
        elif value not in (UNKNOWN, UNDECIDED):
            k.report("SHAPE", node, "an operand is neither a tensor nor a number")
        return UNKNOWN
    return broadcast_to(k, node, value, shape)


def broadcast_to(k: Interpreter, node: ast.AST, value: Tensor, shape: Shape) -> Tensor:
    """A tensor stretched to a shape; itself where it has that shape."""
    if value.shape == shape:
        return value
    element = i1 if value.is_condition else f32
    return k.tensor(
        node,
        "broadcast",
        shape,
        (value,),
        lambda: dialect.BroadcastOp.build(
            operands=[value.value],
            result_types=[dialect.tensor(shape, element)],  # type: ignore[arg-type]
        ),
        value.dtype,
    )


def number(k: Interpreter, node: ast.AST, value: float, shape: Shape = (), name: str = "number") -> Any:
    """A tensor that is the same number everywhere."""
    finite = isinstance(value, int) or math.isfinite(value)
    if finite and abs(value) > _GREATEST:
        k.report("DTYPE", node, f"{value} is no float32: the greatest one is {_GREATEST}", 'float("inf")')
        return UNKNOWN

    def make() -> ConstantOp:
        type_ = TensorType(f32, list(shape))  # type: ignore[arg-type]
        return ConstantOp(DenseIntOrFPElementsAttr.from_list(type_, [float(value)]), type_)

    return k.tensor(node, name, shape, (), make)


def scalar(k: Interpreter, node: ast.AST, argument: Argument) -> Any:
    """The value of a 0-d tensor that is passed to the kernel."""
    argument.uses.add("scalar")
    if argument.spec is not None and argument.spec.shape:
        what = shapes.text(argument.spec.shape)
        message = (
            f"'{argument.name}' has shape {what}; only a 0-d tensor is a scalar, others are loaded by a block pointer"
        )
        k.report("SCALAR_PARAM", node, message)
        return UNKNOWN
    return k.tensor(
        node,
        "scalar",
        (),
        (argument,),
        lambda: dialect.ScalarOp.build(operands=[argument.value], result_types=[dialect.tensor(())]),
    )


def _index(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    """An index plus a constexpr, and nothing else."""
    index, other = (left, right) if isinstance(left, Index) else (right, left)
    if not isinstance(op, ast.Add) or not isinstance(other, int | Symbolic):
        message = "an index that was read from memory can only have a constexpr added to it"
        k.report("DYN_USE", node, message, "compute it on the host, and read it from a table of its own")
        return UNKNOWN if isinstance(other, Tensor) else Index(index.block, index.maximum, None, index.source)

    def make() -> Any:
        value = IntegerAttr(int(other), 64)  # type: ignore[arg-type]
        return dialect.IndexAddOp.build(operands=[index.value], properties={"value": value}, result_types=[_INDEX])

    value = k.emit(node, make, index)[0]
    return Index(index.block, index.maximum, value, index.source)


_INDEX = IndexType()


def _argument(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    """A 0-d tensor multiplied with a tensor; anything else with a parameter is arithmetic on a pointer."""
    argument, other = (left, right) if isinstance(left, Argument) else (right, left)
    function = _TENSOR.get(type(op))
    if isinstance(other, Tensor) and function is not None:
        return elementwise(k, node, function, left, right)
    if isinstance(op, ast.Mult | ast.Div):  # no address is a product, so this is a scalar
        argument.uses.add("scalar")
        if other is not UNKNOWN:
            message = f"'{argument.name}' is a scalar, which can only be multiplied with a tensor"
            k.report("SCALAR_PARAM", node, message, "multiply the tensor first, or compute this on the host")
        return UNKNOWN
    message = f"'{argument.name}' is a tensor in memory: it is addressed through tl.make_block_ptr, not by arithmetic"
    k.report("RAWPTR", node, message, f"tl.make_block_ptr(base={argument.name}, ...)")
    return UNKNOWN


def _sizes(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    function = _PYTHON.get(type(op))
    if function is None:
        return _unsupported(k, node)
    if isinstance(op, ast.FloorDiv):
        _judge_division(k, node, left, right)
    try:
        return function(left, right)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        symbolic = any(isinstance(each, Symbolic) or each is FLOAT for each in (left, right))
        if not symbolic or isinstance(error, ZeroDivisionError):
            k.report("SYNTAX", node, str(error))
            return UNKNOWN
        fraction = isinstance(op, ast.Div) or any(isinstance(each, float) or each is FLOAT for each in (left, right))
        return FLOAT if fraction else UNKNOWN


def _judge_division(k: Interpreter, node: ast.AST, left: Any, right: Any) -> None:
    """Report sizes that are divided with a remainder; counters may have one, and what is rounded up."""
    if not isinstance(left, int) or not isinstance(right, int) or not right or left < 0 or not left % right:
        return
    match node:
        case ast.BinOp(left=divided, right=by):
            pass
        case ast.AugAssign(target=divided, value=by):
            pass
        case _:
            return
    names = {each.id for part in (divided, by) for each in ast.walk(part) if isinstance(each, ast.Name)}
    if any(name in k.names and name not in k.sizes for name in names) or _rounds_up(k, divided, left, right):
        return
    message = f"{left} // {right} leaves a remainder of {left % right}: what is behind it would be left out"
    k.report("PARTITION_DIV", node, message)


def _rounds_up(k: Interpreter, divided: ast.expr, left: int, right: int) -> bool:
    """Whether what is divided is a sum of sizes and of ``right - 1``, in whatever order, or a size less 1."""
    match divided:
        case ast.BinOp(op=ast.Sub(), right=ast.Constant(value=1)) if not isinstance(divided.left, ast.BinOp):
            return True
    terms = [k.evaluate(each) for each in _summands(divided)]
    return any(isinstance(each, int) and left - each == right - 1 for each in terms)


def _summands(node: ast.expr) -> list[ast.expr]:
    """The terms of a sum that something smaller is taken off of, too: ``N`` of ``N + B - 1``."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [*_summands(left), *_summands(right)]
        case ast.BinOp(left=left, op=ast.Sub()):
            return _summands(left)
    return [node]


def _is_open(value: Any) -> bool:
    """Whether something in a tuple is not known."""
    if isinstance(value, tuple):
        return any(_is_open(each) for each in value)
    return isinstance(value, Symbolic) or value in (UNKNOWN, UNDECIDED, FLOAT)


def _tuples(op: ast.cmpop, left: tuple[Any, ...], right: tuple[Any, ...]) -> Any:
    """Whether two tuples are equal."""
    truth: Any = len(left) == len(right)
    for x, y in zip(left, right, strict=False):
        if truth is False:
            break
        one: Any = equal(x, y) if isinstance(x, int | Symbolic) and isinstance(y, int | Symbolic) else None
        if one is None and not _is_open(x) and not _is_open(y):
            one = x == y
        truth = one if one is False else None if one is None else truth
    return UNDECIDED if truth is None else truth == isinstance(op, ast.Eq)


def _symbolic(k: Interpreter, op: ast.cmpop, left: Any, right: Any) -> Any:
    """A comparison that sizes without values decide: for all values, or as it is assumed."""
    relation, negated = "==", isinstance(op, ast.NotEq | ast.IsNot | ast.LtE | ast.GtE)
    truth: bool | None = None
    if isinstance(op, ast.Lt | ast.Gt | ast.LtE | ast.GtE):
        relation = "<"
        left, right = (left, right) if isinstance(op, ast.Lt | ast.GtE) else (right, left)
    elif not isinstance(op, ast.Eq | ast.NotEq | ast.Is | ast.IsNot):
        return UNDECIDED
    if isinstance(left, int | Symbolic) and isinstance(right, int | Symbolic) and not _may_be_a_switch(left, right):
        truth = less(left, right) if relation == "<" else equal(left, right)
    if truth is None:
        truth = k.choices.ask(relation, left, right)
    return UNDECIDED if truth is None else truth != negated


def _may_be_a_switch(left: Size, right: Size) -> bool:
    """Whether a parameter is compared that may be no size, and so 0 or less."""
    return any(
        isinstance(name, Symbolic) and name.is_name and isinstance(other, int) and other < 1
        for name, other in ((left, right), (right, left))
    )


def _judge_zeros(k: Interpreter, node: ast.AST) -> None:
    reason = k.diagnostics.profile.fails.get("zeros")
    if reason:
        message = f"tl.zeros is an operand of an elementwise operation, which fails {reason}"
        k.report("OP_DOC_ONLY", node, message, "use zeros only as a value that the first step of a loop replaces")


def _unsupported(k: Interpreter, node: ast.AST) -> Any:
    k.report("UNSUPPORTED_OP", node, "there is no such operator for these operands")
    return UNKNOWN
