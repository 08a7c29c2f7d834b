"""Sizes without values: what is claimed of them holds for all positive integers."""

import operator
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tilewright.npu import shapes
from tilewright.npu.shapes import ShapeError
from tilewright.npu.symbols import Symbolic, equal, less, lower_bound, product

NAMES = ("A", "B", "C_1")
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}

properties = hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
leaves = st.one_of(st.sampled_from(NAMES), st.integers(-3, 8))
trees = st.recursive(leaves, lambda inner: st.tuples(st.sampled_from(sorted(OPERATORS)), inner, inner), max_leaves=6)
values = st.fixed_dictionaries({name: st.integers(1, 7) for name in NAMES})


def calculated(tree: Any, names: dict[str, Any]) -> Any:
    """The value of a tree of operations."""
    if isinstance(tree, tuple):
        symbol, left, right = tree
        return OPERATORS[symbol](calculated(left, names), calculated(right, names))
    return names[tree] if isinstance(tree, str) else tree


def symbolic(tree: Any) -> Any:
    """The same with symbols for the names; a division by a number that is zero is none."""
    try:
        return calculated(tree, {name: Symbolic.atom(name) for name in NAMES})
    except ZeroDivisionError:
        hypothesis.reject()


def at(tree: Any, point: dict[str, int]) -> int:
    """The value at a point, where there is one."""
    try:
        return int(calculated(tree, point))
    except ZeroDivisionError:
        hypothesis.reject()


@properties
@hypothesis.given(tree=trees, point=values)
def test_a_size_is_what_python_calculates(tree: Any, point: dict[str, int]) -> None:
    """Its text is Python, so that what is read off a kernel can be computed from shapes."""
    expected = at(tree, point)
    size = symbolic(tree)
    assert eval(str(size), {"__builtins__": {}}, dict(point)) == expected
    assert lower_bound(size) <= expected
    assert isinstance(size, int | Symbolic)


@properties
@hypothesis.given(first=trees, second=trees, points=st.lists(values, min_size=1, max_size=5))
def test_nothing_false_is_claimed(first: Any, second: Any, points: list[dict[str, int]]) -> None:
    x, y = symbolic(first), symbolic(second)
    for point in points:
        a, b = at(first, point), at(second, point)
        assert equal(x, y) in (a == b, None)
        assert less(x, y) in (a < b, None)
        assert less(y, x) in (b < a, None)


@properties
@hypothesis.given(first=trees, second=trees)
def test_equal_polynomials_are_one(first: Any, second: Any) -> None:
    x, y = symbolic(first), symbolic(second)
    assert x + y == y + x
    assert x * y == y * x
    assert (x + y) * y == x * y + y * y
    assert x - x == 0
    assert -1 * -x == x
    assert equal(x + y, y + x) is True
    assert less(x, x) is False


def test_what_is_decided() -> None:
    a, b = Symbolic.atom("A"), Symbolic.atom("B")
    assert equal(a, a + 1) is False
    assert equal(a, b) is None
    assert equal(a, 1) is None
    assert equal(a, 0) is False
    assert less(0, a) is True
    assert less(a, 1) is False
    assert less(a * b, a * b + 1) is True
    assert less(a, a * b) is None
    assert less(a * b, a) is None
    assert a * b // a == b
    assert (6 * a + 4 * a * b) // (2 * a) == 3 + 2 * b
    assert (a * b) % b == 0
    assert 0 // a == 0
    assert less(a // 2, 0) is False
    assert less(0, a // 2) is None  # A may be 1
    assert less(0, (a + 1) // 2) is True
    assert less(0, (a + 1) // 3) is None
    assert less(-1 // a, 0) is None
    assert less(a % b, 0) is False
    assert less(a % (b - 4), 0) is None
    assert (a + b).is_name is False
    assert (2 * a).is_name is False
    assert a.is_name is True
    assert (a // b).is_name is False
    assert product((a, 2, b)) == 2 * a * b
    assert str(a - b) == "A - B"
    assert str((a + 1) // 2) == "((1 + A) // 2)"


@pytest.mark.parametrize("other", [0.5, "A", None, (1,)])
def test_only_integers_are_sizes(other: Any) -> None:
    a = Symbolic.atom("A")
    for function in OPERATORS.values():
        if function is operator.mod and isinstance(other, str):
            continue  # the text would be formatted
        for left, right in ((a, other), (other, a)):
            with pytest.raises(TypeError):
                function(left, right)
    with pytest.raises(TypeError):
        operator.truediv(a, 2)
    with pytest.raises(ZeroDivisionError):
        a // 0


def test_shapes_with_symbols_claim_what_is_certain_only() -> None:
    a, b = Symbolic.atom("A"), Symbolic.atom("B")
    assert shapes.broadcast((a, 1), (1, b)) == (a, b)
    assert shapes.broadcast((a, 64), (b, 64)) == (a, 64)
    assert shapes.reshape((a, b, 4), (b, -1)) == (b, 4 * a)
    assert shapes.reshape((a, b), (2, -1)) == (2, a * b // 2)
    assert shapes.matmul((a, b, 64), (a, 64, b)) == (a, b, b)
    assert shapes.differ((a, 1), (b, 2))
    assert not shapes.differ((a, b), (b, a))
    for wrong in (
        lambda: shapes.broadcast((a,), (a + 1,)),
        lambda: shapes.reshape((a, b), (a, b, 2)),
        lambda: shapes.reshape((a, b), (-1, -1)),
        lambda: shapes.reshape((a, b), (a, 0)),
        lambda: shapes.matmul((a, b, 64), (a, 32, b)),
        lambda: shapes.matmul((a,), (a,)),
        lambda: shapes.insert((a, 4), (a, 5), 1),
        lambda: shapes.permute((a, b), (0, 0)),
        lambda: shapes.reduce((), -1),
    ):
        with pytest.raises(ShapeError):
            wrong()
