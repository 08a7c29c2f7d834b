"""The form of a rotation whose two members are computed one by one, with a table of half width.

``x1 * cos - x2 * sin`` and ``x2 * cos + x1 * sin``, as vLLM's native rotary embedding and flash-attention's reference
write them: ``x1`` and ``x2`` are the halves of ``x`` (``halves``) or every other feature (``others``), and the members
are put behind one another (``joined``) or beside one another by ``stack(..., -1).flatten(-2)`` (``stacked``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.fusion.forms import (
    ANYTHING,
    As,
    Call,
    Each,
    Form,
    Half,
    Match,
    OneOf,
    Rounded,
    Tensor,
    Viewed,
    Widened,
    is_last,
    product,
    total,
)
from tilewright.fusion.graph import arguments, aten, is_call, same_size, value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.fx import Node


@dataclass(frozen=True)
class EveryOther(Form):
    """Every other element of the last dimension of something, from the first or from the second on."""

    form: Form
    index: int

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of the whole."""
        if not is_call(what, aten.slice.Tensor):
            return
        given = arguments(what)
        whole, start = given["self"], 0 if given["start"] is None else given["start"]
        if given["step"] != 2 or start != self.index or not is_last(given["dim"], whole):
            return
        if same_size(2 * value(what).shape[-1], value(whole).shape[-1]):
            yield from self.form.matches(whole, so_far.holding(what))


def _along_last(node: Node) -> bool:
    return is_last((*node.args, 0)[1], node)


def _members(read: str, part: type[Half | EveryOther]) -> tuple[Form, Form]:
    """Both members, for one way to read ``x``, whose first part is bound to ``read``."""
    x = Widened(Tensor("x"))
    first, second = As(read, Widened(part(x, 0))), Widened(part(x, 1))
    cos, sin = Tensor("cos"), Tensor("sin")
    rotated = (
        Call(aten.sub.Tensor, As("first_cos", product(first, cos)), As("second_sin", product(second, sin))),
        total(As("second_cos", product(second, cos)), As("first_sin", product(first, sin))),
    )
    one, other = (
        OneOf(As(f"{name} rounded", Rounded(As(name, member))), As(name, member))
        for name, member in zip(("first", "second"), rotated, strict=True)
    )
    return one, other


def _put_together(read: str, part: type[Half | EveryOther]) -> Form:
    members = _members(read, part)
    joined = Call(aten.cat.default, Each(*members), ANYTHING, when=_along_last)
    stacked = Call(aten.cat.default, Each(*map(Viewed, members)), ANYTHING, when=_along_last)
    return OneOf(As("joined", joined), Viewed(As("stacked", stacked)))


_ROTATED = OneOf(_put_together("halves", Half), _put_together("others", EveryOther))
PAIRS = OneOf(As("cast", Rounded(_ROTATED)), _ROTATED)
"""Binds ``x``, ``cos``, ``sin``, the terms, what the module's text names, and where something is rounded."""

TERMS = ("first_cos", "second_sin", "second_cos", "first_sin", "first", "second")
"""The names of what is computed, all in one dtype."""

ROUNDED = ("cast", "first rounded", "second rounded")
