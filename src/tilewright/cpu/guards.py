"""Masks that hold for a whole tile: a condition outside the loops under which a nest needs no masks.

Most tiles lie inside their tensors, and loops without masks run two to three times as fast. So a nest is written twice
where its masks compare sums of the loops' variables with numbers that do not depend on them: once without those masks,
for when the condition holds, and once with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.cpu.c_expressions import Writer
from tilewright.cpu.loops import Atomic, Fold, Nest, Store, Write
from tilewright.cpu.types import I1, I32, I64

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.cpu.expressions import Expr, Expressions
    from tilewright.cpu.loops import Sink

_INT32 = (-(1 << 31), (1 << 31) - 1)


def without_masks(make: Expressions, nest: Nest) -> tuple[Expr, Nest] | None:
    """A condition that does not depend on the loops, and what the nest comes to where it holds; None without one."""
    bounds = {make.index(k): size for k, size in enumerate(nest.shape)}
    finder = _Finder(make, bounds)
    settled: dict[Expr, Expr] = {}
    true = make.const(1, I1)
    for leaf in _leaves(nest):
        if finder.always(leaf):
            settled[leaf] = true
    if not settled:
        return None
    rewrite = _Rewrite(make, settled)
    condition = true
    for part in finder.conditions:
        condition = make.int_op("and", condition, part)
    return condition, Nest(nest.shape, [_mapped(sink, rewrite) for sink in nest.sinks], nest.serial)


def apart(make: Expressions, nest: Nest, first: Store, second: Store) -> Expr | None:
    """A condition under which no element of the second store lies where one of the first does; None if none is found.

    The stores must be a constant distance apart, their addresses sums of multiples of the loops' variables. They do not
    meet if the distance is larger than what the innermost loop covers, and each other loop's step larger than what the
    loops inside it and the distance cover together.
    """
    order = range(len(nest.shape))
    writer = Writer(make, list(order))
    base, offset, in_bytes = writer.address(first.pointer)
    other_base, other_offset, other_in_bytes = writer.address(second.pointer)
    if base is not other_base or in_bytes != other_in_bytes or not nest.shape:
        return None
    terms, other_terms = make.terms(offset), make.terms(other_offset)
    distance = abs(other_terms.pop(None, 0) - terms.pop(None, 0))
    if terms != other_terms or not distance:
        return None
    steps: dict[int, Expr] = {}
    for term, factor in terms.items():
        assert term is not None
        if not term.loops:
            continue
        loop = next((k for k in order if term.loops == 1 << k), None)
        step = None if loop is None else make.quotient(term, make.index(loop))
        if loop is None or step is None or loop in steps:
            return None
        steps[loop] = make.make("muln", I64, (step, make.const(factor, I64)))
    if len(steps) != len(nest.shape):
        return None
    innermost = len(nest.shape) - 1
    condition = make.const(1, I1)
    reach = make.const(distance, I64)
    for loop in reversed(order):
        covered = make.make("muln", I64, (steps[loop], make.const(nest.shape[loop] - 1, I64)))
        zero = make.const(0, I64)
        needed = [(zero, steps[loop])]
        needed.append((covered, make.const(distance, I64)) if loop == innermost else (reach, steps[loop]))
        for small, large in needed:
            condition = make.int_op("and", condition, make.make("cmpi", I1, (small, large), "slt"))
        reach = make.make("addn", I64, (reach, covered))
    return condition


def leading(make: Expressions, nest: Nest) -> tuple[Expr, Nest] | None:
    """How many elements of a nest of one loop come before the first that a mask shuts out, and the nest for those.

    None unless all masks end with a number that does not depend on the loop, as ``offsets < n`` does.
    """
    if len(nest.shape) != 1:
        return None
    index = make.index(0)
    finder = _Finder(make, {index: nest.shape[0]})
    true, count = make.const(1, I1), make.const(nest.shape[0], I64)
    settled: dict[Expr, Expr] = {}
    for leaf in _leaves(nest):
        if leaf.loops == 0:
            continue
        until = finder.until(leaf, index)
        if until is None:
            return None
        settled[leaf] = true
        count = make.make("mins", I64, (count, until))
    if not settled:
        return None
    zero = make.const(0, I64)
    count = make.make("maxs", I64, (count, zero))
    for part in finder.conditions:
        count = make.make("select", I64, (part, count, zero))
    return count, Nest(nest.shape, [_mapped(sink, _Rewrite(make, settled)) for sink in nest.sinks])


def _leaves(nest: Nest) -> list[Expr]:
    """The comparisons that the masks of loads and stores are made of."""
    from tilewright.cpu.collectives import roots_of

    seen: set[Expr] = set()
    masks: list[Expr] = []
    for sink in nest.sinks:
        if isinstance(sink, Store) and sink.mask is not None:
            masks.append(sink.mask)
        for root in roots_of(sink):
            masks += [part.args[1] for part in root.walk(seen) if part.op == "load" and len(part.args) > 1]
    found: dict[Expr, None] = {}
    while masks:
        mask = masks.pop()
        if mask.op == "and":
            masks += mask.args
        elif mask.op in {"cmpi", "element", "var"}:
            found[mask] = None
    return list(found)


class _Finder:
    """Finds conditions; ``conditions`` gathers those of all comparisons that could be settled."""

    def __init__(self, make: Expressions, bounds: dict[Expr, int]) -> None:
        self.make = make
        self.bounds = bounds
        self.conditions: list[Expr] = []

    def always(self, comparison: Expr) -> bool:
        """Whether there is a condition under which the comparison holds throughout the loops."""
        if comparison.loops == 0:
            self.conditions.append(comparison)
            return True
        if comparison.op != "cmpi" or comparison.attr not in {"slt", "sle", "sgt", "sge"}:
            return False
        small, large = comparison.args if comparison.attr in {"slt", "sle"} else comparison.args[::-1]
        if small.type not in (I32, I64):
            return False
        needed: list[Expr] = []
        low = self._sum(small, needed)
        high = self._sum(large, needed)
        if low is None or high is None:
            return False
        most = self._extreme(low, largest=True)
        least = self._extreme(high, largest=False)
        predicate = "slt" if comparison.attr in {"slt", "sgt"} else "sle"
        needed.append(self.make.make("cmpi", I1, (most, least), predicate))
        self.conditions += needed
        return True

    def until(self, comparison: Expr, index: Expr) -> Expr | None:
        """Up to which value of the loop's variable the comparison holds; None if it does not end so."""
        if comparison.op != "cmpi" or comparison.attr not in {"slt", "sle", "sgt", "sge"}:
            return None
        small, large = comparison.args if comparison.attr in {"slt", "sle"} else comparison.args[::-1]
        if small.type not in (I32, I64) or large.loops:
            return None
        low, high = self._sum(small, self.conditions), self._sum(large, self.conditions)
        if low is None or high is None or low[1] != {index: 1}:
            return None
        make = self.make
        rest = make.make("addn", I64, (high[0], make.make("muln", I64, (low[0], make.const(-1, I64)))))
        return rest if comparison.attr in {"slt", "sgt"} else make.make("addn", I64, (rest, make.const(1, I64)))

    def _sum(self, e: Expr, needed: list[Expr]) -> tuple[Expr, dict[Expr, int]] | None:
        """The expression as a 64-bit base that does not depend on the loops, and multiples of the loops' variables.

        ``needed`` gathers what must hold for 32-bit arithmetic on the way not to wrap.
        """
        found = self._parts(e, needed)
        if found is not None and e.type == I32 and e.loops:
            for value, predicate, limit in (
                (self._extreme(found, largest=False), "sge", _INT32[0]),
                (self._extreme(found, largest=True), "sle", _INT32[1]),
            ):
                needed.append(self.make.make("cmpi", I1, (value, self.make.const(limit, I64)), predicate))
        return found

    def _parts(self, e: Expr, needed: list[Expr]) -> tuple[Expr, dict[Expr, int]] | None:
        make = self.make
        if e.loops == 0:
            return (
                make.const(e.attr, I64) if e.op == "const" else make.make("sext", I64, (e,)) if e.type != I64 else e
            ), {}
        if e in self.bounds:
            return make.const(0, I64), {e: 1}
        if e.op == "sext" and e.args[0].type == I32:
            return self._sum(e.args[0], needed)
        if e.op in {"add", "sub"}:
            left, right = self._parts(e.args[0], needed), self._parts(e.args[1], needed)
            if left is None or right is None:
                return None
            sign = 1 if e.op == "add" else -1
            scaled = right[0] if sign == 1 else make.make("muln", I64, (right[0], make.const(-1, I64)))
            steps = dict(left[1])
            for index, step in right[1].items():
                steps[index] = steps.get(index, 0) + sign * step
            return make.make("addn", I64, (left[0], scaled)), steps
        if e.op == "mul" and e.args[1].op == "const":
            inner = self._parts(e.args[0], needed)
            if inner is None:
                return None
            factor = int(e.args[1].attr)
            base = make.make("muln", I64, (inner[0], make.const(factor, I64)))
            return base, {index: step * factor for index, step in inner[1].items()}
        return None

    def _extreme(self, parts: tuple[Expr, dict[Expr, int]], largest: bool) -> Expr:
        """The largest or the least value that the sum takes in the loops."""
        base, steps = parts
        reach = sum(step * (self.bounds[index] - 1) for index, step in steps.items() if (step > 0) == largest)
        return self.make.make("addn", I64, (base, self.make.const(reach, I64))) if reach else base


