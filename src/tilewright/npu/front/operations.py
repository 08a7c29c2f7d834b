"""The functions of ``tl``: what each gives, which rules it may break, and what is built for it."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import IntegerAttr, MemRefType, StringAttr

from tilewright.npu import shapes
from tilewright.npu.front import arithmetic
from tilewright.npu.front.builder import element_type
from tilewright.npu.front.values import (
    FLOAT,
    UNDECIDED,
    UNKNOWN,
    Argument,
    Block,
    Index,
    Memory,
    Origin,
    Tensor,
    guess,
)
from tilewright.npu.ir import dialect
from tilewright.npu.language import float32
from tilewright.npu.language.core import dtype, pointer_type
from tilewright.npu.shapes import ShapeError
from tilewright.npu.symbols import Symbolic, equal, less

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.npu.front.interpreter import Interpreter
    from tilewright.npu.language.core import Builtin
    from tilewright.npu.shapes import Shape
    from tilewright.npu.symbols import Size

HANDLERS: dict[str, Callable[..., Any]] = {}
"""What computes each function's result, by its name."""


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a function here under its name."""
    HANDLERS[function.__name__.rstrip("_")] = function
    return function


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


# What arguments may be


def sizes(k: Interpreter, node: ast.AST, value: Any, what: str, least: float = 1) -> Shape | None:
    """A tuple of sizes; None, and a report where there is something to report, if it is none."""
    if isinstance(value, Symbolic):  # a constexpr may be a tuple
        return None
    if isinstance(value, int):
        value = (value,)
    if not isinstance(value, tuple):
        if value not in (UNKNOWN, UNDECIDED):
            k.report("DYN_SHAPE", node, f"{what} is no tuple of constexprs")
        return None
    known = True
    for each in value:
        if isinstance(each, Index | Argument | Tensor | Block):
            name = f"'{each.name}'" if isinstance(each, Argument) else "a value of the device"
            message = f"{what} cannot have {name} in it: shapes are static"
            k.report("DYN_SHAPE", node, message, f"{getattr(each, 'name', 'SIZE')}: tl.constexpr")
            return None
        if each in (UNKNOWN, UNDECIDED):
            known = False
        elif not isinstance(each, int | Symbolic) or isinstance(each, bool):
            shown = "a fraction" if each is FLOAT else repr(each)
            k.report("DYN_SHAPE", node, f"{what} has {shown} in it, which is no size", "// instead of /")
            return None
        elif isinstance(each, int) and each < least:
            k.report("SHAPE", node, f"{what} has {each} in it, and sizes are {least} or more")
            return None
    return value if known else None


def integer(k: Interpreter, node: ast.AST, value: Any, what: str) -> int | None:
    """A number that is known."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, Symbolic) and value not in (UNKNOWN, UNDECIDED):
        k.report("DYN_SHAPE", node, f"{what} is no constexpr integer")
    return None


