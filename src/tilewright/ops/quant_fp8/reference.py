"""The definition of FP8 quantisation, in plain PyTorch.

Arithmetic is float32. Every rounding is written out, and every division is one: a division by a Python number would be
a multiplication by its reciprocal on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tilewright.ops.quant_fp8.call import rope_inputs, scale_strides
from tilewright.ops.rms_norm import reference as norm
from tilewright.ops.rms_norm.call import Inputs as NormInputs
from tilewright.ops.rope import reference as rope

if TYPE_CHECKING:
    from tilewright.ops.quant_fp8.call import Inputs, QuantCall
    from tilewright.ops.quant_fp8.format import QuantFormat


def quantised(call: QuantCall, inputs: Inputs) -> list[torch.Tensor]:
    """Every result of a call: values and scales of each format, then the stored sum and what is emitted, if asked for.

    With a given scale there are values alone.
    """
    y, stored = source(call, inputs)
    emitted = y.to(call.dtype)
    results = []
    for f in call.formats:
        x = emitted.float() if f.arithmetic.round_input else source(call, inputs, rounded=False)[0]
        if inputs.scale is not None:
            results.append(encode(f, x, inputs.scale.reshape(())))
        else:
            scale = scales(f, x)
            results += [encode(f, x, spread(f, scale, call.n_cols)), laid_out(f, scale)]
    if stored is not None:
        results.append(stored)
    if call.emit:
        results.append(emitted)
    return results


def source(call: QuantCall, inputs: Inputs, *, rounded: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is quantised, in float32 and not rounded at the end, and the stored sum, if there is one.

    Args:
        call: says how.
        inputs: the tensors.
        rounded: whether steps in between are rounded to the dtype of ``x``: the norm before its weight multiplies,
            where ``cast="before_weight"``; ``silu(gate)`` before it multiplies, as PyTorch's operators do one after
            the other.
    """
    if call.norm is not None:
        z, stored = norm.summed(call.norm, NormInputs(inputs.x, inputs.residual, inputs.weight))
        return norm.normalised(call.norm, z, inputs.weight, rounded=rounded), stored
    if call.source == "plain":
        return inputs.x.float(), None
    if call.rope is not None:
        wide = inputs._replace(x=inputs.x.float())
        rotated = torch.empty_like(wide.x)
        rope.rotate(call.rope, rope_inputs(wide), 0, (rotated, None))
        return rotated, None
    gate, up = inputs.x.float().chunk(2, dim=-1)
    activated = gate / (1.0 + torch.exp(-gate))
    return (activated.to(call.dtype).float() if rounded else activated) * up, None


def scales(f: QuantFormat, x: torch.Tensor) -> torch.Tensor:
    """The scale of each group of ``x [..., N]``, float32 ``[..., groups]``; a NaN in a group makes its scale NaN."""
    assert f.dtype is not None
    policy = f.arithmetic
    amax = grouped(f, x.abs()).amax(-1)
    maximum = torch.full((), policy.maximum_of(f.dtype), device=x.device)
    scale = (amax.clamp(min=policy.amax_floor) / maximum).clamp(min=policy.scale_floor)
    return rounded_up(scale.clamp(min=policy.ue8m0_floor)) if f.rounds_up else scale


def rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """``2^ceil(log2(scale))`` of normal float32 numbers, exactly: the exponent plus one if there is any mantissa."""
    bits = scale.view(torch.int32)
    return torch.where(scale.isfinite(), ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32), scale)


def grouped(f: QuantFormat, x: torch.Tensor) -> torch.Tensor:
    """``[..., N]`` as ``[..., groups, group_size]``, the last group filled up with zeros."""
    if f.group_size is None:
        return x.unsqueeze(-2)
    padded = F.pad(x, (0, -x.shape[-1] % f.group_size))
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // f.group_size, f.group_size)


def spread(f: QuantFormat, scale: torch.Tensor, n_cols: int) -> torch.Tensor:
    """The scale of each element: ``[..., groups]`` to ``[..., N]`` or, per token, ``[..., 1]``."""
    return scale if f.group_size is None else _each(scale, f.group_size, n_cols)


def _each(scale: torch.Tensor, group_size: int, n_cols: int) -> torch.Tensor:
    """A scale for each element, ``[..., n_cols]``.

    By an index: of ``repeat_interleave`` cut short, torch 2.13's compiler leaves out the last group, which is shorter.
    """
    return scale[..., torch.arange(n_cols, device=scale.device) // group_size]


def encode(f: QuantFormat, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 values of ``x`` under scales that broadcast against it, rounded to nearest even."""
    assert f.dtype is not None
    maximum = f.arithmetic.maximum_of(f.dtype)
    quotient = x / scale if f.arithmetic.apply == "divide" else x * torch.ones_like(scale).div(scale)
    return quotient.clamp(-maximum, maximum).to(f.dtype)


def laid_out(f: QuantFormat, scale: torch.Tensor) -> torch.Tensor:
    """Float32 scales ``[..., groups]`` in the format and the memory layout that were asked for."""
    if f.scale_format == "ue8m0":
        scale = exponents(scale).view(torch.float8_e8m0fnu)
    elif f.is_packed:
        scale = F.pad(exponents(scale), (0, -scale.shape[-1] % 4)).contiguous().view(torch.int32)
    lead, groups = tuple(scale.shape[:-1]), scale.shape[-1]
    out = torch.empty_strided((*lead, groups), scale_strides(f, lead, groups), dtype=scale.dtype, device=scale.device)
    return out.copy_(scale)


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """The biased exponents of powers of two, uint8; 255 of an infinity or a NaN."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


def unpacked(scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Scales of any format as float32 ``[..., groups]``."""
    if scale.dtype == torch.int32:
        dense = scale.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves the stride of a single column
        scale = dense.view(torch.uint8)[..., :groups].contiguous().view(torch.float8_e8m0fnu)
    return scale.float()


def dequantised(values: torch.Tensor, scale: torch.Tensor, group_size: int | None, dtype: torch.dtype) -> torch.Tensor:
    """``values * scale`` in float32, rounded once to ``dtype``. One scale for all, where there is but one."""
    n_cols = values.shape[-1]
    if scale.numel() == 1 and scale.dtype == torch.float32:
        return (values.float() * scale.reshape(())).to(dtype)
    if group_size is None:
        return (values.float() * unpacked(scale, 1)).to(dtype)
    wide = _each(unpacked(scale, -(-n_cols // group_size)), group_size, n_cols)
    return (values.float() * wide).to(dtype)


def scaled_mm(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    *,
    group_size: tuple[int | None, int | None] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``dequantised(a) @ dequantised(b).T`` in float32, rounded once: what a kernel on FP8 operands approximates.

    Args:
        a: values ``[..., M, K]`` and their scales along ``K``.
        b: values ``[N, K]``, a linear layer's weight, and their scales along ``K``.
        group_size: of ``a`` and of ``b``.
        dtype: of the result.
    """
    wide = [dequantised(v, s, g, torch.float32) for (v, s), g in zip((a, b), group_size, strict=True)]
    return torch.matmul(wide[0], wide[1].T).to(dtype)
