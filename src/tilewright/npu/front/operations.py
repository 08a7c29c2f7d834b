"""The functions of ``tl``: what each gives, which rules it may break, and what is built for it."""

from __future__ import annotations

import ast
from functools import partial
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import IntegerAttr, StringAttr

from tilewright.npu import shapes
from tilewright.npu.front import arithmetic
from tilewright.npu.front.builder import element_type
from tilewright.npu.front.memory import HANDLERS, handler, judge_last
from tilewright.npu.front.operands import assumed, integer, numbers, shaped, sizes, spread, static, tensor
from tilewright.npu.front.values import UNDECIDED, UNKNOWN, Argument, Index, Origin, Tensor, guess
from tilewright.npu.ir import dialect
from tilewright.npu.language.core import dtype, pointer_type
from tilewright.npu.shapes import ShapeError
from tilewright.npu.symbols import Symbolic

if TYPE_CHECKING:
    from tilewright.npu.front.interpreter import Interpreter
    from tilewright.npu.language.core import Builtin
    from tilewright.npu.shapes import Shape


def judge(k: Interpreter, node: ast.AST, function: Builtin) -> None:
    """Report a function that the release does not support, or that was seen to fail."""
    profile = k.diagnostics.profile
    if function.name in profile.supported:
        if function.name in profile.fails and function.name != "zeros":
            message = f"{function} is documented, and was seen to fail: {profile.fails[function.name]}"
            k.report("OP_DOC_ONLY", node, message, _instead(function.name, node))
    elif function.name != "range":  # the loop says so itself
        k.report("UNSUPPORTED_OP", node, f"{function} is not among what {profile.name} supports")


def _instead(name: str, node: ast.AST) -> str:
    """How to write a function that fails."""
    args = [ast.unparse(each) for each in node.args] if isinstance(node, ast.Call) else []
    match name, args:
        case "exp2", [x]:
            whole = isinstance(node, ast.Call) and isinstance(node.args[0], ast.Name | ast.Call)
            return f"tl.exp({x if whole else f'({x})'} * 0.6931471805599453)"
        case "sigmoid", [x]:
            return f"1 / (1 + tl.exp(-({x})))"
        case "where", [condition, x, y]:
            if condition in (f"{x} > {y}", f"{x} >= {y}"):
                return f"tl.maximum({x}, {y})"
            return "tl.maximum or tl.minimum, or a mask that is multiplied with"
        case "min", [x, *_]:
            return f"-tl.max(-({x}), axis=..., keep_dims=True)"
    return ""


# Creation and shape


@handler
def zeros(k: Interpreter, node: ast.AST, shape: Any, dtype: Any) -> Any:
    """``tl.zeros``."""
    given, fits = sizes(k, node, shape, "the shape"), _is_data(k, node, dtype)
    if given is None:
        return UNKNOWN
    made = arithmetic.number(k, node, 0.0, given, "zeros")
    return made if fits else assumed(made)


@handler
def tensor_(k: Interpreter, node: ast.AST, value: Any, dtype: Any = None) -> Any:
    """``tl.tensor``."""
    made = tensor(k, node, value)
    if made is None:
        return UNKNOWN
    return made if dtype is None or _is_data(k, node, dtype) else assumed(made)


def _is_data(k: Interpreter, node: ast.AST, of: Any) -> bool:
    """Whether a tensor may be made with this dtype; reported if not."""
    allowed = k.diagnostics.profile.data_dtypes
    if isinstance(of, pointer_type):
        of = of.scalar
    if isinstance(of, dtype) and of.name not in allowed:
        k.report("DTYPE", node, f"a tensor of {of}; data is {' or '.join(allowed)}")
    elif not isinstance(of, dtype | Symbolic) and of is not UNKNOWN:
        k.report("DTYPE", node, "its dtype is none of the language's")
    return isinstance(of, dtype) and of.name in allowed


@handler
def broadcast(k: Interpreter, node: ast.AST, input: Any, other: Any) -> Any:
    """``tl.broadcast``: both operands, stretched."""
    x, y = tensor(k, node, input), tensor(k, node, other)
    if x is None or y is None:
        return UNKNOWN
    shape = shaped(k, node, lambda: shapes.broadcast(x.shape, y.shape))
    if shape is None:
        return UNKNOWN
    return tuple(arithmetic.broadcast_to(k, node, each, shape) for each in (x, y))


