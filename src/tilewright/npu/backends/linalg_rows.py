"""Functions of elements and of rows in linalg: arithmetic, reductions, softmax, the tiles of flash attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from xdsl.dialects import arith
from xdsl.dialects import math as functions
from xdsl.dialects.builtin import i1

from tilewright.errors import NpuProgramError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xdsl.ir import Operation, SSAValue

    from tilewright.npu.backends.linalg_builder import Builder, Tile

_UNARY: dict[str, Callable[..., Operation]] = {
    "abs": functions.AbsFOp,
    "ceil": functions.CeilOp,
    "cos": functions.CosOp,
    "erf": functions.ErfOp,
    "exp": functions.ExpOp,
    "exp2": functions.Exp2Op,
    "floor": functions.FloorOp,
    "log": functions.LogOp,
    "log2": functions.Log2Op,
    "neg": arith.NegfOp,
    "rsqrt": functions.RsqrtOp,
    "sin": functions.SinOp,
    "sqrt": functions.SqrtOp,
}
_BINARY: dict[str, Callable[..., Operation]] = {
    "add": arith.AddfOp,
    "sub": arith.SubfOp,
    "mul": arith.MulfOp,
    "div": arith.DivfOp,
    "maximum": arith.MaximumfOp,
    "minimum": arith.MinimumfOp,
}
_PREDICATES = {"lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge", "eq": "oeq", "ne": "une"}
"""Nothing compares with NaN, but that it is unequal."""

_REDUCTIONS: dict[str, tuple[Callable[..., Operation], float]] = {
    "max": (arith.MaximumfOp, -math.inf),
    "min": (arith.MinimumfOp, math.inf),
    "sum": (arith.AddfOp, 0.0),
}


def elementwise(b: Builder, function: str, tiles: Sequence[Tile]) -> Tile:
    """A function of the elements at one place.

    Raises:
        NpuProgramError: there is no such function.
    """
    if function in _PREDICATES:
        predicate = _PREDICATES[function]
        return b.map(lambda x, y: b.add(arith.CmpfOp(b.number(x), b.number(y), predicate)), *tiles, element=i1)
    if function == "select":
        return b.map(lambda condition, x, y: _select(b, condition, b.number(x), b.number(y)), *tiles)
    if function == "sigmoid":
        return b.map(lambda x: _sigmoid(b, b.number(x)), *tiles)
    operation = _UNARY.get(function) or _BINARY.get(function)
    if operation is None:
        raise NpuProgramError(f"linalg: there is no function '{function}'")
    return b.map(lambda *elements: b.add(operation(*(b.number(each) for each in elements))), *tiles)


def reduce(b: Builder, function: str, tile: Tile, axis: int) -> Tile:
    """The greatest, the least or the sum along an axis, which keeps size 1.

    Raises:
        NpuProgramError: there is no such reduction.
    """
    if function not in _REDUCTIONS:
        raise NpuProgramError(f"linalg: there is no reduction '{function}'")
    operation, start = _REDUCTIONS[function]
    return b.reduce(lambda so_far, x: b.add(operation(so_far, x)), tile, axis, start)


def matmul(b: Builder, lhs: Tile, rhs: Tile) -> Tile:
    """The product of the matrices in the last two dimensions."""
    *batch, rows, inner = lhs.shape
    columns = rhs.shape[-1]
    n = len(batch)
    space = (*batch, rows, columns, inner)
    left = lhs.placed([*range(n), n, n + 2], space)
    right = rhs.placed([*range(n), n + 2, n + 1], space)

    def body(x: SSAValue, y: SSAValue, so_far: SSAValue) -> SSAValue:
        return b.add(arith.AddfOp(so_far, b.add(arith.MulfOp(b.number(x), b.number(y)))))

    product = b.generic(body, [left, right], space, reduced=[n + 2])
    return product.placed([*range(n + 2), -1], space[:-1])


# Softmax along the last axis


def hidden(b: Builder, scores: Tile, mask: Tile) -> Tile:
    """The scores where the mask is greater than zero, and minus infinity."""

    def body(x: SSAValue, seen: SSAValue) -> SSAValue:
        greater = b.add(arith.CmpfOp(b.number(seen), b.constant(0.0), "ogt"))
        return _select(b, greater, b.number(x), b.constant(-math.inf))

    return b.map(body, scores, b.broadcast(mask, scores.shape))


def hidden_behind(b: Builder, scores: Tile, index: SSAValue, window: int | None = None) -> Tile:
    """The scores of the columns ``index + i - window < j <= index + i`` in row ``i``, and minus infinity."""

    def body(x: SSAValue) -> SSAValue:
        last = b.add(arith.AddiOp(index, b.place(scores.rank - 2)))
        column = b.place(scores.rank - 1)
        seen = b.add(arith.CmpiOp(column, last, "sle"))
        if window is not None:
            first = b.add(arith.SubiOp(last, b.index(window)))
            seen = b.add(arith.AndIOp(seen, b.add(arith.CmpiOp(column, first, "sgt"))))
        return _select(b, seen, b.number(x), b.constant(-math.inf))

    return b.map(body, scores)


def softmax(b: Builder, scores: Tile) -> Tile:
    """Softmax; NaN in rows that see nothing."""
    _, exponentials, total = flash_tile(b, scores, None)
    return elementwise(b, "div", [exponentials, b.broadcast(total, scores.shape)])


def flash_tile(b: Builder, scores: Tile, previous: Tile | None) -> tuple[Tile, Tile, Tile]:
    """Of each row the greatest so far, the exponentials, their sum."""
    top = reduce(b, "max", scores, scores.rank - 1)
    if previous is not None:
        top = elementwise(b, "maximum", [top, b.broadcast(previous, top.shape)])
    exponentials = _exponentials(b, scores, b.broadcast(top, scores.shape))
    return top, exponentials, reduce(b, "sum", exponentials, scores.rank - 1)


def flash_recompute(b: Builder, *tiles: Tile) -> tuple[Tile, Tile]:
    """Two partitions put together: sums and outputs."""
    top_before, top, sum_before, total, out_before, out = tiles
    factor = _exponentials(b, top_before, top)

    def body(a: SSAValue, before: SSAValue, now: SSAValue) -> SSAValue:
        return b.add(arith.AddfOp(b.add(arith.MulfOp(a, b.number(before))), b.number(now)))

    return b.map(body, factor, sum_before, total), b.map(body, b.broadcast(factor, out.shape), out_before, out)


def _exponentials(b: Builder, x: Tile, top: Tile) -> Tile:
    return b.map(lambda e, m: b.add(functions.ExpOp(b.add(arith.SubfOp(b.number(e), b.number(m))))), x, top)


def _select(b: Builder, condition: SSAValue, x: SSAValue, y: SSAValue) -> SSAValue:
    return b.add(arith.SelectOp(condition, x, y))


def _sigmoid(b: Builder, x: SSAValue) -> SSAValue:
    one = b.constant(1.0)
    return b.add(arith.DivfOp(one, b.add(arith.AddfOp(one, b.add(functions.ExpOp(b.add(arith.NegfOp(x))))))))
