"""What a call is: its tensors, its options, and the validated description of both.

``describe`` is the one place where arguments are judged, by the rules of the two steps: those of RMSNorm for each
stream, those of rotary embedding for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tilewright.ops.rms_norm import call as norm
from tilewright.ops.rope import call as rope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    Tensors = tuple[torch.Tensor | None, ...]
    Outputs = tuple[torch.Tensor, torch.Tensor]
    Runner = Callable[[Tensors, int], None]  # (*Inputs, *Outputs), offset
    Planner = Callable[["QkNormRopeCall", "Inputs", Outputs], Runner]

OPERATION = "qk_norm_rope"


class Inputs(NamedTuple):
    """The tensors of a call. A weight is None where there is none, ``sin`` where ``cos`` holds angles."""

    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor | None
    position_ids: torch.Tensor | None
    offsets: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


class Options(NamedTuple):
    """The options of a call, as the registered operator takes them: the norm's, then the rotation's."""

    eps: float = 1e-6
    weight_offset: float = 0.0
    cast: str = "before_weight"
    layout: str = "bshd"
    interleaved: bool = False
    rotary_dim: int | None = None
    rotary_offset: int = 0
    context_parallel: tuple[int, ...] | None = None
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False


N_NORM_OPTIONS = 3
"""How many of the options are the norm's."""


def norm_options(options: Sequence[object]) -> norm.Options:
    """The options of the first step."""
    return norm.Options._make((*options[:N_NORM_OPTIONS], "rounded"))


def rope_options(options: Sequence[object]) -> rope.Options:
    """The options of the second step."""
    return rope.Options(*options[N_NORM_OPTIONS:])  # type: ignore[arg-type]


def rope_inputs(inputs: Sequence[torch.Tensor | None]) -> rope.Inputs:
    """The tensors of the second step, ``q`` and ``k`` standing for their norms."""
    return rope.Inputs._make((*inputs[:2], *inputs[4:]))


@dataclass(frozen=True)
class QkNormRopeCall:
    """A valid call as those of its steps. ``str`` gives the shape class that an explanation shows.

    Attributes:
        q_norm: the norm of ``q``.
        k_norm: the norm of ``k``.
        rotation: the rotation of both.
    """

    q_norm: norm.RmsNormCall
    k_norm: norm.RmsNormCall
    rotation: rope.RopeCall

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of streams, table and weights."""
        weights = (self.q_norm.weight_dtype, self.k_norm.weight_dtype)
        return (self.rotation.dtype, self.rotation.table_dtype, *(d for d in weights if d is not None))

    def __str__(self) -> str:
        weights = [name for name, each in (("q", self.q_norm), ("k", self.k_norm)) if each.weight_dtype is not None]
        given = f"weight for {' and '.join(weights)}" if weights else "no weight"
        return f"{self.rotation}, {given}, cast {self.q_norm.options.cast}"


def describe(inputs: Inputs, offset: int, options: Options) -> QkNormRopeCall:
    """Validate a call by its metadata alone.

    Raises:
        ArgumentError: a rank, shape, layout, device or option that does not fit.
        DTypeError: a dtype that is not accepted, or an argument of another type.
    """
    rotation = rope.describe(rope_inputs(inputs), offset, rope_options(options), OPERATION)
    q_norm, k_norm = (
        norm.describe(norm.Inputs(x, None, weight), norm_options(options), OPERATION, (name, f"{name}_weight"))
        for name, x, weight in (("q", inputs.q, inputs.q_weight), ("k", inputs.k, inputs.k_weight))
    )
    return QkNormRopeCall(q_norm, k_norm, rotation)


def check_call(call: QkNormRopeCall, inputs: Sequence[torch.Tensor | None], offset: int) -> None:
    """Check what may differ between two calls of equal metadata: the offset, and values where they can be read.

    Raises:
        ArgumentError: as for :func:`tilewright.rope`.
    """
    rope.check_call(call.rotation, rope_inputs(inputs), offset, OPERATION)