@handler
def broadcast_to(k: Interpreter, node: ast.AST, input: Any, *shape: Any) -> Any:
    """``tl.broadcast_to``."""
    x, given = tensor(k, node, input), sizes(k, node, spread(shape), "the shape")
    if x is None or given is None:
        return UNKNOWN
    result = shaped(k, node, lambda: shapes.broadcast_to(x.shape, given))
    if result is None:
        return guess(Origin("broadcast", node, (x,)), given, x.dtype)
    return arithmetic.broadcast_to(k, node, x, given)


@handler
def expand_dims(k: Interpreter, node: ast.AST, input: Any, axis: Any) -> Any:
    """``tl.expand_dims``."""
    x = tensor(k, node, input)
    axes = axis if isinstance(axis, tuple) else (axis,)
    if x is None or not all(isinstance(each, int) for each in axes):
        return UNKNOWN
    rank = len(x.shape) + len(axes)
    if any(not -rank <= each < rank for each in axes) or len({each % rank for each in axes}) < len(axes):
        k.report("SHAPE", node, f"axis {axis} of a tensor with {rank} dimensions")
        return UNKNOWN
    shape = list(x.shape)
    for each in sorted(each % rank for each in axes):
        shape.insert(each, 1)
    return reshaped(k, node, x, tuple(shape))


@handler
def reshape(k: Interpreter, node: ast.AST, input: Any, *shape: Any, can_reorder: Any = False) -> Any:
    """``tl.reshape``."""
    x, given = tensor(k, node, input), sizes(k, node, spread(shape), "the shape", -1)
    if x is None or given is None:
        return UNKNOWN
    result = shaped(k, node, lambda: shapes.reshape(x.shape, given))
    if result is None:
        return UNKNOWN if -1 in given else guess(Origin("reshape", node, (x,)), given, x.dtype)
    return reshaped(k, node, x, result)


def reshaped(k: Interpreter, node: ast.AST, x: Tensor, shape: Shape) -> Tensor:
    """A tensor with another shape of as many elements."""
    return k.tensor(
        node,
        "reshape",
        shape,
        (x,),
        lambda: dialect.ReshapeOp.build(
            operands=[x.value], result_types=[dialect.tensor(static(shape), element_type(x.dtype))]
        ),
        x.dtype,
    )


@handler
def permute(k: Interpreter, node: ast.AST, input: Any, *dims: Any) -> Any:
    """``tl.permute``."""
    x = tensor(k, node, input)
    order = [integer(k, node, each, "a dimension") for each in spread(dims)]
    if x is None or None in order:
        return UNKNOWN
    dims = tuple(each for each in order if each is not None)
    shape = shaped(k, node, lambda: shapes.permute(x.shape, dims))
    if shape is None:
        return UNKNOWN
    permutation = [shapes.axis(each, len(x.shape)) for each in dims]
    return k.tensor(
        node,
        "transpose",
        shape,
        (x,),
        lambda: dialect.TransposeOp.build(
            operands=[x.value],
            properties={"permutation": dialect.integers(permutation)},
            result_types=[dialect.tensor(static(shape), element_type(x.dtype))],
        ),
        x.dtype,
    )


@handler
def trans(k: Interpreter, node: ast.AST, input: Any, *dims: Any) -> Any:
    """``tl.trans``."""
    if not dims and isinstance(input, Tensor):
        rank = len(input.shape)
        if rank < 2:
            k.report("SHAPE", node, f"a tensor of {rank} dimensions has no two to change")
            return UNKNOWN
        dims = (*range(rank - 2), rank - 1, rank - 2)
    return permute(k, node, input, *dims)


# Products


