"""The arithmetic of a format within Triton kernels: from magnitudes to scales, from numbers to FP8.

Division by a scale is exact where the policy divides. Its quotient is ``x * high + x * low``, with ``high + low`` the
reciprocal to twice the precision and ``high`` so short that its product with a 16-bit ``x`` is exact: one product and
one multiply-add for each element instead of the eight or so instructions of a division. For float32 ``x`` the product
with the reciprocal is corrected by its remainder (P. Markstein, "Computation of elementary functions on the IBM RISC
System/6000 processor", 1990).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tilewright.ops.rms_norm.kernels import tile, tile_mask

if TYPE_CHECKING:
    from tilewright.ops.quant_fp8.call import QuantCall
    from tilewright.ops.quant_fp8.format import QuantFormat
    from tilewright.platforms import DeviceFacts

# A Triton that lacks one of these fails here, at import, where dispatch takes note, and not at a launch.
_NEEDED = (libdevice.fast_dividef, tl.PropagateNan.ALL, tl.reduce)

# A FORMAT is a tuple that is settled when compiling, and these are the places in it.
GROUP_SIZE = tl.constexpr(0)  # 0 per token, -1 for a given scale
KIND = tl.constexpr(1)  # how scales are kept: "fp32"; "power" of two in fp32; "bytes"
DIVIDES = tl.constexpr(2)
ROUNDS_INPUT = tl.constexpr(3)
MAXIMUM = tl.constexpr(4)
AMAX_FLOOR = tl.constexpr(5)
SCALE_FLOOR = tl.constexpr(6)
UE8M0_FLOOR = tl.constexpr(7)
CLAMPS = tl.constexpr(8)
PACK = tl.constexpr(9)  # scales to a word
HIGH_BITS = tl.constexpr(10)  # bits of ``high``

_MANTISSA = {torch.bfloat16: 8, torch.float16: 11}
"""Bits of the mantissa of 16-bit dtypes."""


@triton.jit
def larger(a, b):
    """The larger of two; a NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_of(amax, FORMAT: tl.constexpr):
    """The scale of groups from their largest magnitudes, of any shape, as ``reference.scales`` defines it."""
    amax = tl.maximum(amax, FORMAT[AMAX_FLOOR], propagate_nan=tl.PropagateNan.ALL)
    maximum = tl.full(amax.shape, FORMAT[MAXIMUM], tl.float32)
    scale = amax * (1.0 / FORMAT[MAXIMUM])  # corrected by its remainder: amax / maximum, rounded once
    corrected = tl.fma(tl.fma(-scale, maximum, amax), tl.full(amax.shape, 1.0 / FORMAT[MAXIMUM], tl.float32), scale)
    scale = tl.where(amax == float("inf"), amax, corrected)
    scale = tl.maximum(scale, FORMAT[SCALE_FLOOR], propagate_nan=tl.PropagateNan.ALL)
    if FORMAT[KIND] != "fp32":
        scale = tl.maximum(scale, FORMAT[UE8M0_FLOOR], propagate_nan=tl.PropagateNan.ALL)
        bits = scale.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, rounded, scale)
    return scale


