"""The public function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.dispatch import Operation
from tilewright.dispatch.eager import record, unobserved
from tilewright.dispatch.selection import bound, override
from tilewright.errors import DTypeError
from tilewright.ops.qk_norm_rope.call import OPERATION, Inputs, Options, describe, rope_inputs
from tilewright.ops.qk_norm_rope.op import (
    IMPLEMENTATIONS,
    described,
    normalise_and_rotate,
    propagate,
    remember,
    run_registered,
)
from tilewright.ops.rms_norm.api import run_backward
from tilewright.ops.rope.api import RotatedQK, hashable, split_offsets
from tilewright.ops.rope.call import refuse_table_gradients
from tilewright.ops.rope.op import rotate
from tilewright.ops.rope.op import run_registered as run_registered_rotation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilewright.dispatch import Described
    from tilewright.ops.rms_norm.api import Cast
    from tilewright.ops.rope.api import Layout


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: Cast = "before_weight",
    layout: Layout = "bshd",
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
    offsets: int | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    context_parallel: tuple[int, int] | None = None,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
    impl: str | None = None,
) -> RotatedQK:
    """Normalise each head of ``q`` and of ``k`` by its root mean square, and rotate both, in one launch.

    Exactly what the two steps give one after the other::

        q = rms_norm(q, q_weight, eps, weight_offset=weight_offset, cast=cast)
        k = rms_norm(k, k_weight, eps, weight_offset=weight_offset, cast=cast)
        q, k = rope_qk(q, k, cos, sin, ...)

    The norm is taken over the head's D features and rounded to the dtype of ``q`` before it is rotated, where it is
    rounded again. This is what Qwen3 does before its attention (arXiv:2505.09388); sources of the steps are those of
    :func:`tilewright.rms_norm` and :func:`tilewright.rope`.

    Args:
        q: ``[B, S, H, D]`` in the order that ``layout`` says, or ``[T, H, D]`` for packed tokens; bfloat16, float16,
            float32 or float64; any strides; D even, 2 to 512.
        k: like ``q`` with any number of heads of its own and any strides.
        q_weight: ``[D]``, any of these dtypes, float64 only beside float64; None for no weight.
        k_weight: likewise, of ``k``.
        cos: table of cosines, as in :func:`tilewright.rope`; without ``sin``, of angles in radians, as in
            :func:`tilewright.rope_from_angles`.
        sin: table of sines, like ``cos``; None where ``cos`` holds angles.
        eps: added to the mean of squares; at least 2^-126.
        weight_offset: added to both weights: 1.0 where they are stored as distances from one.
        cast: as in :func:`tilewright.rms_norm`.
        layout: of ``q`` and of ``k``, as in :func:`tilewright.rope`.
        interleaved: as in :func:`tilewright.rope`.
        position_ids: as in :func:`tilewright.rope`.
        offsets: as in :func:`tilewright.rope`.
        cu_seqlens: as in :func:`tilewright.rope`.
        context_parallel: as in :func:`tilewright.rope`.
        rotary_dim: as in :func:`tilewright.rope`.
        rotary_offset: the first rotated feature. The others are normalised alone.
        mrope_section: as in :func:`tilewright.rope`.
        mrope_interleaved: as in :func:`tilewright.rope`.
        impl: the implementation that must serve, such as ``"triton"``; by default the best one for the device.

    Returns:
        ``RotatedQK(q, k)``: shapes, dtype and strides of the arguments (as ``torch.empty_like`` keeps them). A token
        whose position lies outside the table is normalised and not rotated. With no tokens or no heads the result is
        empty.

        Differentiable in ``q``, ``k`` and both weights; the gradient of the norm is rounded to the dtype of ``q``. The
        tables are constants.

    Raises:
        ArgumentError: as :func:`tilewright.rope_qk` and :func:`tilewright.rms_norm`.
        DTypeError: likewise.
        ImplementationError: ``impl`` cannot serve this call.

    Example:
        >>> import torch, tilewright
        >>> cos, sin = tilewright.rope_table(64, 128)
        >>> q, k = torch.randn(2, 128, 8, 64), torch.randn(2, 128, 2, 64)
        >>> q, k = tilewright.qk_norm_rope(q, k, torch.ones(64), torch.ones(64), cos, sin)
        >>> k.shape
        torch.Size([2, 128, 2, 64])
    """
    offset, starts = (0, None) if offsets is None else split_offsets(OPERATION, offsets)
    inputs = (q, k, q_weight, k_weight, cos, sin, position_ids, starts, cu_seqlens)
    options = (
        eps, weight_offset, cast, layout, interleaved, rotary_dim, rotary_offset,
        context_parallel if context_parallel is None else hashable(context_parallel),
        mrope_section if mrope_section is None else hashable(mrope_section),
        mrope_interleaved,
    )  # fmt: skip
    return RotatedQK(*_run(inputs, offset, options, impl))


def _check_given(inputs: Sequence[Any]) -> None:
    """Refuse what is no tensor, and None where one is needed."""
    for field, value in zip(Inputs._fields, inputs, strict=True):
        if (value is None and field in ("q", "k", "cos")) or not isinstance(value, torch.Tensor | None):
            raise DTypeError(OPERATION, field, f"got {type(value).__name__}; expected a tensor")


def _run(
    inputs: tuple[Any, ...], offset: int, options: tuple[Any, ...], impl: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, q_weight, k_weight, cos, sin, *_ = inputs
    if q is None or k is None or cos is None:
        _check_given(inputs)
    if impl is None:
        impl = override()  # asked here and nowhere later: a backward runs when and where it will
    if not unobserved(inputs):
        _check_given(inputs)
        if torch.is_grad_enabled():
            refuse_table_gradients(rope_inputs(inputs), OPERATION)
        if not torch.compiler.is_compiling():  # the operator would judge the same, but an option's type as torch does
            describe(Inputs(*inputs), offset, Options(*options))
        return run_registered(inputs, offset, options, impl)
    if torch.is_grad_enabled():
        if cos.requires_grad or (sin is not None and sin.requires_grad):
            refuse_table_gradients(rope_inputs(inputs), OPERATION)
        if (
            q.requires_grad
            or k.requires_grad
            or (q_weight is not None and q_weight.requires_grad)
            or (k_weight is not None and k_weight.requires_grad)
        ):
            result: tuple[torch.Tensor, torch.Tensor] = _recorded(*inputs[:4], (inputs, offset, options, impl))
            return result
    return normalise_and_rotate(inputs, offset, options, impl)


class _QkNormRope(torch.autograd.Function):
    """Both steps for plain tensors in eager mode. The registered operator has the same backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        given: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (q, k, q_weight, k_weight, *given[0][4:])
        outputs = normalise_and_rotate(inputs, *given[1:])
        remember(ctx, (inputs, *given[1:]), outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *propagate(ctx, grads, _rotate, run_backward), None  # type: ignore[arg-type]


_recorded = record(_QkNormRope)


def _rotate(inputs: Sequence[Any], offset: int, options: tuple[Any, ...], impl: str | None, strides: Any) -> Any:
    """As ``rotate``, by the registered operator where somebody watches."""
    if torch.is_grad_enabled() or not unobserved(inputs):  # also for gradients of gradients
        return run_registered_rotation(inputs, offset, options, impl, strides)
    return rotate(inputs, offset, options, impl, strides=strides, operation=OPERATION)


def _describe(*args: Any, **kwargs: Any) -> Described:
    """How an explanation reads the arguments."""
    given = bound(qk_norm_rope, args, kwargs)
    offset, starts = (0, None) if given["offsets"] is None else split_offsets(OPERATION, given["offsets"])
    inputs = Inputs(**{field: given[field] for field in Inputs._fields} | {"offsets": starts})
    _check_given(inputs)
    options = Options(**{field: hashable(given[field]) for field in Options._fields})
    return described(inputs, offset, options, given["impl"])


OPERATIONS = {OPERATION: Operation(OPERATION, _describe, IMPLEMENTATIONS)}
