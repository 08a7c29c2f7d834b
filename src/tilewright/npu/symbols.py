"""Sizes that may be unknown: polynomials over positive integers, so that kernels can be checked without their sizes.

A size is an ``int`` or a :class:`Symbolic`. Comparisons of symbolic sizes give True, False or None: not known. What is
claimed holds for all positive integers that the names may stand for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

Size: TypeAlias = "int | Symbolic"


@dataclass(frozen=True, order=True)
class Atom:
    """An integer that has a name instead of a value.

    Attributes:
        name: what people see: a parameter, or an expression such as ``(C // P)``.
        least: a lower bound.
    """

    name: str
    least: float = 1


UNBOUNDED = -math.inf
"""The lower bound of an atom that can be anything."""

_Monomial: TypeAlias = tuple[Atom, ...]  # sorted, an atom as often as its power


@dataclass(frozen=True)
class Symbolic:
    """A sum of products of atoms.

    Attributes:
        terms: coefficient of each product of atoms; none is zero.
    """

    terms: tuple[tuple[_Monomial, int], ...] = field(default=())

    @classmethod
    def atom(cls, name: str, least: float = 1) -> Symbolic:
        """A size of its own."""
        return cls((((Atom(name, least),), 1),))

    @property
    def is_atom(self) -> bool:
        """Whether it is one atom, and no sum or product."""
        return len(self.terms) == 1 and len(self.terms[0][0]) == 1 and self.terms[0][1] == 1

    @property
    def is_name(self) -> bool:
        """Whether it is one parameter, and no expression of some."""
        return self.is_atom and str(self).isidentifier()

    # Numbers that are no integers are nothing that a size can be added to: Python raises a TypeError.

    def __add__(self, other: Size) -> Size:
        return _sum(self, other, 1) if isinstance(other, int | Symbolic) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        return _sum(self, other, -1) if isinstance(other, int | Symbolic) else NotImplemented

    def __rsub__(self, other: Size) -> Size:
        return _sum(other, self, -1) if isinstance(other, int | Symbolic) else NotImplemented

    def __neg__(self) -> Size:
        return _sum(0, self, -1)

    def __mul__(self, other: Size) -> Size:
        if not isinstance(other, int | Symbolic):
            return NotImplemented
        products: dict[_Monomial, int] = {}
        for left, a in _terms(self):
            for right, b in _terms(other):
                key = tuple(sorted(left + right))
                products[key] = products.get(key, 0) + a * b
        return _make(products)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        return _floor(self, other) if isinstance(other, int | Symbolic) else NotImplemented

    def __rfloordiv__(self, other: Size) -> Size:
        return _floor(other, self) if isinstance(other, int | Symbolic) else NotImplemented

    def __mod__(self, other: Size) -> Size:
        return _rest(self, other) if isinstance(other, int | Symbolic) else NotImplemented

    def __rmod__(self, other: Size) -> Size:
        return _rest(other, self) if isinstance(other, int | Symbolic) else NotImplemented

    def __str__(self) -> str:
        text = " + ".join(_product(monomial, factor) for monomial, factor in self.terms)
        return text.replace("+ -", "- ") or "0"

    __repr__ = __str__


def equal(a: Size, b: Size) -> bool | None:
    """Whether two sizes are the same; None if that depends on their values."""
    difference = b - a
    if isinstance(difference, int):
        return difference == 0
    return False if lower_bound(difference) > 0 or lower_bound(-difference) > 0 else None


def less(a: Size, b: Size) -> bool | None:
    """Whether ``a < b``; None if that depends on their values."""
    if lower_bound(b - a) > 0:
        return True
    return False if lower_bound(a - b) >= 0 else None


def product(sizes: tuple[Size, ...]) -> Size:
    """How many elements a tensor of these sizes has."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def _terms(size: Size) -> tuple[tuple[_Monomial, int], ...]:
    if isinstance(size, Symbolic):
        return size.terms
    return (((), int(size)),) if size else ()


def _make(terms: dict[_Monomial, int]) -> Size:
    kept = tuple(sorted((monomial, factor) for monomial, factor in terms.items() if factor))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Symbolic(kept)


def _sum(a: Size, b: Size, sign: int) -> Size:
    terms = dict(_terms(a))
    for monomial, factor in _terms(b):
        terms[monomial] = terms.get(monomial, 0) + sign * factor
    return _make(terms)


def _floor(a: Size, b: Size) -> Size:
    """``a // b``: a polynomial where the division is exact, else an atom of its own."""
    exact = _quotient(a, b)
    if exact is not None:
        return exact
    least = UNBOUNDED
    if lower_bound(a) >= 0 and lower_bound(b) > 0:
        least = 1 if lower_bound(a - b) >= 0 else 0
    return Symbolic.atom(f"({_operand(a)} // {_operand(b)})", least)


def _rest(a: Size, b: Size) -> Size:
    """``a % b``."""
    if _quotient(a, b) is not None:
        return 0
    return Symbolic.atom(f"({_operand(a)} % {_operand(b)})", 0 if lower_bound(b) > 0 else UNBOUNDED)


def _quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` where ``b`` is one product that divides every product of ``a``, else None."""
    divisor = _terms(b)
    if not divisor:
        raise ZeroDivisionError(f"{a} is divided by zero")
    if len(divisor) != 1:
        return 1 if _terms(a) == divisor else None if _terms(a) else 0
    (below, number) = divisor[0]
    result: dict[_Monomial, int] = {}
    for monomial, factor in _terms(a):
        rest = list(monomial)
        for atom in below:
            if atom not in rest:
                return None
            rest.remove(atom)
        if factor % number:
            return None
        result[tuple(rest)] = factor // number
    return _make(result)


def lower_bound(size: Size) -> float:
    """What a size is not below; minus infinity if that is not known."""
    total: float = 0
    for monomial, factor in _terms(size):
        least: float = factor
        if len(monomial) == 1 and factor > 0:
            least = factor * monomial[0].least
        elif monomial and (factor < 0 or any(atom.least < 0 for atom in monomial)):
            return UNBOUNDED
        else:
            for atom in monomial:
                least *= atom.least
        total += least
    return total


def _operand(size: Size) -> str:
    """A size as an operand of a division."""
    text = str(size)
    return text if text.isalnum() or (isinstance(size, Symbolic) and size.is_atom) else f"({text})"


def _product(monomial: _Monomial, factor: int) -> str:
    names = " * ".join(atom.name for atom in monomial)
    if not names:
        return str(factor)
    return names if factor == 1 else f"-{names}" if factor == -1 else f"{factor} * {names}"