def tensor(k: Interpreter, node: ast.AST, value: Any, what: str = "an operand") -> Tensor | None:
    """A tensor; a number becomes one."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int | float):
        made = arithmetic.number(k, node, value)
        return made if isinstance(made, Tensor) else None
    if value is FLOAT or isinstance(value, Symbolic):
        return Tensor((), float32, Origin("number", node))
    if isinstance(value, Argument | Block):
        kind = "a block pointer" if isinstance(value, Block) else "a tensor in memory"
        k.report("RAWPTR", node, f"{what} is {kind}, which has to be loaded", "tl.load(tl.make_block_ptr(...))")
    elif isinstance(value, Index):
        k.report("DYN_USE", node, f"{what} is an index that was read from memory")
    elif value not in (UNKNOWN, UNDECIDED):
        k.report("SHAPE", node, f"{what} is no tensor")
    return None


def numbers(k: Interpreter, node: ast.AST, value: Any, what: str = "an operand") -> Tensor | None:
    """A tensor that holds numbers, and no conditions."""
    return arithmetic.numbers(k, node, tensor(k, node, value, what))


def assumed(value: Tensor) -> Tensor:
    """What a result looks like that is not built, for the rules that what follows may break."""
    return Tensor(value.shape, value.dtype, value.origin, None, value.guessed)


def block(k: Interpreter, node: ast.AST, value: Any, what: str) -> Block | None:
    """A block pointer."""
    if isinstance(value, Block):
        return value
    if value is not UNKNOWN:
        k.report("RAWPTR", node, f"{what} takes a block pointer", "tl.make_block_ptr(...)")
    return None


def spread(values: tuple[Any, ...]) -> Any:
    """``f(x, 1, 2)`` and ``f(x, (1, 2))`` mean one thing."""
    return values[0] if len(values) == 1 and isinstance(values[0], tuple) else tuple(values)


def shaped(k: Interpreter, node: ast.AST, compute: Callable[[], Shape]) -> Shape | None:
    """A shape, or a report that operands do not fit."""
    try:
        return compute()
    except ShapeError as error:
        k.report("SHAPE", node, str(error))
        return None


def static(shape: Shape) -> tuple[int, ...]:
    """A shape of numbers, as it is wherever something is built."""
    return tuple(int(size) for size in shape)  # type: ignore[arg-type]


# Memory


@handler
def make_block_ptr(
    k: Interpreter, node: ast.AST, base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any, order: Any
) -> Any:
    """``tl.make_block_ptr``."""
    if not isinstance(base, Argument):
        if base is not UNKNOWN:
            k.report("RAWPTR", node, "the base of a block pointer is a parameter of the kernel, not an address")
        return UNKNOWN
    given_shape = sizes(k, node, shape, "the shape")
    given_strides = sizes(k, node, strides, "the strides", -math.inf)
    given_sizes = sizes(k, node, block_shape, "block_shape")
    if given_shape is None or given_strides is None or given_sizes is None:
        return UNKNOWN
    if offsets is UNKNOWN or isinstance(offsets, Symbolic):
        return UNKNOWN
    rank = len(given_shape)
    places = offsets if isinstance(offsets, tuple) else (offsets,)
    if order is UNKNOWN or isinstance(order, Symbolic):
        order = (UNKNOWN,) * rank
    order = order if isinstance(order, tuple) else (order,)
    if {len(given_strides), len(given_sizes), len(places), len(order)} != {rank}:
        k.report("SHAPE", node, f"shape, strides, offsets, block_shape and order have {rank} entries each")
        return UNKNOWN
    if UNKNOWN in places or not all(isinstance(each, int | Symbolic | Index) for each in places):
        if UNKNOWN not in places:
            k.report("DYN_USE", node, "an offset is a constexpr, or an index that rblib.to_dynamic_index gives")
        return UNKNOWN
    known = all(isinstance(each, int) for each in order)
    if (known and sorted(order) != list(range(rank))) or any(isinstance(each, float | str) for each in order):
        k.report("SHAPE", node, f"order {order} is no permutation of the {rank} dimensions")
    made = Block(base, given_shape, given_strides, places, given_sizes, order, node, node)
    _judge_layout(k, node, made)
    _judge_bounds(k, node, made)
    return made


def _judge_layout(k: Interpreter, node: ast.AST, made: Block) -> None:
    contiguous: list[Size] = [1]
    for size in reversed(made.shape[1:]):
        contiguous.insert(0, contiguous[0] * size)
    for axis, (stride, expected) in enumerate(zip(made.strides, contiguous, strict=True)):
        if equal(stride, expected) is False or (equal(stride, expected) is None and stride != expected):
            message = (
                f"stride {stride} of dimension {axis} is not {expected}, that of a contiguous {shapes.text(made.shape)}"
            )
            k.report("STRIDE_MISMATCH", node, message, f"strides=({', '.join(str(each) for each in contiguous)})")
            break
    made.base.seen_shape = made.base.seen_shape or made.shape
    spec = made.base.spec
    if spec is not None and not _same_memory(made.shape, spec.shape, k.diagnostics.profile.last_dim_multiple):
        message = f"'{made.base.name}' is described as {shapes.text(made.shape)}, and is {shapes.text(spec.shape)}"
        k.report("STRIDE_MISMATCH", node, message, "take sizes from the tensor's own shape")


def _same_memory(said: Shape, real: tuple[int, ...], multiple: int) -> bool:
    """Whether a kernel's idea of a tensor is the tensor's, its last dimension padded or not."""
    return (
        len(said) == len(real)
        and said[:-1] == real[:-1]
        and said[-1] in (real[-1], -(-real[-1] // multiple) * multiple)
    )


def _judge_bounds(k: Interpreter, node: ast.AST, made: Block) -> None:
    for axis, (offset, size, whole) in enumerate(zip(made.offsets, made.sizes, made.shape, strict=True)):
        if not isinstance(offset, int):  # a loop's later values may not exist at all
            continue
        if less(offset, 0) or less(whole, offset + size):
            message = f"rows {offset} to {offset + size} of dimension {axis}, which has {whole}"
            k.report("OUT_OF_BOUNDS", node, message)


@handler
def advance(k: Interpreter, node: ast.AST, base: Any, offsets: Any) -> Any:
    """``tl.advance``: a loop's last one may lead behind the tensor, so only what is loaded is judged."""
    pointer = block(k, node, base, "tl.advance")
    steps = sizes(k, node, offsets, "the offsets", -math.inf)
    if pointer is None or steps is None:
        return UNKNOWN
    if len(steps) != len(pointer.offsets):
        k.report("SHAPE", node, f"{len(steps)} offsets for a block pointer of {len(pointer.offsets)} dimensions")
        return UNKNOWN
    if any(isinstance(offset, Index) and step != 0 for offset, step in zip(pointer.offsets, steps, strict=True)):
        k.report(
            "DYN_USE", node, "an offset that was read from memory cannot be advanced", "a block pointer of its own"
        )
        return UNKNOWN
    moved = tuple(
        offset if isinstance(offset, Index) else offset + step
        for offset, step in zip(pointer.offsets, steps, strict=True)
    )
    return replace(pointer, offsets=moved, node=node)


