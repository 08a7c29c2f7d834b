"""The functions of ``rblib``: indices that are read from memory, rows of a cache, softmax, flash attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import FloatAttr, IndexType, IntegerAttr, f32, i1

from tilewright.npu import shapes
from tilewright.npu.front import arithmetic
from tilewright.npu.front.memory import address, judge_data, stored
from tilewright.npu.front.operands import assumed, block, integer, numbers, shaped, sizes, static, tensor
from tilewright.npu.front.operations import permute
from tilewright.npu.front.values import FLOAT, UNKNOWN, Block, Flag, Index, Origin, Tensor
from tilewright.npu.ir import dialect
from tilewright.npu.language import float32
from tilewright.npu.symbols import Symbolic

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable

    from xdsl.ir import Operation

    from tilewright.npu.front.interpreter import Interpreter
    from tilewright.npu.shapes import Shape

HANDLERS: dict[str, Callable[..., Any]] = {}
"""What computes each function's result, by its name."""

FLASH_HINT = "rblib.dynamic_masked_softmax where one partition holds the sequence"


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a function here under its name."""
    HANDLERS[function.__name__.rstrip("_")] = function
    return function


def index(k: Interpreter, node: ast.AST, value: Any, what: str) -> Index | None:
    """An index that was read from memory."""
    if isinstance(value, Index):
        return value
    if value is not UNKNOWN:
        message = f"{what} is no index that rblib.to_dynamic_index gives"
        k.report("DYN_USE", node, message, "rblib.to_dynamic_index(block_pointer)")
    return None


def _attribute(value: int) -> IntegerAttr[Any]:
    return IntegerAttr(value, 64)


# Indices


@handler
def to_dynamic_index(k: Interpreter, node: ast.AST, pointer: Any, max: Any = -1) -> Any:
    """``rblib.to_dynamic_index``."""
    if not isinstance(pointer, Block):
        if pointer is not UNKNOWN:
            message = "an index is read through a block pointer to one element of an int32 table"
            k.report("RAWPTR", node, message, "rblib.to_dynamic_index(tl.make_block_ptr(...))")
        return UNKNOWN
    profile, base = k.diagnostics.profile, pointer.base
    base.uses.add("index")
    if any(size != 1 for size in pointer.sizes):
        k.report(
            "SHAPE", node, f"a block {shapes.text(pointer.sizes)} holds more than one index", "block_shape of ones"
        )
        return UNKNOWN
    if any(isinstance(offset, Index) for offset in pointer.offsets):
        k.report("DYN_USE", node, "an index is read at a place that is static")
        return UNKNOWN
    if base.spec is not None and base.spec.dtype.name not in profile.index_dtypes:
        message = f"'{base.name}' is {base.spec.dtype}; indices are {' or '.join(profile.index_dtypes)}"
        k.report("INDEX_DTYPE", node, message, f"{base.name}.to(torch.int32) in the operator's wrapper")
        if base.spec.dtype.is_floating():
            return UNKNOWN
    least, greatest = profile.index_ranks
    if not least <= len(pointer.sizes) <= greatest:
        message = f"'{base.name}' has {len(pointer.sizes)} dimensions; tables have {least} to {greatest}"
        k.report("RANK", pointer.node, message)
    if not isinstance(max, int | Symbolic) and max is not UNKNOWN:
        k.report("DYN_USE", node, "the largest value of an index is a constexpr", "PARTITION_SIZE")
    if not isinstance(max, int | Symbolic):
        max = -1
    memory = address(k, node, pointer)

    def make() -> Operation:
        properties = {"max": _attribute(int(max))}
        return dialect.IndexOp.build(operands=[memory.value], properties=properties, result_types=[IndexType()])

    return Index(pointer, max, k.emit(node, make, memory)[0])


@handler
def partition_skip(k: Interpreter, node: ast.AST, given: Any) -> Any:
    """``rblib.partition_skip``. The partition's size is told by the index, or by what it is used for next."""
    asked = index(k, node, given, "what is asked for its partition")
    if asked is None:
        return UNKNOWN
    if asked.root is not None:
        k.report("DYN_USE", node, "a partition is told by its count of rows, to which nothing is added")
        return Flag(None)
    source = asked.source
    base, position = source.block.base, source.block.offsets

    def make() -> Operation:
        properties = {"position": dialect.integers([int(each) for each in position]), "partition_size": _attribute(-1)}  # type: ignore[arg-type]
        return dialect.PartitionSkipOp.build(operands=[base.value], properties=properties, result_types=[i1])

    value = k.emit(node, make, base)[0]
    if value is not None:
        k.skips.append((node, source, value.owner))  # type: ignore[arg-type]
    return Flag(value)


