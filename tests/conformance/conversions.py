"""What a conversion between two dtypes gives, computed in NumPy from the definitions of the formats.

Floats of at most 16 bits are rounded by looking for the two neighbours in the list of all of them, so nothing here
depends on another conversion of the same formats. ``longdouble`` holds every 64-bit integer exactly.
"""

from functools import cache

import numpy as np
import torch

from conformance.harness import Dtype, from_bits

_LARGEST = {"float8e4nv": 0x7E, "float8e5": 0x7B, "float16": 0x7BFF, "bfloat16": 0x7F7F}  # codes of the largest finite
_NAN = {"float8e4nv": 0x7F, "float8e5": 0x7F, "float16": 0x7E00, "bfloat16": 0x7FC0}
SATURATING = ("float8e4nv", "float8e5")  # overflow and infinity go to the largest finite value, as NVIDIA's satfinite


@cache
def _positive(dtype: Dtype) -> np.ndarray:
    """The non-negative finite values in the order of their codes, and the one that would come next."""
    codes = np.arange(_LARGEST[dtype.name] + 2)
    exponent, fraction = codes >> dtype.mantissa, codes & ((1 << dtype.mantissa) - 1)
    significand = fraction + np.where(exponent > 0, 1 << dtype.mantissa, 0)
    scale = np.maximum(exponent, 1) - 1 + dtype.min_exponent - dtype.mantissa
    return np.ldexp(significand.astype(np.longdouble), scale)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same values in a NumPy dtype that holds them: floats as float64 (float32 stays itself)."""
    tensor = tensor.detach().cpu()
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float32, torch.float64):
        return tensor.to(torch.float32).double().numpy()
    return tensor.numpy()


def round_to(values: np.ndarray, dtype: Dtype, rounding: str = "rtne", saturate: bool | None = None) -> torch.Tensor:
    """Real numbers rounded once to a float of at most 16 bits, to nearest even or towards zero ("rtz")."""
    saturate = dtype.name in SATURATING if saturate is None else saturate
    largest, table = _LARGEST[dtype.name], _positive(dtype)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = values.astype(np.longdouble)
    magnitude = np.abs(np.where(np.isfinite(values), values, 0))
    code = np.minimum(np.searchsorted(table, magnitude, side="right") - 1, largest)
    if rounding == "rtne":
        middle = (table[code] + table[code + 1]) / 2  # exact: one bit more than the format has
        code = code + ((magnitude > middle) | ((magnitude == middle) & (code % 2 == 1)))
    code = np.where(np.isinf(values), largest + 1, code)  # the code past the largest is infinity, save in float8e4nv
    code = np.minimum(code, largest) if saturate else code
    code = np.where(np.isnan(values), _NAN[dtype.name], code)
    return from_bits(code | (np.signbit(values).astype(np.int64) << (dtype.bits - 1)), dtype)


def convert(tensor: torch.Tensor, dtype: Dtype, rounding: str = "rtne", saturate: bool | None = None) -> torch.Tensor:
    """``tensor`` in another dtype: integers wrap, floats become integers by truncation (in range), the rest rounds."""
    values = to_numpy(tensor)
    if dtype.torch == tensor.dtype:
        return tensor.detach().cpu()
    if dtype.kind == "bool":
        return torch.from_numpy(values != 0)
    if not dtype.is_float or dtype.name in ("float32", "float64"):
        with np.errstate(all="ignore"):
            return torch.from_numpy(values.astype(dtype.name))
    return round_to(values, dtype, rounding, saturate)