@handler
def load(
    k: Interpreter,
    node: ast.AST,
    pointer: Any,
    mask: Any = None,
    other: Any = None,
    boundary_check: Any = (),
    padding_option: Any = "",
    cache_modifier: Any = "",
    eviction_policy: Any = "",
    volatile: Any = False,
) -> Any:
    """``tl.load``."""
    _judge_access(
        k, node, "tl.load", mask, other, boundary_check, padding_option, cache_modifier, eviction_policy, volatile
    )
    source = block(k, node, pointer, "tl.load")
    if source is None:
        return UNKNOWN
    judge_data(k, node, source)
    source.base.uses.add("load")
    memory = address(k, node, source)
    loaded = k.tensor(
        node,
        "load",
        source.sizes,
        (memory,),
        lambda: dialect.LoadOp.build(operands=[memory.value], result_types=[dialect.tensor(static(source.sizes))]),
    )
    return loaded if mask is None and other is None else assumed(loaded)


@handler
def store(
    k: Interpreter,
    node: ast.AST,
    pointer: Any,
    value: Any,
    mask: Any = None,
    boundary_check: Any = (),
    cache_modifier: Any = "",
    eviction_policy: Any = "",
) -> Any:
    """``tl.store``."""
    _judge_access(k, node, "tl.store", mask, None, boundary_check, "", cache_modifier, eviction_policy, False)
    target = block(k, node, pointer, "tl.store")
    if target is None:
        return UNKNOWN
    target.base.uses.add("store")
    judge_data(k, node, target)
    written, memory = stored(k, node, target, value), address(k, node, target)
    if written is None or mask is not None:
        return UNKNOWN
    k.emit(node, lambda: dialect.StoreOp.build(operands=[written.value, memory.value]), written, memory)
    return None if k.builder is None or None not in (written.value, memory.value) else UNKNOWN


def stored(k: Interpreter, node: ast.AST, target: Block, value: Any) -> Tensor | None:
    """The tensor that is written to a block: of its shape or one number, and no bare reduction."""
    given = numbers(k, node, value, "what is stored")
    if given is None:
        return None
    reduced = given.origin
    while reduced.name == "reshape":
        reduced = reduced.operands[0].origin
    if reduced.name == "reduce":
        message = "what a reduction gives is stored itself; the device wants an operation of full rank in between"
        k.report("REDUCE_STORE", node, message, "calculate with it and a tensor of full shape first")
    if given.shape and shapes.differ(given.shape, target.sizes):
        message = f"a tensor {shapes.text(given.shape)} is stored to a block {shapes.text(target.sizes)}"
        k.report("SHAPE", node, message, "tl.broadcast_to or tl.reshape first")
        return None
    return arithmetic.broadcast_to(k, node, given, target.sizes)


