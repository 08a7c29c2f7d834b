"""Python's operators in a kernel: between sizes, between tensors, and where there is none."""

from __future__ import annotations

import ast
import operator
from typing import TYPE_CHECKING, Any

from xdsl.dialects.arith import ConstantOp
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, IndexType, IntegerAttr, StringAttr, TensorType, f32, i1

from tilewright.npu import shapes
from tilewright.npu.front.values import UNDECIDED, UNKNOWN, Argument, Block, Flag, Index, Runtime, Tensor
from tilewright.npu.ir import dialect
from tilewright.npu.language import float32, int1
from tilewright.npu.shapes import ShapeError
from tilewright.npu.symbols import Symbolic, equal, less

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.npu.front.interpreter import Interpreter
    from tilewright.npu.shapes import Shape

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


def binary(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    """The value of ``left op right``."""
    if left in (UNKNOWN, UNDECIDED) and right in (UNKNOWN, UNDECIDED):
        return UNKNOWN
    for each in (left, right):
        if isinstance(each, Flag | Runtime | Block):
            k.report("SYNTAX", node, "this cannot be calculated with")
            return UNKNOWN
    if isinstance(left, Index) or isinstance(right, Index):
        return _index(k, node, op, left, right)
    if isinstance(left, Argument) or isinstance(right, Argument):
        return _argument(k, node, op, left, right)
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        function = _TENSOR.get(type(op))
        if function is None:
            k.report("UNSUPPORTED_OP", node, "tensors have +, -, * and / only")
            return UNKNOWN
        return elementwise(k, node, function, left, right)
    return _sizes(k, node, op, left, right)


def unary(k: Interpreter, node: ast.AST, op: ast.unaryop, value: Any) -> Any:
    """The value of ``op value``."""
    if value in (UNKNOWN, UNDECIDED):
        return value
    if isinstance(op, ast.Not):
        if isinstance(value, Flag):
            return Flag(value.value, not value.negated)
        if isinstance(value, Tensor | Index | Argument | Runtime):
            return Runtime("not")
        return UNDECIDED if isinstance(value, Symbolic) else not value
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
    if isinstance(left, Flag) and isinstance(right, bool) and isinstance(op, ast.Eq | ast.Is):
        return Flag(left.value, left.negated == right, compared=True)
    if isinstance(op, ast.Is | ast.IsNot) and (left is None or right is None):
        return (left is right) == isinstance(op, ast.Is)
    if left is UNKNOWN or right is UNKNOWN or UNDECIDED in (left, right):
        return UNDECIDED
    if isinstance(left, Index | Argument | Flag | Block) or isinstance(right, Index | Argument | Flag | Block):
        if isinstance(left, Index) or isinstance(right, Index):
            k.report("DYN_USE", node, "an index that was read from memory cannot be compared")
        return Runtime("comparison")
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        function = _COMPARE.get(type(op))
        return elementwise(k, node, function, left, right) if function else _unsupported(k, node)
    if isinstance(left, Symbolic) or isinstance(right, Symbolic):
        return _symbolic(op, left, right)
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
    shape: Shape = ()
    try:
        for each in operands:
            if isinstance(each, Tensor):
                shape = shapes.broadcast(shape, each.shape)
    except ShapeError as error:
        k.report("SHAPE", node, str(error))
        return UNKNOWN
    given = [operand(k, node, each, shape) for each in operands]
    if any(each is UNKNOWN for each in given):
        return UNKNOWN
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


def operand(k: Interpreter, node: ast.AST, value: Any, shape: Shape) -> Any:
    """A tensor or a number as a tensor of this shape; unknown if it is neither."""
    if isinstance(value, _NUMBER):
        value = number(k, node, value)
    if isinstance(value, Argument):
        value = scalar(k, node, value)
    if not isinstance(value, Tensor):
        if isinstance(value, Symbolic):
            value = Tensor((), float32, _origin("number", node))
        else:
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


def number(k: Interpreter, node: ast.AST, value: float, shape: Shape = (), name: str = "number") -> Tensor:
    """A tensor that is the same number everywhere."""

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


def _origin(name: str, node: ast.AST) -> Any:
    from tilewright.npu.front.values import Origin

    return Origin(name, node)


def _index(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    """An index plus a constexpr, and nothing else."""
    index, other = (left, right) if isinstance(left, Index) else (right, left)
    if not isinstance(op, ast.Add) or not isinstance(other, int | Symbolic):
        message = "an index that was read from memory can only have a constexpr added to it"
        k.report("DYN_USE", node, message, "compute it on the host, and read it from a table of its own")
        return UNKNOWN

    def make() -> Any:
        value = IntegerAttr(int(other), 64)  # type: ignore[arg-type]
        return dialect.IndexAddOp.build(operands=[index.value], properties={"value": value}, result_types=[_INDEX])

    value = k.emit(node, make, index)[0]
    return Index(index.block, index.maximum, value, index.source)


_INDEX = IndexType()


def _argument(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    """A 0-d tensor multiplied with a tensor; anything else with a parameter is arithmetic on a pointer."""
    argument, other = (left, right) if isinstance(left, Argument) else (right, left)
    if isinstance(op, ast.Mult) and isinstance(other, Tensor):
        return elementwise(k, node, "mul", *(scalar(k, node, e) if e is argument else e for e in (left, right)))
    if isinstance(op, ast.Mult) and other is UNKNOWN:  # no address is a product, so this is a scalar
        argument.uses.add("scalar")
        return UNKNOWN
    if isinstance(other, Tensor) and isinstance(op, ast.Add | ast.Sub | ast.Div):
        message = f"'{argument.name}' is a scalar, and a tensor can only be multiplied with it"
        k.report("SCALAR_PARAM", node, message, "pass it as a tensor of full shape, and load it")
        function = _TENSOR[type(op)]
        return elementwise(k, node, function, *(scalar(k, node, e) if e is argument else e for e in (left, right)))
    message = f"'{argument.name}' is a tensor in memory: it is addressed through tl.make_block_ptr, not by arithmetic"
    k.report("RAWPTR", node, message, f"tl.make_block_ptr(base={argument.name}, ...)")
    return UNKNOWN


def _sizes(k: Interpreter, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(op, ast.FloorDiv) and isinstance(left, int) and isinstance(right, int) and right and left % right:
        message = f"{left} // {right} leaves a remainder of {left % right}: what is behind it would be left out"
        k.report("PARTITION_DIV", node, message)
    try:
        return _PYTHON[type(op)](left, right)
    except KeyError:
        return _unsupported(k, node)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if not isinstance(left, Symbolic) and not isinstance(right, Symbolic):
            k.report("SYNTAX", node, str(error))
        return UNKNOWN


def _symbolic(op: ast.cmpop, left: Any, right: Any) -> Any:
    if not isinstance(left, int | Symbolic) or not isinstance(right, int | Symbolic):
        return UNDECIDED

    def negated(truth: bool | None) -> bool | None:
        return None if truth is None else not truth

    truth: bool | None = None
    match op:
        case ast.Eq():
            truth = equal(left, right)
        case ast.NotEq():
            truth = negated(equal(left, right))
        case ast.Lt():
            truth = less(left, right)
        case ast.Gt():
            truth = less(right, left)
        case ast.LtE():
            truth = negated(less(right, left))
        case ast.GtE():
            truth = negated(less(left, right))
    return UNDECIDED if truth is None else truth


def _judge_zeros(k: Interpreter, node: ast.AST) -> None:
    reason = k.diagnostics.profile.fails.get("zeros")
    if reason:
        message = f"tl.zeros is an operand of an elementwise operation, which fails {reason}"
        k.report("OP_DOC_ONLY", node, message, "use zeros only as a value that the first step of a loop replaces")


def _unsupported(k: Interpreter, node: ast.AST) -> Any:
    k.report("UNSUPPORTED_OP", node, "there is no such operator for these operands")
    return UNKNOWN