class _Rewrite:
    """Puts other expressions in the place of some, wherever they stand."""

    def __init__(self, make: Expressions, known: dict[Expr, Expr]) -> None:
        self.make = make
        self.known = dict(known)

    def __call__(self, e: Expr) -> Expr:
        found = self.known.get(e)
        if found is None:
            found = self.known[e] = self._rebuilt(e)
        return found

    def _rebuilt(self, e: Expr) -> Expr:
        args = tuple(self(arg) for arg in e.args)
        if all(new is old for new, old in zip(args, e.args, strict=True)):
            return e
        if e.op in {"and", "or"}:
            return self.make.int_op(e.op, *args)
        if e.op == "load" and len(args) > 1 and args[1].op == "const" and args[1].attr:
            args = args[:1]
        if e.op == "select" and args[0].op == "const":
            return args[1] if args[0].attr else args[2]
        return self.make.make(e.op, e.type, args, e.attr)


def _mapped(sink: Sink, rewrite: Callable[[Expr], Expr]) -> Sink:
    if isinstance(sink, Write):
        return Write(sink.buffer, rewrite(sink.position), rewrite(sink.value))
    if isinstance(sink, Store):
        mask = None if sink.mask is None else rewrite(sink.mask)
        if mask is not None and mask.op == "const" and mask.attr:
            mask = None
        return Store(rewrite(sink.pointer), rewrite(sink.value), mask, sink.site)
    if isinstance(sink, Fold):
        values = [rewrite(value) for value in sink.values]
        return Fold(sink.axis, values, sink.targets, rewrite(sink.position), sink.combine)
    assert isinstance(sink, Atomic)
    return sink