def judge_data(k: Interpreter, node: ast.AST, source: Block) -> None:
    """Whether a block of data has a dtype, a rank and a last dimension that the release takes."""
    profile, base, made = k.diagnostics.profile, source.base, source.made
    least, greatest = profile.data_ranks
    if not least <= len(source.sizes) <= greatest:
        message = f"'{base.name}' has {len(source.sizes)} dimensions; data has {least} to {greatest}"
        k.report("RANK", made, message, "dimensions of size 1 in front")
    if base.spec is not None and base.spec.dtype.name not in profile.data_dtypes:
        message = f"'{base.name}' is {base.spec.dtype}; data is {' or '.join(profile.data_dtypes)}"
        k.report("DTYPE", made, message, "cast it in the operator's wrapper")
    judge_last(k, made, source.sizes, f"'{base.name}'")


def judge_last(k: Interpreter, node: ast.AST, shape: Shape, what: str) -> None:
    """Whether the last dimension fills the device's vectors."""
    multiple = k.diagnostics.profile.last_dim_multiple
    last = shape[-1] if shape else 0
    if isinstance(last, int) and last % multiple:
        message = f"the last dimension of {what} is {last}, no multiple of {multiple}"
        k.report(
            "LAST_DIM_64", node, message, "rblib.align_tensor_last_dim_to_64 in the wrapper, rblib.nn_pad in the kernel"
        )


def address(k: Interpreter, node: ast.AST, source: Block) -> Memory:
    """What names a block in the program."""
    indices = [each for each in source.offsets if isinstance(each, Index)]
    offsets = [dialect.DYNAMIC if isinstance(each, Index) else each for each in source.offsets]
    if source.base.spec is not None and not _inside(k, source, source.base.spec.shape):
        return Memory(None)

    def make() -> dialect.BlockOp:
        element = element_type(source.base.element)
        return dialect.BlockOp.build(
            operands=[source.base.value, [each.value for each in indices]],
            properties={"static_offsets": dialect.integers(offsets)},  # type: ignore[arg-type]
            result_types=[MemRefType(element, list(static(source.sizes)))],
        )

    return Memory(k.emit(source.node, make, source.base, *indices)[0])


def _inside(k: Interpreter, source: Block, real: tuple[int, ...]) -> bool:
    """Whether a block lies inside the tensor that is really there; reported where it does not."""
    name = source.base.name
    if len(real) != len(source.sizes):
        message = f"a block of {len(source.sizes)} dimensions of '{name}', which is {shapes.text(real)}"
        k.report("OUT_OF_BOUNDS", source.node, message)
        return False
    for axis, (offset, size, whole) in enumerate(zip(source.offsets, source.sizes, real, strict=True)):
        limit = -(-whole // dialect.PADDING) * dialect.PADDING if axis == len(real) - 1 else whole
        start = 0 if isinstance(offset, Index) else offset
        if less(start, 0) or less(limit, start + size):
            message = f"rows {start} to {start + size} of dimension {axis} of '{name}', which is {shapes.text(real)}"
            k.report("OUT_OF_BOUNDS", source.node, message)
            return False
    return True


def _judge_access(
    k: Interpreter,
    node: ast.AST,
    what: str,
    mask: Any,
    other: Any,
    boundary_check: Any,
    padding_option: Any,
    *hints: Any,
) -> None:
    if mask is not None or other is not None:
        k.report("RAWPTR", node, f"{what} of a block pointer has no mask", "block_shape says what is accessed")
    if boundary_check not in ((), None, "") or padding_option not in ("", None):
        k.report(
            "BOUNDARY_CHECK",
            node,
            f"{what} has no boundary_check and no padding_option",
            "blocks that divide the shape",
        )
    if any(hint not in ("", None, False) for hint in hints):
        k.report("UNSUPPORTED_OP", node, f"{what} takes no hints for caches")


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