@triton.jit
def factors(scale, FORMAT: tl.constexpr):
    """Two factors of an element for its division by ``scale``; see the top of this file.

    FORMAT[HIGH_BITS] bits of the reciprocal's mantissa are ``high``, or all of it where that is 24.
    """
    one = tl.full(scale.shape, 1.0, tl.float32)
    reciprocal = libdevice.fast_dividef(one, scale)
    if FORMAT[DIVIDES] and FORMAT[HIGH_BITS] < 24 and FORMAT[KIND] == "fp32":
        MASK: tl.constexpr = -(1 << (24 - FORMAT[HIGH_BITS]))
        high = (reciprocal.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
        low = tl.fma(-scale, high, one) * reciprocal
        low = tl.where(scale == float("inf"), 0.0, low)
    else:
        high = tl.fma(reciprocal, tl.fma(-scale, reciprocal, one), reciprocal)
        high = tl.where(scale == float("inf"), 0.0, high)
        low = -scale
    return high, low


@triton.jit
def _applied(x, high, low, FORMAT: tl.constexpr):
    """``x / scale`` or ``x * (1 / scale)``; all of one shape."""
    if not FORMAT[DIVIDES] or FORMAT[KIND] != "fp32":  # a power of two has an exact reciprocal
        q = x * high
    elif FORMAT[HIGH_BITS] < 24:
        q = x * high
        if FORMAT[GROUP_SIZE] < 0:  # under a given scale an infinite x is no reason for the scale to be infinite
            corrected = tl.fma(x, low, q)
            q = tl.where(tl.abs(corrected) < float("inf"), corrected, q)
        else:
            q = tl.fma(x, low, q)
    else:
        q = x * high
        corrected = tl.fma(tl.fma(q, low, x), high, q)
        q = tl.where((tl.abs(corrected) < float("inf")) & (q != 0), corrected, q)  # a zero keeps its sign
    return q


@triton.jit
def _store_values(
    values_ptr, q, row, row_mask, column, N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Clamp, convert and store one chunk of values [BLOCK_M, CHUNK]."""
    if FORMAT[CLAMPS]:
        q = tl.clamp(q, -FORMAT[MAXIMUM], FORMAT[MAXIMUM], propagate_nan=tl.PropagateNan.ALL)
    q = q.to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + tile(row * N_COLS, column), q, tile_mask(row_mask, column, N_COLS, CHUNK))


@triton.jit
def store_scales(scale_ptr, scale, row, row_mask, group, mask, stride_row, stride_group, FORMAT: tl.constexpr):
    """Scales [BLOCK_M, K] of the groups [K], as float32 or as exponents, one of them for each that ``mask`` keeps."""
    if FORMAT[KIND] == "bytes":
        value = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
        column = (group // FORMAT[PACK]) * stride_group + group % FORMAT[PACK]
    else:
        value = scale
        column = group * stride_group
    tl.store(scale_ptr + row[:, None] * stride_row + column[None, :], value, row_mask[:, None] & mask[None, :])


@triton.jit
def quantise_groups(
    values_ptr, scale_ptr, y, row, row_mask, start, stride_scale_row, stride_scale_group,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantise one chunk ``y [BLOCK_M, CHUNK]`` that begins with column ``start``, by groups."""
    GROUP: tl.constexpr = min(FORMAT[GROUP_SIZE], CHUNK)
    PARTS: tl.constexpr = GROUP // VECTOR
    N_GROUPS: tl.constexpr = CHUNK // GROUP
    pieces = tl.reshape(y, (BLOCK_M, CHUNK // VECTOR, VECTOR))
    largest = tl.reduce(tl.abs(pieces), 2, larger)  # of what a thread holds side by side
    amax = tl.reduce(tl.reshape(largest, (BLOCK_M, N_GROUPS, PARTS)), 2, larger)
    scale = scale_of(amax, FORMAT)
    high, low = factors(scale, FORMAT)
    # One of everything for each piece: what belongs to an element lies in the thread that holds it.
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_M, N_GROUPS, PARTS)), (BLOCK_M, N_GROUPS * PARTS))
    high = tl.reshape(tl.broadcast_to(high[:, :, None], (BLOCK_M, N_GROUPS, PARTS)), (BLOCK_M, N_GROUPS * PARTS, 1))
    low = tl.reshape(tl.broadcast_to(low[:, :, None], (BLOCK_M, N_GROUPS, PARTS)), (BLOCK_M, N_GROUPS * PARTS, 1))
    q = _applied(
        pieces, tl.broadcast_to(high, pieces.shape), tl.broadcast_to(low, pieces.shape), FORMAT
    )  # fmt: skip
    piece = tl.arange(0, N_GROUPS * PARTS)
    first = (piece % PARTS == 0) & (start + piece * VECTOR < N_COLS)
    group = start // FORMAT[GROUP_SIZE] + piece // PARTS
    store_scales(scale_ptr, scale, row, row_mask, group, first, stride_scale_row, stride_scale_group, FORMAT)
    column = start + tl.arange(0, CHUNK)
    _store_values(values_ptr, tl.reshape(q, (BLOCK_M, CHUNK)), row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def quantise_by(
    values_ptr, y, high, low, row, row_mask, column,
    N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Quantise one chunk by factors [BLOCK_M] of its rows."""
    shape: tl.constexpr = y.shape
    q = _applied(
        y, tl.broadcast_to(high[:, None], shape), tl.broadcast_to(low[:, None], shape), FORMAT
    )  # fmt: skip
    _store_values(values_ptr, q, row, row_mask, column, N_COLS, FORMAT, CHUNK)


@triton.jit
def quantise_given(
    values_ptr, y, scale, row, row_mask, column, N_COLS: tl.constexpr, FORMAT: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Quantise one chunk by a given scale, which may be any number."""
    scales = tl.full(y.shape, scale, tl.float32)
    if (tl.abs(scale) >= 1.1754943508222875e-38) & (tl.abs(scale) <= 8.507059173023462e37):  # its reciprocal is normal
        high, low = factors(tl.full((1,), scale, tl.float32), FORMAT)
        q = _applied(y, tl.broadcast_to(high[:, None], y.shape), tl.broadcast_to(low[:, None], y.shape), FORMAT)
    elif FORMAT[DIVIDES]:
        q = tl.div_rn(y, scales)
    else:
        q = y * tl.div_rn(tl.full(y.shape, 1.0, tl.float32), scales)
    _store_values(values_ptr, q, row, row_mask, column, N_COLS, FORMAT, CHUNK)


def constants_of(call: QuantCall, f: QuantFormat, device: DeviceFacts) -> tuple[Any, ...]:
    """A format as the kernel's constant tuple."""
    policy = f.arithmetic
    assert f.dtype is not None
    maximum = float(policy.maximum_of(f.dtype))
    kind = {"fp32": "fp32", "ue8m0_fp32": "power"}.get(f.scale_format, "bytes")
    short = call.dtype in _MANTISSA and policy.round_input
    return (
        -1 if call.static else f.group_size or 0,
        kind,
        policy.apply == "divide",
        policy.round_input,
        maximum,
        float(policy.amax_floor),
        float(policy.scale_floor),
        float(policy.ue8m0_floor),
        not device.fp8_saturates or maximum != torch.finfo(f.dtype).max,
        4 if f.is_packed else 1,
        24 - _MANTISSA[call.dtype] if short else 24,
    )
