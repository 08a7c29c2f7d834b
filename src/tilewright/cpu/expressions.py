"""Scalar expressions over loop variables: what one element of a tile is.

Expressions are interned: equal ones are the same object, so a nest of loops computes each once. ``loops`` says on which
of the nest's loops an expression depends; it is computed outside all others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.cpu.types import I1, I32, I64, Element, Scalar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, eq=False)
class Expr:
    """An operation on scalars.

    Attributes:
        op: its name; ``const``, ``var``, ``index``, ``load`` and ``element`` are the leaves and memory reads, the
            others are in ``c_expressions.py``.
        type: the type of its value.
        args: its operands.
        attr: what else it depends on: a constant's value, a variable's name, a buffer.
        loops: the numbers of the nest's loops that it depends on, as a set of bits.
    """

    op: str
    type: Element
    args: tuple[Expr, ...]
    attr: Any
    loops: int

    def __str__(self) -> str:
        if self.op == "const":
            return str(self.attr)
        if self.op in {"var", "index"}:
            return str(self.attr)
        if self.op == "element":
            return f"{self.attr}[{self.args[0]}]"
        attr = "" if self.attr is None else f".{getattr(self.attr, 'label', self.attr)}"
        return f"{self.op}{attr}:{self.type}({', '.join(map(str, self.args))})"

    def walk(self, seen: set[Expr]) -> Iterator[Expr]:
        """This expression and its parts that are not in ``seen``, parts first."""
        if self in seen:
            return
        seen.add(self)
        for arg in self.args:
            yield from arg.walk(seen)
        yield self


class Expressions:
    """Makes expressions, each only once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Expr] = {}

    def make(self, op: str, type_: Element, args: Sequence[Expr] = (), attr: Any = None, loops: int = 0) -> Expr:
        """The expression ``op`` of ``args``."""
        args = tuple(args)
        key = (op, type_, args, attr if not isinstance(attr, float) else (repr(attr),))
        found = self._known.get(key)
        if found is None:
            for arg in args:
                loops |= arg.loops
            found = self._known[key] = Expr(op, type_, args, attr, loops)
        return found

    def const(self, value: Any, type_: Element) -> Expr:
        """A constant."""
        if isinstance(value, int) and type_.is_int:
            value = wrap(value, type_)
        return self.make("const", type_, (), value)

    def var(self, name: str, type_: Element) -> Expr:
        """A scalar variable outside the nest."""
        return self.make("var", type_, (), name)

    def index(self, number: int) -> Expr:
        """The variable of a loop of the nest."""
        return self.make("index", I32, (), f"i{number}", 1 << number)

    # Arithmetic on tile indices, with the constants folded: shapes are powers of two, so all of it is shifts and masks.

    def int_op(self, op: str, a: Expr, b: Expr) -> Expr:
        """``a op b`` for integers of one type, folded where both are constants or one is neutral."""
        if a.type == I1 and op in {"and", "or"} and "const" in {a.op, b.op}:
            known, other = (a, b) if a.op == "const" else (b, a)
            return other if bool(known.attr) == (op == "and") else known
        if a.op == "const" and b.op == "const" and op in _FOLD and min(a.attr, b.attr) >= 0:
            return self.const(_FOLD[op](a.attr, b.attr), a.type)
        if b.op == "const":
            if b.attr == 0 and op in {"add", "sub", "or", "xor", "shl", "shrs", "shru"}:
                return a
            if b.attr == 1 and op in {"mul", "divs", "divu"}:
                return a
            if b.attr == 0 and op in {"mul", "and"}:
                return b
        if a.op == "const":
            if a.attr == 0 and op in {"add", "or", "xor"}:
                return b
            if a.attr == 1 and op == "mul":
                return b
            if a.attr == 0 and op in {"mul", "and"}:
                return a
        return self.make(op, a.type, (a, b))

    def flat(self, index: Sequence[Expr], shape: Sequence[int]) -> Expr:
        """The row-major position of ``index`` in ``shape``."""
        total = self.const(0, I32)
        for i, size in zip(index, shape, strict=True):
            total = self.int_op("mul", total, self.const(size, I32))
            total = self.int_op("add", total, i)
        return total

    def unflat(self, position: Expr, shape: Sequence[int], bounds: dict[Expr, int]) -> tuple[Expr, ...]:
        """The index in ``shape`` of a row-major position; ``bounds`` holds how far each loop variable runs."""
        index: list[Expr] = []
        terms = self._powers(position, bounds)
        for size in reversed(shape):
            if terms is None:
                index.append(self.int_op("and", position, self.const(size - 1, I32)))
                position = self.int_op("shru", position, self.const(size.bit_length() - 1, I32))
                continue
            low, high = deque[tuple[Expr, int, int]](), []
            for term, scale, span in terms:
                if scale >= size:
                    high.append((term, scale // size, span))
                elif scale * span <= size:
                    low.append((term, scale, span))
                else:  # the variable runs over the border: its low part stays, its high part goes on
                    cut = size // scale
                    low.append((self.int_op("and", term, self.const(cut - 1, I32)), scale, cut))
                    bits = self.const(cut.bit_length() - 1, I32)
                    high.append((self.int_op("shru", term, bits), 1, span // cut))
            index.append(self._sum(low))
            terms = high
        return tuple(reversed(index))

    def _powers(self, position: Expr, bounds: dict[Expr, int]) -> list[tuple[Expr, int, int]] | None:
        """``position`` as a sum of terms times powers of two that do not overlap: ``(term, scale, span)``; or None."""
        found: list[tuple[Expr, int, int]] = []
        pending = [(position, 1)]
        while pending:
            e, scale = pending.pop()
            if e.op == "add":
                pending += [(e.args[0], scale), (e.args[1], scale)]
            elif e.op == "mul" and e.args[1].op == "const":
                pending.append((e.args[0], scale * e.args[1].attr))
            elif e.op == "const" and e.attr >= 0:
                # A constant splits into its bits.
                found += [(self.const(1, I32), scale << k, 2) for k in range(e.attr.bit_length()) if e.attr >> k & 1]
            elif e in bounds:
                found.append((e, scale, bounds[e]))
            elif e.op == "and" and e.args[1].op == "const" and (e.args[1].attr + 1) & e.args[1].attr == 0:
                found.append((e, scale, e.args[1].attr + 1))
            elif e.op == "shru" and e.args[0] in bounds and e.args[1].op == "const":
                found.append((e, scale, max(1, bounds[e.args[0]] >> e.args[1].attr)))
            else:
                return None
        found.sort(key=lambda term: term[1])
        reach = 1
        for _, scale, span in found:
            if scale < reach or scale & (scale - 1) or span & (span - 1):
                return None
            reach = scale * span
        return found

    def _sum(self, terms: Sequence[tuple[Expr, int, int]]) -> Expr:
        total = self.const(0, I32)
        for term, scale, _ in reversed(terms):
            total = self.int_op("add", total, self.int_op("mul", term, self.const(scale, I32)))
        return total

    def span(self, e: Expr, bounds: dict[Expr, int]) -> tuple[int, int] | None:
        """The least and the largest value of an integer expression of the loops' variables; None if not known."""
        if e.op == "const" and isinstance(e.attr, int):
            return e.attr, e.attr
        if e in bounds:
            return 0, bounds[e] - 1
        if e.op in {"sext", "add", "sub", "mul"} and e.type != I1 and all(arg.type != I1 for arg in e.args):
            spans = [self.span(arg, bounds) for arg in e.args]
            if None in spans:
                return None
            (low, high), *others = (span for span in spans if span is not None)
            if not others:
                return low, high
            ((low_b, high_b),) = others
            if e.op == "sub":
                low_b, high_b = -high_b, -low_b
            corners = [low * low_b, low * high_b, high * low_b, high * high_b]
            found = (min(corners), max(corners)) if e.op == "mul" else (low + low_b, high + high_b)
            limit = 1 << (e.type.bits - 1)
            return found if -limit <= found[0] and found[1] < limit else None
        return None

    def compare(self, predicate: str, a: Expr, b: Expr, bounds: dict[Expr, int]) -> Expr:
        """A comparison of integers, settled where the loops' bounds settle it: masks of full tiles vanish."""
        first, second = self.span(a, bounds), self.span(b, bounds)
        ordered = predicate[0] == "s" or (predicate[0] == "u" and min(*(first or (-1,)), *(second or (-1,))) >= 0)
        if first is not None and second is not None and ordered:
            below, above = first[1] < second[0], first[0] > second[1]
            reach, past = first[1] <= second[0], first[0] >= second[1]
            always = {"lt": below, "le": reach, "gt": above, "ge": past}[predicate[1:]]
            never = {"lt": past, "le": above, "gt": reach, "ge": below}[predicate[1:]]
            if always or never:
                return self.const(int(always), I1)
        return self.make("cmpi", I1, (a, b), predicate)

    # Offsets of memory accesses

    def offset(self, offsets: Sequence[tuple[Expr, int]], order: Sequence[int]) -> Expr:
        """The sum of offsets, each times a number of elements or bytes, as a 64-bit expression.

        What depends only on the outer loops is added first, so that it can stand outside the inner ones; ``order``
        names the loops from outside.

        Signed 32-bit arithmetic on the way is taken not to wrap, as Triton's own analysis of contiguity takes it.
        """
        terms: dict[Expr | None, int] = {}
        for offset, scale in offsets:
            self._linear(offset, scale, terms)
        known = [(e, c) for e, c in terms.items() if e is not None and c]
        by_depth = sorted(known, key=lambda term: depth(term[0], order))
        total = self.const(terms.get(None, 0), I64)
        for term, factor in by_depth:
            scaled = term if factor == 1 else self.make("muln", I64, (term, self.const(factor, I64)))
            total = scaled if total.op == "const" and total.attr == 0 else self.make("addn", I64, (total, scaled))
        return total

    def _linear(self, e: Expr, scale: int, terms: dict[Expr | None, int]) -> None:
        if e.op == "const":
            terms[None] = terms.get(None, 0) + scale * int(e.attr)
            return
        if e.op == "sext" and e.args[0].type != I1:
            self._linear(e.args[0], scale, terms)
            return
        if e.op in {"add", "sub"}:
            self._linear(e.args[0], scale, terms)
            self._linear(e.args[1], scale if e.op == "add" else -scale, terms)
            return
        if e.op == "shl" and e.args[1].op == "const" and 0 <= e.args[1].attr < 32:
            self._linear(e.args[0], scale << e.args[1].attr, terms)
            return
        if e.op == "mul":
            left, right = sorted(e.args, key=lambda arg: arg.loops, reverse=True)
            if right.op == "const":
                self._linear(left, scale * int(right.attr), terms)
                return
            if left.op == "const":
                self._linear(right, scale * int(left.attr), terms)
                return
            inner: dict[Expr | None, int] = {}
            self._linear(left, 1, inner)
            factor = self._wide(right)
            for term, c in inner.items():
                product = factor if term is None else self.make("muln", I64, (term, factor))
                terms[product] = terms.get(product, 0) + scale * c
            return
        wide = self._wide(e)
        terms[wide] = terms.get(wide, 0) + scale

    def terms(self, offset: Expr) -> dict[Expr | None, int]:
        """The terms of a sum that :meth:`offset` made, with their factors; the constant stands at None."""
        found: dict[Expr | None, int] = {}
        pending = [offset]
        while pending:
            e = pending.pop()
            if e.op == "addn":
                pending += e.args
            elif e.op == "const":
                found[None] = found.get(None, 0) + int(e.attr)
            elif e.op == "muln" and e.args[1].op == "const":
                found[e.args[0]] = found.get(e.args[0], 0) + int(e.args[1].attr)
            else:
                found[e] = found.get(e, 0) + 1
        return found

    def quotient(self, term: Expr, index: Expr) -> Expr | None:
        """What a term multiplies a loop's variable with; None if it is no such product."""
        if term.op == "sext" and term.args[0] is index:
            return self.const(1, I64)
        if term.op == "muln":
            variable, factor = term.args
            if variable.op == "sext" and variable.args[0] is index and not factor.loops:
                return factor
        return None

    def _wide(self, e: Expr) -> Expr:
        """The expression as a signed 64-bit integer."""
        return e if e.type == I64 else self.make("sext", I64, (e,))


def depth(e: Expr, order: Sequence[int]) -> int:
    """In how many loops the expression has to stand, where ``order`` names the loops from outside."""
    return max((k + 1 for k, loop in enumerate(order) if e.loops >> loop & 1), default=0)


def wrap(value: int, type_: Element) -> int:
    """An integer as a signed number of the type's width; a truth value stays 0 or 1."""
    if type_ == I1:
        return value & 1
    bits = type_.bits
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_FOLD: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shru": lambda a, b: a >> b,
}


def is_scalar(type_: Element, *names: str) -> bool:
    """Whether the type is one of the named number types."""
    return isinstance(type_, Scalar) and type_.name in names
