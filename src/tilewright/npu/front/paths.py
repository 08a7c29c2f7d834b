"""The ways through a kernel that is interpreted without sizes: what its constexprs decide, they decide either way.

Where an ``if`` asks for a constexpr, as in ``if MODE == 0:``, an answer is assumed. It holds for the rest of that way,
and afterwards the kernel is interpreted again with the other answer, until no way is left. A ``static_assert`` that
does not hold on a way says that there is no such way.
"""

from __future__ import annotations

import operator
from collections import deque
from typing import TYPE_CHECKING, Any

from tilewright.npu.symbols import Symbolic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_WAYS = 100
"""How many ways are gone; the others are looked at together, both branches of each ``if`` one after the other."""

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {"==": operator.eq, "<": operator.lt}


class NoSuchWay(Exception):
    """What is assumed of the constexprs is what the kernel's author excludes."""


class Choices:
    """What is assumed on one way.

    Attributes:
        made: the answers so far, in the order in which they were asked for.
        open: whether answers are assumed; if not, what is asked stays undecided.
    """

    def __init__(self, given: tuple[bool, ...] = (), *, open: bool = True) -> None:
        self._given = given
        self._answers: dict[tuple[str, str, str], bool] = {}
        self._values: dict[Symbolic, Any] = {}
        self.made: list[bool] = []
        self.open = open

    def ask(self, relation: str, left: Any, right: Any) -> bool | None:
        """Whether ``left == right`` or ``left < right``; None if nothing is to be assumed."""
        left, right = (self._values.get(each, each) if isinstance(each, Symbolic) else each for each in (left, right))
        if not isinstance(left, Symbolic) and not isinstance(right, Symbolic):
            try:
                return bool(_COMPARE[relation](left, right))
            except TypeError:
                return False
        if not self.open:
            return None
        sides = sorted((repr(left), repr(right))) if relation == "==" else (repr(left), repr(right))
        key = (relation, sides[0], sides[1])
        if key not in self._answers:
            number = len(self.made)
            self._answers[key] = self._given[number] if number < len(self._given) else True
            self.made.append(self._answers[key])
            if relation == "==" and self._answers[key]:
                self._is(left, right)
        return self._answers[key]

    def _is(self, left: Any, right: Any) -> None:
        """Note the value that a constexpr has on this way."""
        for name, value in ((left, right), (right, left)):
            if isinstance(name, Symbolic) and name.is_name and not isinstance(value, Symbolic):
                self._values[name] = value


def ways() -> Iterator[Choices]:
    """Choices to interpret a kernel with, one after the other; each is looked at for what was asked on its way."""
    waiting: deque[tuple[bool, ...]] = deque([()])
    for _ in range(MAX_WAYS):
        if not waiting:
            return
        given = waiting.popleft()
        choices = Choices(given)
        yield choices
        made = tuple(choices.made)
        waiting.extend((*made[:number], not made[number]) for number in range(len(given), len(made)))
    if waiting:
        yield Choices(open=False)
