"""The definition of RMSNorm, in plain PyTorch.

Arithmetic is float32, float64 for float64 input. Every rounding is written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tilewright.ops.rms_norm.call import Inputs, Options, RmsNormCall


def rms_norm(call: RmsNormCall, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The norm in the dtype of ``x``, and the sum in that of ``residual``, if there is one."""
    z, stored = summed(call, inputs)
    return normalised(call, z, inputs.weight).to(call.dtype), stored


def summed(call: RmsNormCall, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the norm is taken of, in the arithmetic's dtype, and the sum as it is stored."""
    z = inputs.x.to(call.compute_dtype)
    if inputs.residual is None:
        return z, None
    z = z + inputs.residual.to(call.compute_dtype)
    stored = z.to(inputs.residual.dtype)
    return (stored.to(call.compute_dtype) if call.options.residual_rounding == "rounded" else z), stored


def normalised(
    call: RmsNormCall, z: torch.Tensor, weight: torch.Tensor | None, *, rounded: bool = True
) -> torch.Tensor:
    """The norm of ``z`` times the weight, not rounded at the end.

    Args:
        call: says how.
        z: in the arithmetic's dtype.
        weight: the weight, if there is one.
        rounded: whether ``cast="before_weight"`` rounds before the weight multiplies.
    """
    y = z * inverse_rms(call.options, z)
    if weight is None:
        return y
    if rounded and call.options.cast == "before_weight":
        y = y.to(call.dtype).to(call.compute_dtype)
    return y * scale_of(call, weight)


def inverse_rms(options: Options, z: torch.Tensor) -> torch.Tensor:
    """``1 / sqrt(mean(z^2) + eps)`` of each row, [..., 1]."""
    return torch.rsqrt(z.square().mean(-1, keepdim=True) + options.eps)


def scale_of(call: RmsNormCall, weight: torch.Tensor) -> torch.Tensor:
    """``weight + weight_offset`` in the arithmetic's dtype."""
    wide = weight.to(call.compute_dtype)
    return wide + call.options.weight_offset if call.options.weight_offset else wide  # -0.0 stays what it is


def rms_norm_backward(
    call: RmsNormCall,
    grad: torch.Tensor,
    grad_stored: torch.Tensor | None,
    z: torch.Tensor,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of ``z`` and of the weight, neither rounded.

    With ``n = z * r``, ``r = inverse_rms(z)`` and ``g = grad * (weight + weight_offset)``::

        grad_z      = r * (g - n * mean(g * n)) + grad_stored
        grad_weight = sum over rows of grad * n          (n rounded first where the forward rounds it)

    Args:
        call: the forward's.
        grad: of the norm.
        grad_stored: of the stored sum, if there is one.
        z: what the norm was taken of.
        weight: the weight, if there is one.
    """
    grad, z = grad.to(call.compute_dtype), z.to(call.compute_dtype)
    r = inverse_rms(call.options, z)
    n = z * r
    g = grad if weight is None else grad * scale_of(call, weight)
    grad_z = r * (g - n * (g * n).mean(-1, keepdim=True))
    if grad_stored is not None:
        grad_z = grad_z + grad_stored.to(call.compute_dtype)
    if weight is None:
        return grad_z, None
    if call.options.cast == "before_weight":
        n = n.to(call.dtype).to(call.compute_dtype)
    return grad_z, (grad * n).reshape(-1, call.n_cols).sum(0)