# Memory


def _dynamic(k: Interpreter, node: ast.AST, pointer: Block, axis: Any, given: Any) -> tuple[int, Index | None] | None:
    at = integer(k, node, axis, "the axis")
    if at is None:
        return None
    checked = shaped(k, node, lambda: (shapes.axis(at, len(pointer.sizes)),))
    if checked is None:
        return None
    until = None
    if given is not None:
        until = index(k, node, given, "the end of what is accessed")
        if until is None:
            return None
        until.source.rows = pointer.sizes[at]
    return int(checked[0]), until  # type: ignore[arg-type]


@handler
def dynamic_load(k: Interpreter, node: ast.AST, pointer: Any, axis: Any = -1, index: Any = None) -> Any:
    """``rblib.dynamic_load``."""
    source = block(k, node, pointer, "rblib.dynamic_load")
    if source is None:
        return UNKNOWN
    source.base.uses.add("load")
    judge_data(k, node, source)
    where = _dynamic(k, node, source, axis, index)
    if where is None:
        return Tensor(source.sizes, float32, Origin("load", node))
    at, until = where
    memory = address(k, node, source)
    operands = (memory,) if until is None else (memory, until)
    return k.tensor(
        node,
        "load",
        source.sizes,
        operands,
        lambda: dialect.DynLoadOp.build(
            operands=[memory.value, [] if until is None else [until.value]],
            properties={"axis": _attribute(at)},
            result_types=[dialect.tensor(static(source.sizes))],
        ),
    )


@handler
def dynamic_store(k: Interpreter, node: ast.AST, pointer: Any, value: Any, axis: Any = -1, index: Any = None) -> Any:
    """``rblib.dynamic_store``."""
    target = block(k, node, pointer, "rblib.dynamic_store")
    if target is None:
        return UNKNOWN
    target.base.uses.add("store")
    judge_data(k, node, target)
    where, given = _dynamic(k, node, target, axis, index), stored(k, node, target, value)
    if where is None or given is None:
        return UNKNOWN
    at, until = where
    memory = address(k, node, target)

    def make() -> Operation:
        operands = [given.value, memory.value, [] if until is None else [until.value]]
        return dialect.DynStoreOp.build(operands=operands, properties={"axis": _attribute(at)})

    operands = (given, memory) if until is None else (given, memory, until)
    k.emit(node, make, *operands)
    return None if k.builder is None or all(each.value is not None for each in operands) else UNKNOWN


# Rows


@handler
def insert(k: Interpreter, node: ast.AST, data: Any, updates: Any, axis: Any, given: Any) -> Any:
    """``rblib.insert``."""
    x, y = numbers(k, node, data, "data"), numbers(k, node, updates, "updates")
    start, at = index(k, node, given, "the place of the rows"), integer(k, node, axis, "the axis")
    if x is None or y is None or start is None or at is None:
        return UNKNOWN if x is None else assumed(x)
    shape = shaped(k, node, lambda: shapes.insert(x.shape, y.shape, at))
    if shape is None:
        return assumed(x)
    start.source.rows = x.shape[at]
    return _rows(k, node, "insert", dialect.InsertOp, (x, y, start), shape, axis=shapes.axis(at, len(x.shape)))


@handler
def window_insert(k: Interpreter, node: ast.AST, base: Any, state: Any, axis: Any, start: Any) -> Any:
    """``rblib.window_insert``."""
    x, y = numbers(k, node, base, "base"), numbers(k, node, state, "state")
    first, at = index(k, node, start, "the start of the rows"), integer(k, node, axis, "the axis")
    if x is None or y is None or first is None or at is None:
        return UNKNOWN
    shape = shaped(k, node, lambda: shapes.window_insert(x.shape, y.shape, at))
    if shape is None:
        return UNKNOWN
    properties = {"axis": shapes.axis(at, len(x.shape))}
    return _rows(k, node, "window_insert", dialect.WindowInsertOp, (x, y, first), shape, **properties)


@handler
def window_slice(k: Interpreter, node: ast.AST, x: Any, end: Any, axis: Any, size: Any) -> Any:
    """``rblib.window_slice``."""
    given, last = numbers(k, node, x, "x"), index(k, node, end, "the end of the rows")
    at, rows = integer(k, node, axis, "the axis"), sizes(k, node, (size,), "the size")
    if given is None or last is None or at is None or rows is None:
        return UNKNOWN
    shape = shaped(k, node, lambda: shapes.with_size(given.shape, at, rows[0]))
    if shape is None:
        return UNKNOWN
    properties = {"axis": shapes.axis(at, len(given.shape)), "size": rows[0]}
    return _rows(k, node, "window_slice", dialect.WindowSliceOp, (given, last), shape, **properties)


