"""The numbers that an NPU calculates with, as roundings of float32.

``dlfloat16`` has a sign, 6 bits of exponent with bias 31 and 9 bits of fraction (Agrawal et al., *DLFloat: A 16-b
floating point format designed for deep learning training and inference*, ARITH 2019): one pattern for infinity and NaN
together, no subnormal numbers. What is too large becomes the largest number here; how the device saturates is not
public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilewright.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable

DLFLOAT16_MAX = (2.0 - 2 * 2.0**-9) * 2.0**32
"""The largest number: the pattern of ones only is infinity."""

DLFLOAT16_MIN = (1.0 + 2.0**-9) * 2.0**-31
"""The smallest number above zero: the pattern of zeros only is zero."""

_DROPPED = 23 - 9


def dlfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, ties to even.

    Args:
        x: float32, any shape.

    Returns:
        Float32 numbers that dlfloat16 has; infinities and NaN as they were.
    """
    x = x.to(torch.float32)
    bits = x.contiguous().view(torch.int32)
    rounded = bits.bitwise_right_shift(_DROPPED).bitwise_and_(1)  # ties go to the even neighbour
    rounded.add_(bits).add_((1 << (_DROPPED - 1)) - 1).bitwise_and_(-(1 << _DROPPED))
    result = rounded.view(torch.float32).clamp_(-DLFLOAT16_MAX, DLFLOAT16_MAX)
    tiny = x.abs() < DLFLOAT16_MIN
    if bool(tiny.any()):
        nearest = torch.where(x.abs() <= DLFLOAT16_MIN / 2, 0.0, DLFLOAT16_MIN)
        result = torch.where(tiny, torch.copysign(nearest, x), result)
    finite = torch.isfinite(x)
    return result if bool(finite.all()) else torch.where(finite, result, x)


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest bfloat16, ties to even. Float32 in and out."""
    return x.to(torch.bfloat16).to(torch.float32)


def unrounded(x: torch.Tensor) -> torch.Tensor:
    """The number itself."""
    return x


_ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": unrounded,
    "bfloat16": bfloat16,
    "dlfloat16": dlfloat16,
}

COMPUTE_DTYPES = tuple(_ROUNDINGS)
"""The numbers that can be calculated with."""

_ALIASES = {
    "fp32": "float32", "bf16": "bfloat16", "bfloat": "bfloat16", "dlf16": "dlfloat16", "dlfloat": "dlfloat16",
}  # fmt: skip


def compute_dtype_of(name: str) -> str:
    """The full name of a compute dtype, for which the vendor's interfaces have short ones.

    Raises:
        UnknownNameError: there is none of this name.
    """
    full = _ALIASES.get(name, name)
    if full not in _ROUNDINGS:
        known = ", ".join((*COMPUTE_DTYPES, *_ALIASES))
        raise UnknownNameError(f"compute_dtype: got {name!r}, expected one of {known}")
    return full


def rounding(compute_dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that rounds to these numbers.

    Raises:
        UnknownNameError: there are none of this name.
    """
    return _ROUNDINGS[compute_dtype_of(compute_dtype)]
