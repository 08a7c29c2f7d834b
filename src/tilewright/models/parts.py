"""The parts of the decoder that can be swapped: each once in plain PyTorch, once from tilewright.

To make another part swappable, give :class:`Parts` one more field and each of its two sets one more :class:`Part`; the
decoder calls it, and the demo's table and report show it by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


class Served(NamedTuple):
    """Who computes a part.

    Attributes:
        operation: the operation's name.
        implementation: the name of what serves it.
        reason: why that one, in a sentence.
    """

    operation: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Part(Generic[P, R]):
    """One swappable part.

    Attributes:
        compute: does the work.
        explain: takes the arguments of ``compute`` and says who would do the work, without doing it.
    """

    compute: Callable[P, R]
    explain: Callable[P, Served]


RopePart = Part[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Rotates queries and keys: ``(q, k, cos, sin, start) -> (q, k)``.

``q`` is [batch, seq, heads, head_dim], ``k`` is [batch, seq, kv_heads, head_dim], ``cos`` and ``sin`` are
[positions, head_dim / 2] in float32 (float64 in a float64 model), and the first row of ``q`` and ``k`` stands at
position ``start``.
"""


@dataclass(frozen=True)
class Parts:
    """A set of parts for one decoder. Every field but the name is a :class:`Part`.

    Attributes:
        name: for people.
        rope: the rotary position embedding.
    """

    name: str
    rope: RopePart

    @classmethod
    def plain(cls) -> Parts:
        """The parts as one would write them in plain PyTorch."""
        return cls("plain PyTorch", rope=Part(_plain_rope, _explain_plain_rope))

    @classmethod
    def tilewright(cls) -> Parts:
        """The parts from tilewright, served as its dispatch chooses."""
        return cls("tilewright", rope=Part(_tilewright_rope, _explain_tilewright_rope))

    def observed(self) -> tuple[Parts, dict[str, Served]]:
        """The same parts, which note at their first call who serves it.

        Returns:
            The parts, and the notes by field name, which fill up as the parts are called.
        """
        notes: dict[str, Served] = {}
        watched: dict[str, Any] = {
            field.name: _observed(getattr(self, field.name), field.name, notes)
            for field in fields(self)
            if field.name != "name"
        }
        return replace(self, **watched), notes


def _observed(part: Part[..., Any], field_name: str, notes: dict[str, Served]) -> Part[..., Any]:
    def compute(*args: Any) -> Any:
        if field_name not in notes:
            notes[field_name] = part.explain(*args)
        return part.compute(*args)

    return Part(compute, part.explain)


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Rounded once, at the end; float64 stays float64.
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _plain_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = slice(start, start + q.shape[1])
    cos, sin = cos[positions, None], sin[positions, None]  # [seq, 1, head_dim / 2]: the same for all heads
    return _rotate_halves(q, cos, sin), _rotate_halves(k, cos, sin)


def _explain_plain_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int) -> Served:
    return Served(
        "rope_qk", "plain PyTorch", "what tilewright is compared with: PyTorch operators, one after the other"
    )


def _tilewright_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    import tilewright

    return tilewright.rope_qk(q, k, cos, sin, layout="bshd", offsets=start)


def _explain_tilewright_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int
) -> Served:
    import tilewright

    explanation = tilewright.explain("rope_qk", q, k, cos, sin, layout="bshd", offsets=start)
    return Served("rope_qk", explanation.chosen or "nothing", explanation.reason)