@handler
def nn_pad(k: Interpreter, node: ast.AST, x: Any, value: Any, axis: Any, pad: Any, mode: Any = "constant") -> Any:
    """``rblib.nn_pad``."""
    given, at = numbers(k, node, x, "x"), integer(k, node, axis, "the axis")
    ends = sizes(k, node, pad, "the padding", 0)
    constant = mode == "constant"
    if not constant and mode is not UNKNOWN:
        k.report("UNSUPPORTED_OP", node, f"rblib.nn_pad pads with a constant, not by '{mode}'")
    number = isinstance(value, int | float)
    if not number and value not in (UNKNOWN, FLOAT) and not isinstance(value, Symbolic):
        k.report("SHAPE", node, "what rblib.nn_pad pads with is a number")
    if given is None or at is None or ends is None:
        return UNKNOWN
    if len(ends) != 2:
        k.report("SHAPE", node, f"a padding is a pair of counts, not {shapes.text(ends)}")
        return UNKNOWN
    low, high = ends
    shape = shaped(k, node, lambda: shapes.pad(given.shape, at, low, high))
    if shape is None:
        return UNKNOWN

    def make() -> Operation:
        properties = {
            "axis": _attribute(shapes.axis(at, len(given.shape))),
            "low": _attribute(int(low)),  # type: ignore[arg-type]
            "high": _attribute(int(high)),  # type: ignore[arg-type]
            "value": FloatAttr(float(value), f32),
        }
        result = dialect.tensor(static(shape))
        return dialect.PadOp.build(operands=[given.value], properties=properties, result_types=[result])

    return k.tensor(node, "pad", shape, (given if constant and number else assumed(given),), make)


# Softmax


@handler
def softmax(k: Interpreter, node: ast.AST, x: Any, axis: Any = -1) -> Any:
    """``rblib.softmax``."""
    given, at = numbers(k, node, x, "x"), integer(k, node, axis, "the axis")
    if given is None or at is None:
        return UNKNOWN if given is None else assumed(given)
    rank = len(given.shape)
    axes = shaped(k, node, lambda: (shapes.axis(at, rank),))
    if axes is None:
        return assumed(given)
    if axes == (rank - 1,):
        return _rows(k, node, "softmax", dialect.SoftmaxOp, (given,), given.shape)
    k.report("REDUCE_AXIS", node, f"rblib.softmax along axis {at}; the device reduces the last dimension")
    order = list(range(rank))
    order[at], order[-1] = order[-1], order[at]
    last = permute(k, node, given, *order)
    return permute(k, node, _rows(k, node, "softmax", dialect.SoftmaxOp, (last,), last.shape), *order)


def _scores(k: Interpreter, node: ast.AST, value: Any, what: str = "x") -> Tensor | None:
    """A tensor with rows and columns."""
    given = numbers(k, node, value, what)
    if given is not None and len(given.shape) < 2:
        k.report("SHAPE", node, f"{what} has shape {shapes.text(given.shape)}, which are no rows and columns")
        return None
    return given


@handler
def masked_softmax(k: Interpreter, node: ast.AST, x: Any, mask: Any) -> Any:
    """``rblib.masked_softmax``."""
    given, seen = _scores(k, node, x), tensor(k, node, mask, "the mask")
    if given is None or seen is None:
        return UNKNOWN if given is None else assumed(given)
    if shaped(k, node, lambda: shapes.broadcast_to(seen.shape, given.shape)) is None:
        return assumed(given)
    return _rows(k, node, "masked_softmax", dialect.MaskedSoftmaxOp, (given, seen), given.shape)


@handler
def dynamic_masked_softmax(k: Interpreter, node: ast.AST, x: Any, given: Any) -> Any:
    """``rblib.dynamic_masked_softmax``."""
    scores, first = _scores(k, node, x), index(k, node, given, "what rows see up to")
    if scores is None or first is None:
        return UNKNOWN if scores is None else assumed(scores)
    return _rows(k, node, "softmax", dialect.DynamicMaskedSoftmaxOp, (scores, first), scores.shape)


@handler
def window_softmax(k: Interpreter, node: ast.AST, x: Any, start: Any, window_size: Any) -> Any:
    """``rblib.window_softmax``."""
    scores, first = _scores(k, node, x), index(k, node, start, "the first row")
    size = sizes(k, node, (window_size,), "window_size")
    if scores is None or first is None or size is None:
        return UNKNOWN if scores is None else assumed(scores)
    properties = {"window_size": size[0]}
    return _rows(k, node, "softmax", dialect.WindowSoftmaxOp, (scores, first), scores.shape, **properties)