@handler
def dot(k: Interpreter, node: ast.AST, input: Any, other: Any, acc: Any, *rest: Any) -> Any:
    """``tl.dot``."""
    if acc is not None or any(each is not None and not _is_float32(each) for each in rest):
        k.report("DOT_SHAPE", node, "tl.dot takes two operands and nothing else", "add to the product instead of acc")
    x, y = tensor(k, node, input), tensor(k, node, other)
    if x is None or y is None:
        return UNKNOWN
    if x.dtype != y.dtype:
        k.report("DOT_DTYPE", node, f"operands are {x.dtype} and {y.dtype}", "one dtype for both")
        return UNKNOWN
    if arithmetic.numbers(k, node, x) is None:
        return UNKNOWN
    try:
        shape = shapes.matmul(x.shape, y.shape)
    except ShapeError as error:
        k.report("DOT_SHAPE", node, str(error), "tl.reshape or tl.broadcast_to first")
        return guess(Origin("matmul", node), (*x.shape[:-1], y.shape[-1])) if x.shape and y.shape else UNKNOWN
    for each in (x, y):
        _judge_order(k, each)
    if not x.guessed and not y.guessed:
        judge_last(k, node, shape, "the product")
    product = k.tensor(
        node,
        "matmul",
        shape,
        (x, y),
        lambda: dialect.MatmulOp.build(operands=[x.value, y.value], result_types=[dialect.tensor(static(shape))]),
    )
    return product if acc is None else assumed(product)


def _is_float32(value: Any) -> bool:
    return isinstance(value, dtype) and value.name == "fp32"


def _judge_order(k: Interpreter, x: Tensor) -> None:
    """Report a transposition of what was broadcast."""
    origin = x.origin
    while origin.name == "reshape":
        origin = origin.operands[0].origin
    if origin.name != "transpose":
        return
    node, before = origin.node, origin.operands[0].origin
    while before.name == "reshape":
        before = before.operands[0].origin
    if before.name == "broadcast":
        message = "an operand of tl.dot is broadcast and then transposed, which is not fused"
        k.report("MATMUL_ORDER", node, message, "tl.permute first, then tl.broadcast_to")


# Elementwise


def _elementwise(name: str, k: Interpreter, node: ast.AST, *operands: Any) -> Any:
    return arithmetic.elementwise(k, node, name, *operands)


def _of_two(name: str, k: Interpreter, node: ast.AST, x: Any, y: Any, option: Any) -> Any:
    result = _elementwise(name, k, node, x, y)
    if option not in (None, False):
        k.report("UNSUPPORTED_OP", node, "x and y are all that can be given")
        return assumed(result) if isinstance(result, Tensor) else result
    return result


HANDLERS.update({name: partial(_elementwise, name) for name in dialect.UNARY})
HANDLERS.update(maximum=partial(_of_two, "maximum"), minimum=partial(_of_two, "minimum"), fdiv=partial(_of_two, "div"))


@handler
def where(k: Interpreter, node: ast.AST, condition: Any, x: Any, y: Any) -> Any:
    """``tl.where``."""
    if not isinstance(condition, Tensor) or not condition.is_condition:
        if condition not in (UNKNOWN, UNDECIDED):
            k.report("SHAPE", node, "the condition of tl.where is no comparison of tensors")
        return UNKNOWN
    return arithmetic.elementwise(k, node, "select", condition, x, y)


# Reductions


def _reduce(name: str, k: Interpreter, node: ast.AST, input: Any, axis: Any, keep_dims: Any, indices: Any) -> Any:
    x = numbers(k, node, input)
    if indices not in (False, None):
        k.report("UNSUPPORTED_OP", node, f"tl.{name} gives no indices")
        return UNKNOWN
    if x is None:
        return UNKNOWN
    rank = len(x.shape)
    one = None if axis is None else integer(k, node, axis, "the axis")
    if axis is not None and one is None:
        return UNKNOWN
    axes = shaped(k, node, lambda: tuple(range(rank)) if one is None else (shapes.axis(one, rank),))
    if axes is None:
        return UNKNOWN
    if axes != (rank - 1,):
        what = "all axes are" if axis is None else f"axis {axis} is"
        message = f"{what} reduced; the device reduces the last of {rank} dimensions"
        k.report("REDUCE_AXIS", node, message, f"tl.permute, then axis={rank - 1}")
    if isinstance(keep_dims, Symbolic) or keep_dims in (UNKNOWN, UNDECIDED):
        return UNKNOWN
    if not keep_dims:
        what = f"axis={axis}" if axis is not None else ""
        message = f"tl.{name}({what}) drops the reduced axis; RBLN kernels need keep_dims=True"
        k.report("KEEP_DIMS", node, message, _with_keep_dims(node))
    for each in reversed(static(axes)):
        x = _reduced(k, node, name, x, each)
        if not keep_dims:
            x = reshaped(k, node, x, shapes.reduce(x.shape, each, keep_dims=False))
    return x


