"""What ``tl.extra.libdevice`` computes in the interpreter of the CPU target, for the same symbols as in native code.

A floating point operand comes in f64, whatever its type; a floating point result is rounded to its type afterwards.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from tilewright.cpu import interpreter_numerics as numerics

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_SHARED = """acos acosh asin asinh atan atan2 atanh cos cosh erf erfc exp exp2 expm1 log log10 log1p log2 rsqrt sin
sinh tan tanh"""
FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: getattr(torch, name) for name in _SHARED.split()}
"""Functions that MLIR and the C library call by the same names as torch, for f64 tensors."""


def _gamma(x: float) -> float:
    try:
        return math.copysign(math.inf, x) if x == 0 else math.gamma(x)
    except OverflowError:
        return math.inf


def _positive_difference(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x <= y, 0, x - y)


def _saturate(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0).clamp(max=1)


def _first_set(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, numerics.trailing_zeros(x) + 1)


def _as_float(x: Tensor) -> Tensor:
    return x.view(torch.float32).to(torch.float64)


def _nearest_cube_root(x: float) -> float:
    root = math.cbrt(x)  # some C libraries are three units off
    if not x or not math.isfinite(x):
        return root
    exact = Fraction(root)
    return float(exact - (exact**3 - Fraction(x)) / (3 * exact**2))


_cube_root = numerics.by_element(_nearest_cube_root)
_FLOATING: dict[str, Callable[..., Tensor]] = FUNCTIONS | {
    "cbrt": _cube_root,
    "ceil": torch.ceil,
    "copysign": torch.copysign,
    "exp10": lambda x: torch.pow(10.0, x),
    "fabs": torch.abs,
    "fdim": _positive_difference,
    "floor": torch.floor,
    "fma": numerics.by_element(numerics.exact_fma),
    "fmod": numerics.remainder,
    "hypot": torch.hypot,
    "llrint": lambda x: x.round().to(torch.int64),
    "llround": lambda x: numerics.round_half_away(x).to(torch.int64),
    "nearbyint": torch.round,
    "pow": torch.pow,
    "rcbrt": lambda x: 1 / _cube_root(x),
    "remainder": numerics.by_element(math.remainder),
    "rint": torch.round,
    "round": numerics.round_half_away,
    "sqrt": numerics.by_element(math.sqrt),
    "tgamma": numerics.by_element(_gamma),
    "trunc": torch.trunc,
}
_FAST = ("cos", "exp", "exp10", "log", "log10", "log2", "pow", "sin", "tan")

LIBRARY: dict[str, Callable[..., Tensor]] = {
    **{f"__nv_{name}": function for name, function in _FLOATING.items()},
    **{f"__nv_{name}f": function for name, function in _FLOATING.items()},
    **{f"__nv_fast_{name}f": _FLOATING[name] for name in _FAST},
    **dict.fromkeys(("__nv_isnanf", "__nv_isnand"), torch.isnan),
    **dict.fromkeys(("__nv_isinff", "__nv_isinfd"), torch.isinf),
    **dict.fromkeys(("__nv_finitef", "__nv_isfinited"), torch.isfinite),
    **dict.fromkeys(("__nv_signbitf", "__nv_signbitd"), torch.signbit),
    **dict.fromkeys(("__nv_abs", "__nv_llabs"), torch.abs),
    **dict.fromkeys(("__nv_popc", "__nv_popcll"), numerics.population_count),
    **dict.fromkeys(("__nv_clz", "__nv_clzll"), numerics.leading_zeros),
    **dict.fromkeys(("__nv_ffs", "__nv_ffsll"), _first_set),
    **dict.fromkeys(("__nv_umulhi", "__nv_umul64hi"), numerics.multiply_high),
    **dict.fromkeys(("__nv_mulhi", "__nv_mul64hi"), numerics.multiply_high_signed),
    **dict.fromkeys(("__nv_float_as_int", "__nv_float_as_uint"), lambda x: x.to(torch.float32).view(torch.int32)),
    **dict.fromkeys(("__nv_int_as_float", "__nv_uint_as_float"), _as_float),
    "__nv_double_as_longlong": lambda x: x.view(torch.int64),
    "__nv_longlong_as_double": lambda x: x.view(torch.float64),
    "__nv_saturatef": _saturate,
}
"""The function of each symbol."""