# Flash attention


def _tile(k: Interpreter, node: ast.AST, op: type[Operation], scores: Tensor, seen: Any, previous: Any) -> Any:
    k.flash_tiles.append(node)
    rows = shapes.reduce(scores.shape, -1)
    before = None
    if previous is not None:
        given = numbers(k, node, previous, "row_max_prev")
        if given is None or shaped(k, node, lambda: shapes.broadcast_to(given.shape, rows)) is None:
            return (UNKNOWN, UNKNOWN, UNKNOWN)
        before = arithmetic.broadcast_to(k, node, given, rows)

    def make() -> Operation:
        kinds = [dialect.tensor(static(shape)) for shape in (rows, scores.shape, rows)]
        operands = [scores.value, seen.value, [] if before is None else [before.value]]
        return op.build(operands=operands, result_types=kinds)  # type: ignore[attr-defined, no-any-return]

    operands = (scores, seen) if before is None else (scores, seen, before)
    values = k.emit(node, make, *operands)
    return tuple(
        Tensor(shape, scores.dtype, Origin("flash_tile", node), value)
        for shape, value in zip((rows, scores.shape, rows), values, strict=True)
    )


@handler
def flash_attn_tile(k: Interpreter, node: ast.AST, qk: Any, mask: Any, row_max_prev: Any = None) -> Any:
    """``rblib.flash_attn_tile``."""
    scores, seen = _scores(k, node, qk, "qk"), tensor(k, node, mask, "the mask")
    if scores is None or seen is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN)
    if shaped(k, node, lambda: shapes.broadcast_to(seen.shape, scores.shape)) is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN)
    return _tile(k, node, dialect.FlashTileOp, scores, seen, row_max_prev)


@handler
def dynamic_flash_attn_tile(k: Interpreter, node: ast.AST, qk: Any, given: Any, row_max_prev: Any = None) -> Any:
    """``rblib.dynamic_flash_attn_tile``."""
    scores, first = _scores(k, node, qk, "qk"), index(k, node, given, "what rows see up to")
    if scores is None or first is None:
        return (UNKNOWN, UNKNOWN, UNKNOWN)
    return _tile(k, node, dialect.DynamicFlashTileOp, scores, first, row_max_prev)


HANDLERS["causal_flash_attn_tile"] = dynamic_flash_attn_tile


@handler
def flash_attn_recompute(k: Interpreter, node: ast.AST, *values: Any) -> Any:
    """``rblib.flash_attn_recompute``."""
    k.recomputes += 1
    names = ("row_max_prev", "row_max", "row_sum_prev", "row_sum", "out_prev", "out")
    given = [numbers(k, node, value, name) for value, name in zip(values, names, strict=True)]
    if any(each is None for each in given):
        return (UNKNOWN, UNKNOWN)
    tensors: list[Tensor] = [each for each in given if each is not None]
    rows, out = tensors[0].shape, tensors[4].shape
    if any(shapes.differ(each.shape, rows) for each in tensors[:4]) or shapes.differ(tensors[5].shape, out):
        found = ", ".join(f"{name} {shapes.text(each.shape)}" for name, each in zip(names, tensors, strict=True))
        k.report("SHAPE", node, f"maxima and sums have one shape, outputs another: {found}")
        return (UNKNOWN, UNKNOWN)
    if shaped(k, node, lambda: shapes.broadcast_to(rows, out)) is None:
        return (UNKNOWN, UNKNOWN)

    def make() -> Operation:
        kinds = [dialect.tensor(static(rows)), dialect.tensor(static(out))]
        return dialect.FlashRecomputeOp.build(operands=[each.value for each in tensors], result_types=kinds)

    values = tuple(k.emit(node, make, *tensors))
    return tuple(
        Tensor(shape, tensors[0].dtype, Origin("flash_recompute", node), value)
        for shape, value in zip((rows, out), values, strict=False)
    )


def _rows(
    k: Interpreter,
    node: ast.AST,
    name: str,
    op: type[Operation],
    operands: tuple[Any, ...],
    shape: Shape,
    **properties: Any,
) -> Tensor:
    """The one tensor that an operation with integer attributes gives."""

    def make() -> Operation:
        return op.build(  # type: ignore[attr-defined, no-any-return]
            operands=[each.value for each in operands],
            properties={key: _attribute(int(value)) for key, value in properties.items()},
            result_types=[dialect.tensor(static(shape))],
        )

    return k.tensor(node, name, shape, operands, make)
