"""Block pointers, and what is loaded and stored through them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import MemRefType

from tilewright.npu import shapes
from tilewright.npu.front import arithmetic
from tilewright.npu.front.builder import element_type
from tilewright.npu.front.operands import assumed, block, numbers, sizes, static
from tilewright.npu.front.values import UNKNOWN, Argument, Block, Index, Memory, Tensor
from tilewright.npu.ir import dialect
from tilewright.npu.symbols import Symbolic, equal, less

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable

    from tilewright.npu.front.interpreter import Interpreter
    from tilewright.npu.shapes import Shape
    from tilewright.npu.symbols import Size

HANDLERS: dict[str, Callable[..., Any]] = {}
"""What computes each function's result, by its name."""


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a function here under its name."""
    HANDLERS[function.__name__.rstrip("_")] = function
    return function


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
