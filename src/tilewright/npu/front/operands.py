"""What a kernel gives to a function of the language: sizes, integers, tensors, block pointers, or a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilewright.npu.front import arithmetic
from tilewright.npu.front.values import FLOAT, UNDECIDED, UNKNOWN, Argument, Block, Index, Origin, Tensor
from tilewright.npu.language import float32
from tilewright.npu.shapes import ShapeError
from tilewright.npu.symbols import Symbolic

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable

    from tilewright.npu.front.interpreter import Interpreter
    from tilewright.npu.shapes import Shape


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