def _reduced(k: Interpreter, node: ast.AST, name: str, x: Tensor, axis: int) -> Tensor:
    shape = shapes.reduce(x.shape, axis)
    return k.tensor(
        node,
        "reduce",
        shape,
        (x,),
        lambda: dialect.ReduceOp.build(
            operands=[x.value],
            properties={"function": StringAttr(name), "axis": IntegerAttr(axis, 64)},
            result_types=[dialect.tensor(static(shape))],
        ),
    )


def _with_keep_dims(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return "keep_dims=True"
    keywords = [each for each in node.keywords if each.arg != "keep_dims"]
    keywords.append(ast.keyword("keep_dims", ast.Constant(True)))
    return ast.unparse(ast.Call(node.func, node.args, keywords))


@handler
def max_(k: Interpreter, node: ast.AST, input: Any, axis: Any, return_indices: Any, tie: Any, keep_dims: Any) -> Any:
    """``tl.max``."""
    return _reduce("max", k, node, input, axis, keep_dims, return_indices)


@handler
def min_(k: Interpreter, node: ast.AST, input: Any, axis: Any, return_indices: Any, tie: Any, keep_dims: Any) -> Any:
    """``tl.min``."""
    return _reduce("min", k, node, input, axis, keep_dims, return_indices)


@handler
def sum_(k: Interpreter, node: ast.AST, input: Any, axis: Any = None, keep_dims: Any = False, dtype: Any = None) -> Any:
    """``tl.sum``."""
    result = _reduce("sum", k, node, input, axis, keep_dims, False)
    if dtype is not None and not _is_data(k, node, dtype):
        return assumed(result) if isinstance(result, Tensor) else result
    return result


# Compile time


@handler
def static_range(k: Interpreter, node: ast.AST, *bounds: Any, **named: Any) -> Any:
    """``tl.static_range`` where there is no loop."""
    k.report("SYNTAX", node, "a range is what a for loop runs over")
    return UNKNOWN


HANDLERS["range"] = static_range


@handler
def static_assert(k: Interpreter, node: ast.AST, cond: Any, msg: Any = "") -> None:
    """``tl.static_assert``."""
    text = ast.unparse(node.args[0]) if isinstance(node, ast.Call) and node.args else ""
    k.static_assert(node, cond, text, msg if isinstance(msg, str) else "")


@handler
def static_print(k: Interpreter, node: ast.AST, *values: Any, sep: Any = " ", end: Any = "\n", **rest: Any) -> None:
    """``tl.static_print``: prints where a program is built, and not where a file is only checked."""
    if k.builder is not None:
        print(*values, sep=sep if isinstance(sep, str) else " ", end=end if isinstance(end, str) else "\n")


# Casts


def cast(
    k: Interpreter, node: ast.AST, value: Any, dtype: Any = None, fp_downcast_rounding: Any = None, bitcast: Any = False
) -> Any:
    """``value.to(dtype)`` and ``value.cast(dtype)``: no more than a name of the dtype that it has."""
    if dtype in (UNKNOWN, UNDECIDED) or isinstance(dtype, Symbolic):
        return UNKNOWN
    if isinstance(value, Index):
        if _is_dtype(dtype) and dtype.is_int():
            return value
        k.report("DYN_USE", node, "an index stays an integer", "index.cast(tl.int32)")
        return Index(value.block, value.maximum, None, value.root)
    if isinstance(value, Tensor):
        if _is_dtype(dtype) and dtype == value.dtype:
            return value
        message = f"a cast from {value.dtype} to {dtype}; data is float32"
        k.report("UNSUPPORTED_OP", node, message, "cast in the wrapper")
        return assumed(value)
    if isinstance(value, Argument):
        value.uses.add("scalar")
        message = f"'{value.name}' is cast; what a 0-d tensor holds can only be multiplied with a tensor"
        k.report("SCALAR_PARAM", node, message, "cast in the wrapper")
    else:
        k.report("SYNTAX", node, "only tensors and indices have dtypes")
    return UNKNOWN


def _is_dtype(value: Any) -> bool:
    return isinstance(value, dtype)
