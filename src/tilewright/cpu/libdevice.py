"""What serves ``tl.extra.libdevice``: the symbols that Triton's module of that name emits, as C functions.

The functions that C's own ``<math.h>`` has go by their names there; ``tw_`` ones are in ``runtime.h``. A symbol that is
not here is refused.
"""

from __future__ import annotations

_C_MATH = (
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "copysign", "cos", "cosh", "erf", "erfc",
    "exp", "exp2", "expm1", "fabs", "fdim", "floor", "fma", "fmod", "hypot", "log", "log1p", "log2", "nearbyint",
    "pow", "remainder", "rint", "round", "sin", "sinh", "sqrt", "tan", "tanh", "tgamma", "trunc",
)  # fmt: skip
_ROUNDED_TO_INTEGER = ("llrint", "llround")
_OURS = (
    "rsqrt", "exp10", "rcbrt", "cbrt", "log10", "sinpi", "cospi", "rhypot", "norm3d", "norm4d", "rnorm3d", "rnorm4d",
    "j0", "j1", "jn", "y0", "y1", "yn", "cyl_bessel_i0", "cyl_bessel_i1", "erfinv", "erfcinv", "erfcx", "normcdf",
    "normcdfinv", "lgamma", "ilogb", "powi",
)  # fmt: skip
ROUNDINGS = ("rn", "rz", "rd", "ru")
"""To nearest even, towards zero, down, up."""
_ROUNDED = (
    *(f"{letter}{name}" for letter in "fd" for name in ("add", "sub", "mul", "div", "rcp")),
    *(f"{source}2{target}" for source in ("float", "double") for target in ("int", "uint", "ll", "ull")),
    *(f"{source}2float" for source in ("double", "int", "uint", "ll", "ull")), "ll2double", "ull2double",
)  # fmt: skip
_ROUNDED_OFF = ("fsqrt", "dsqrt", "fmaf", "fma")  # to nearest, C's own do
_INTEGERS = ("brev", "brevll", "byte_perm", "mul24", "umul24", "sad", "usad", "hadd", "rhadd", "uhadd", "urhadd")

NATIVE: dict[str, str] = {
    **{f"__nv_{name}": name for name in _C_MATH},
    **{f"__nv_{name}f": f"{name}f" for name in _C_MATH},
    **{f"__nv_{name}": name for name in _ROUNDED_TO_INTEGER},
    **{f"__nv_{name}f": f"{name}f" for name in _ROUNDED_TO_INTEGER},
    **{f"__nv_{name}": f"tw_{name}" for name in _OURS},
    **{f"__nv_{name}f": f"tw_{name}f" for name in _OURS},
    **{f"__nv_fast_{name}f": f"{name}f" for name in ("cos", "exp", "log", "log2", "pow", "sin", "tan")},
    **{f"__nv_{name}_{mode}": f"tw_{name}_{mode}" for name in _ROUNDED for mode in ROUNDINGS},
    **{f"__nv_{name}_{mode}": f"tw_{name}_{mode}" for name in _ROUNDED_OFF for mode in ROUNDINGS[1:]},
    "__nv_fsqrt_rn": "sqrtf", "__nv_dsqrt_rn": "sqrt", "__nv_fmaf_rn": "fmaf", "__nv_fma_rn": "fma",
    "__nv_frsqrt_rn": "tw_frsqrt_rn", "__nv_fast_fdividef": "tw_fast_fdividef",
    "__nv_int2double_rn": "tw_int2double_rn", "__nv_uint2double_rn": "tw_uint2double_rn",
    **{f"__nv_{name}": f"tw_{name}" for name in (*_INTEGERS, "hiloint2double", "double2loint", "double2hiint")},
    "__nv_ldexp": "ldexp", "__nv_scalbn": "ldexp", "__nv_ldexpf": "tw_ldexpf", "__nv_scalbnf": "tw_ldexpf",
    "__nv_logb": "logb", "__nv_logbf": "logbf", "__nv_nextafter": "nextafter", "__nv_nextafterf": "nextafterf",
    "__nv_fast_exp10f": "tw_exp10f", "__nv_fast_log10f": "tw_log10f",
    "__nv_isnanf": "tw_isnanf", "__nv_isnand": "tw_isnan", "__nv_isinff": "tw_isinff", "__nv_isinfd": "tw_isinf",
    "__nv_finitef": "tw_isfinitef", "__nv_isfinited": "tw_isfinite",
    "__nv_signbitf": "tw_signbitf", "__nv_signbitd": "tw_signbit", "__nv_saturatef": "tw_saturatef",
    "__nv_abs": "tw_abs32", "__nv_llabs": "tw_abs64",
    "__nv_popc": "tw_popc32", "__nv_popcll": "tw_popc64", "__nv_clz": "tw_clz32", "__nv_clzll": "tw_clz64",
    "__nv_ffs": "tw_ffs32", "__nv_ffsll": "tw_ffs64",
    "__nv_mulhi": "tw_mulhs32", "__nv_umulhi": "tw_mulhu32",
    "__nv_mul64hi": "tw_mulhs64", "__nv_umul64hi": "tw_mulhu64",
    "__nv_float_as_int": "tw_float_bits", "__nv_float_as_uint": "tw_float_bits",
    "__nv_int_as_float": "tw_bits_float", "__nv_uint_as_float": "tw_bits_float",
    "__nv_double_as_longlong": "tw_double_bits", "__nv_longlong_as_double": "tw_bits_double",
}  # fmt: skip
"""The C function of each symbol."""
