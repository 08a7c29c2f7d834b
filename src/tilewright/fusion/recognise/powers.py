"""Where ``exp2(ceil(log2(s)))`` in float32 is the least power of two that is not below ``s``.

It is not in general: the logarithm of a number barely above a power of two rounds to the power's, and the result is
half of what exact rounding gives. The scales of 16-bit numbers come nowhere near. ``amax`` has 8 or 11 significant
bits; what it is mapped to, such as 448 = 7 * 2^6, has few; so their quotient is a power of two, or off from each by one
part in two thousand at least, where float32 tells logarithms apart by far less. That is counted here, for every
significand.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import torch

MARGIN = 2.0**-12
"""How far from every power of two a number is whose logarithm is not mistaken for the power's, relative to it.

Its logarithm is 3.5e-4 from the power's. That of a normal float32 number is below 128, where float32 has steps of
7.6e-6: a function may be off by dozens of them.
"""

_SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11}


@lru_cache(maxsize=256)
def powers_are_exact(
    dtype: torch.dtype, maximum: float, amax_floor: float, scale_floor: float, factor: float | None = None
) -> bool:
    """Whether ``exp2(ceil(log2(max(max(amax, amax_floor) / maximum, scale_floor))))`` rounds every scale up exactly.

    A function is taken to give the logarithms of powers of two, and powers of integers, without error, as those of
    torch do.

    Args:
        dtype: of the numbers whose magnitudes ``amax`` is one of.
        maximum: what ``amax`` is mapped to.
        amax_floor: 0 for none.
        scale_floor: 0 for none; one of the two keeps scales normal.
        factor: what ``amax`` is multiplied by instead of the division: then the results must be those of the division.
    """
    bits = _SIGNIFICANT.get(dtype)
    if bits is None:
        return False
    magnitudes = [float(m) for m in range(2 ** (bits - 1), 2**bits)]  # times a power of two, which changes nothing
    if amax_floor > 0:
        magnitudes.append(_float32(amax_floor))
    by = _float32(maximum)
    quotients = [_float32(m / by) for m in magnitudes]
    used = quotients if factor is None else [_float32(m * _float32(factor)) for m in magnitudes]
    floors = [_float32(scale_floor)] if scale_floor > 0 else []
    return all(map(_is_clear, [*used, *floors])) and list(map(_up, used)) == list(map(_up, quotients))


def _float32(number: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded


def _is_clear(number: float) -> bool:
    significand = math.frexp(number)[0]  # from 0.5 to below 1
    return significand == 0.5 or (2 * significand - 1 >= MARGIN and 1 - significand >= MARGIN)


def _up(number: float) -> int:
    significand, exponent = math.frexp(number)
    return exponent - (significand == 0.5)
