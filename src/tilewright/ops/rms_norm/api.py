"""The public functions of RMSNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from tilewright.dispatch import Operation
from tilewright.dispatch.eager import record, unobserved
from tilewright.dispatch.selection import bound, override
from tilewright.ops.rms_norm.call import Inputs, Options, describe
from tilewright.ops.rms_norm.op import (
    IMPLEMENTATIONS,
    described,
    normalise,
    normalise_backward,
    propagate,
    remember,
    run_registered,
    run_registered_backward,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.dispatch import Described

Cast = Literal["before_weight", "after_weight"]
ResidualRounding = Literal["rounded", "exact"]
_PLAIN = "rms_norm"
_SUM = "add_rms_norm"


class AddedNorm(NamedTuple):
    """The norm of a sum, and the sum: the new residual stream."""

    y: torch.Tensor
    residual: torch.Tensor


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast: Cast = "before_weight",
    impl: str | None = None,
) -> torch.Tensor:
    """Divide each row by its root mean square, and scale its columns.

    For each row of N columns::

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)

    Everything is computed in float32 (float64 for float64 input) and rounded once to the dtype of ``x``; with
    ``cast="before_weight"`` the norm is also rounded to it before the weight multiplies. Source: Zhang and Sennrich,
    "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Args:
        x: ``[..., N]``, N from 1 to 262144; bfloat16, float16, float32 or float64, any strides.
        weight: ``[N]``, any of these dtypes, float64 only beside float64; None for no weight.
        eps: added to the mean of squares; at least 2^-126.
        weight_offset: added to the weight: 1.0 for Gemma, whose checkpoints hold the weight's distance from one.
        cast: where the norm is rounded to the dtype of ``x``: ``"before_weight"`` rounds it before the weight
            multiplies, as Hugging Face's Llama does, and the product again; ``"after_weight"`` rounds the product
            alone, as Gemma and ``torch.nn.functional.rms_norm`` do.
        impl: the implementation that must serve, such as ``"triton"``; by default the best one for the device.

    Returns:
        The norm: shape, dtype and strides of ``x`` (as ``torch.empty_like`` keeps them); empty for no rows.

        A row of zeros gives zeros. A row whose squares exceed float32 gives zeros, one that holds an infinity gives
        NaN there and zeros elsewhere, one that holds a NaN gives NaN. No row depends on another.

        Differentiable in ``x`` and ``weight``. The weight's gradient is summed over the rows in a fixed order, in the
        arithmetic's dtype, and rounded once to the weight's.

    Raises:
        ArgumentError: a shape, device or option that does not fit.
        DTypeError: a dtype that is not accepted, or an argument of another type.
        ImplementationError: ``impl`` cannot serve this call.

    Example:
        >>> import torch, tilewright
        >>> tilewright.rms_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 2.0]))
        tensor([[0.8485, 2.2627],
                [0.0000, 0.0000]])
    """
    return _run(_PLAIN, (x, None, weight), (eps, weight_offset, cast, "rounded"), impl)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast: Cast = "before_weight",
    residual_rounding: ResidualRounding = "rounded",
    impl: str | None = None,
) -> AddedNorm:
    """Add to the residual stream, and normalise the sum, in one pass over memory.

    For each row::

        sum = x + residual
        y   = rms_norm(sum, weight, ...)

    The sum is computed in float32 (float64 for float64 input) and rounded once to the dtype of ``residual`` where it is
    stored. Nothing is written into the arguments.

    Args:
        x: as in :func:`tilewright.rms_norm`: what a layer adds.
        residual: the stream so far: the shape of ``x``; its dtype, or float32 beside 16 bits; any strides.
        weight: as in :func:`tilewright.rms_norm`.
        eps: as in :func:`tilewright.rms_norm`.
        weight_offset: as in :func:`tilewright.rms_norm`.
        cast: as in :func:`tilewright.rms_norm`.
        residual_rounding: what the norm is taken of: ``"rounded"``, the sum as it is stored, or ``"exact"``, the sum
            before that rounding. For a backward, the first keeps the stored sum alone, the second ``x`` and
            ``residual``.
        impl: as in :func:`tilewright.rms_norm`.

    Returns:
        ``AddedNorm(y, residual)``: the norm, with shape, dtype and strides of ``x``, and the sum, with those of
        ``residual`` (as ``torch.empty_like`` keeps them). Rows behave as in :func:`tilewright.rms_norm`.

        Differentiable in ``x``, ``residual`` and ``weight``. Each gradient is rounded once, to its tensor's dtype.

    Raises:
        ArgumentError: as :func:`tilewright.rms_norm`, or ``residual`` has another shape than ``x``.
        DTypeError: as :func:`tilewright.rms_norm`.
        ImplementationError: as :func:`tilewright.rms_norm`.

    Example:
        >>> import torch, tilewright
        >>> y, residual = tilewright.add_rms_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]]))
        >>> residual
        tensor([[3., 4.]])
        >>> y
        tensor([[0.8485, 1.1314]])
    """
    y, stored = _run(_SUM, (x, residual, weight), (eps, weight_offset, cast, residual_rounding), impl)
    assert stored is not None
    return AddedNorm(y, stored)


def _run(
    operation: str, inputs: tuple[Any, ...], options: tuple[Any, ...], impl: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, residual, weight = inputs
    if x is None or (residual is None and operation == _SUM):  # within this family None means there is none
        describe(Inputs(*inputs), Options(*options), operation)
    if impl is None:
        impl = override()  # asked here and nowhere later: a backward runs when and where it will
    if not unobserved(inputs):
        if not torch.compiler.is_compiling():  # the operator would judge the same, but what is no tensor as torch does
            describe(Inputs(*inputs), Options(*options), operation)
        return run_registered(inputs, options, impl)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (residual is not None and residual.requires_grad)
        or (weight is not None and weight.requires_grad)
    ):
        if residual is None:
            return _norm(x, weight, options, impl), None
        result: tuple[torch.Tensor, torch.Tensor] = _added_norm(x, residual, weight, options, impl)
        return result
    return normalise(inputs, options, impl, operation)


class _Norm(torch.autograd.Function):
    """RMSNorm of plain tensors in eager mode. The registered operator has the same backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, options: tuple[Any, ...], impl: str | None
    ) -> torch.Tensor:
        inputs = Inputs(x, None, weight)
        y, _ = normalise(inputs, options, impl)
        remember(ctx, (inputs, options, impl), y, None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad_x, _, grad_weight = propagate(ctx, grad, None, run_backward)
        return grad_x, grad_weight, None, None


class _AddedNorm(torch.autograd.Function):
    """The same of a sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        options: tuple[Any, ...],
        impl: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = Inputs(x, residual, weight)
        y, stored = normalise(inputs, options, impl, _SUM)
        assert stored is not None
        remember(ctx, (inputs, options, impl), y, stored)
        return y, stored

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_stored: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return (*propagate(ctx, grad, grad_stored, run_backward), None, None)


_norm, _added_norm = map(record, (_Norm, _AddedNorm))


def run_backward(
    inputs: Sequence[torch.Tensor | None], options: tuple[Any, ...], dtype: torch.dtype, weight_grad: bool, impl: Any
) -> list[torch.Tensor]:
    """As ``normalise_backward``, by the registered operator where somebody watches."""
    if torch.is_grad_enabled() or not unobserved(inputs):  # also for gradients of gradients
        return run_registered_backward(inputs, options, dtype, weight_grad, impl)
    return normalise_backward(inputs, options, dtype, weight_grad, impl)


def _describe(function: Callable[..., Any]) -> Callable[..., Described]:
    """How an explanation reads the arguments of a public function."""
    name = function.__name__

    def describe(*args: Any, **kwargs: Any) -> Described:
        given = bound(function, args, kwargs)
        inputs = Inputs(given["x"], given.get("residual"), given["weight"])
        options = Options(**{field: given[field] for field in Options._fields if field in given})
        return described(inputs, options, given["impl"], name)

    return describe


OPERATIONS = {
    function.__name__: Operation(function.__name__, _describe(function), IMPLEMENTATIONS)
    for function in (rms_norm, add_rms_norm)
}
