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


NormPart = Part[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""RMSNorm: ``(x, weight, eps) -> y``.

``x`` and ``y`` are [..., width], ``weight`` is [width]. The arithmetic is in float32 (float64 in a float64 model). The
norm is rounded to the dtype of ``x`` before the weight multiplies, and the product again.
"""

AddNormPart = Part[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
"""Adds to the residual stream and normalises the sum: ``(x, residual, weight, eps) -> (y, residual)``.

As :data:`NormPart`; ``residual`` has the shape of ``x`` and keeps its dtype, to which the sum is rounded before the
norm is taken of it.
"""

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
        norm: RMSNorm.
        add_norm: RMSNorm of the residual stream and what a layer adds to it.
        rope: the rotary position embedding.
    """

    name: str
    norm: NormPart
    add_norm: AddNormPart
    rope: RopePart

    @classmethod
    def plain(cls) -> Parts:
        """The parts as one would write them in plain PyTorch."""
        return cls(
            "plain PyTorch",
            norm=Part(_plain_norm, _explain_plain("rms_norm")),
            add_norm=Part(_plain_add_norm, _explain_plain("add_rms_norm")),
            rope=Part(_plain_rope, _explain_plain("rope_qk")),
        )

    @classmethod
    def tilewright(cls) -> Parts:
        """The parts from tilewright, served as its dispatch chooses."""
        return cls(
            "tilewright",
            norm=Part(_tilewright_norm, _explain_tilewright("rms_norm")),
            add_norm=Part(_tilewright_add_norm, _explain_tilewright("add_rms_norm")),
            rope=Part(_tilewright_rope, _explain_tilewright_rope),
        )

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


def _explain_plain(operation: str) -> Callable[..., Served]:
    """What the plain part says that stands for ``operation``."""
    reason = "what tilewright is compared with: PyTorch operators, one after the other"
    return lambda *args: Served(operation, "plain PyTorch", reason)


def _explain_tilewright(operation: str) -> Callable[..., Served]:
    """What the part says that calls ``operation`` with its own arguments, and keyword arguments if there are any."""

    def explain(*args: Any, **kwargs: Any) -> Served:
        import tilewright

        explanation = tilewright.explain(operation, *args, **kwargs)
        return Served(operation, explanation.chosen or "nothing", explanation.reason)

    return explain


def _scaled_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (norm.to(dtype) * weight).to(dtype)


def _plain_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _scaled_norm(x, weight, eps, x.dtype)


def _plain_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = residual + x  # the stream is never narrower than what is added to it
    return _scaled_norm(residual, weight, eps, x.dtype), residual


def _tilewright_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    import tilewright

    return tilewright.rms_norm(x, weight, eps)


def _tilewright_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    import tilewright

    return tilewright.add_rms_norm(x, residual, weight, eps)


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


def _tilewright_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    import tilewright

    return tilewright.rope_qk(q, k, cos, sin, layout="bshd", offsets=start)


def _explain_tilewright_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int
) -> Served:
    return _explain_tilewright("rope_qk")(q, k, cos, sin, layout="bshd", offsets=start)
