"""What ``tl.extra.libdevice`` computes in the interpreter of the CPU target, for the same symbols as in native code.

A floating point operand comes in f64, whatever its type; a floating point result is rounded to its type afterwards.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import torch

from tilewright.cpu import interpreter_numerics as numerics
from tilewright.cpu.types import F32, F64

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


# Directed rounding, in exact rational arithmetic; what is not finite or zero follows the plain operation.

_TOWARDS = {"rz": 0, "rd": -1, "ru": 1}


def _directed(exact: Fraction, mode: int, single: bool) -> float:
    """The neighbour of a number below (-1), towards zero (0) or above (1) in f32 or f64."""
    size = abs(exact)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = max(exponent - (23 if single else 52), -149 if single else -1074)
    steps = size / Fraction(2) ** unit
    away = steps.denominator != 1 and mode == (1 if exact > 0 else -1)
    count = math.floor(steps) + away
    largest = ((1 << 24) - 1) << 104 if single else ((1 << 53) - 1) << 971
    if count * Fraction(2) ** unit > largest:
        found = math.inf if away or mode == (1 if exact > 0 else -1) else float(largest)
    else:
        found = math.ldexp(count, unit)
    return found if exact > 0 else -found


def _root(x: Fraction) -> Fraction:
    """The square root if it has less than 120 bits; else a number that the same floats surround."""
    shift = max(0, 120 - (x.numerator.bit_length() - x.denominator.bit_length()) // 2)
    scaled = x * 4**shift
    whole = math.isqrt(math.floor(scaled))
    return Fraction(whole, 2**shift) if whole * whole == scaled else Fraction(2 * whole + 1, 2 ** (shift + 1))


_EXACT: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1 / a,
    "sqrt": _root,
    "fma": lambda a, b, c: a * b + c,
}
_PLAIN: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "rcp": torch.reciprocal,
    "sqrt": numerics.by_element(math.sqrt),
    "fma": numerics.by_element(numerics.exact_fma),
}


def _operation(name: str, mode: int, *, single: bool) -> Callable[..., Tensor]:
    def one(plain: float, *numbers: float) -> float:
        if not all(map(math.isfinite, numbers)):
            return plain
        fractions = list(map(Fraction, numbers))
        divisor = {"div": -1, "rcp": 0}.get(name)
        if (divisor is not None and not fractions[divisor]) or (name == "sqrt" and fractions[0] <= 0):
            return plain
        exact = _EXACT[name](*fractions)
        if exact:
            return _directed(exact, mode, single)
        if name in ("add", "sub", "fma") and mode < 0:  # -0, but of two positive zeros
            first = math.copysign(1, numbers[0]) * (math.copysign(1, numbers[1]) if name == "fma" else 1)
            last = -numbers[-1] if name == "sub" else numbers[-1]
            return 0.0 if first > 0 and math.copysign(1, last) > 0 else -0.0
        return plain

    return lambda *x: numerics.by_element(one)(_PLAIN[name](*x), *x)


def _narrowed(mode: int, *, single: bool = True, mask: int = -1) -> Callable[[Tensor], Tensor]:
    """A conversion to f32 or f64, of integers that are unsigned if there is a mask."""

    def one(x: float) -> float:
        if isinstance(x, int):
            x &= mask
        elif not math.isfinite(x) or x == 0:
            return x
        return _directed(Fraction(x), mode, single)

    return numerics.by_element(one)


def _to_integer(
    rounded: Callable[[Tensor], Tensor], bits: int, *, is_signed: bool, nan: int
) -> Callable[[Tensor], Tensor]:
    """Past the range the end of it."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, (1 << bits) - 1)

    def one(x: float) -> int:
        if math.isnan(x):
            return nan
        return numerics.wrapped(int(min(max(x, low), high)), bits)

    def apply(x: Tensor) -> Tensor:
        found = [one(v) for v in rounded(x).reshape(-1).tolist()]
        return torch.tensor(found, dtype=torch.int64, device=numerics.CPU).reshape(x.shape)

    return apply


_TO_WHOLE = {"rn": torch.round, "rz": torch.trunc, "rd": torch.floor, "ru": torch.ceil}
_INTEGERS = {"int": (32, True), "uint": (32, False), "ll": (64, True), "ull": (64, False)}
_NEAREST_FMA = {"f": lambda a, b, c: numerics.fma(a, b, c, F32), "d": lambda a, b, c: numerics.fma(a, b, c, F64)}


def _rounded() -> dict[str, Callable[..., Tensor]]:
    """What has its direction of rounding in its name."""
    found: dict[str, Callable[..., Tensor]] = {}
    for letter, fma in (("f", "fmaf"), ("d", "fma")):
        for name in _EXACT:
            symbol = f"__nv_{fma}" if name == "fma" else f"__nv_{letter}{name}"
            found[f"{symbol}_rn"] = _NEAREST_FMA[letter] if name == "fma" else _PLAIN[name]
            for mode, towards in _TOWARDS.items():
                found[f"{symbol}_{mode}"] = _operation(name, towards, single=letter == "f")
    for mode, whole in _TO_WHOLE.items():
        for name, (bits, is_signed) in _INTEGERS.items():
            for source in ("float", "double"):
                nan = 0 if source == "float" and bits == 32 else -(1 << (bits - 1))
                found[f"__nv_{source}2{name}_{mode}"] = _to_integer(whole, bits, is_signed=is_signed, nan=nan)
    for name, (bits, is_signed) in _INTEGERS.items():
        for target, element in (("float", F32), ("double", F64)):
            symbol = f"__nv_{name}2{target}"
            found[f"{symbol}_rn"] = partial(numerics.int_to_float, element=element, is_signed=is_signed)
            for mode, towards in _TOWARDS.items():
                mask = -1 if is_signed else (1 << bits) - 1
                found[f"{symbol}_{mode}"] = _narrowed(towards, single=target == "float", mask=mask)
    for mode, towards in _TOWARDS.items():
        found[f"__nv_double2float_{mode}"] = _narrowed(towards)
    return found | {"__nv_double2float_rn": torch.clone, "__nv_frsqrt_rn": torch.rsqrt}


# Integers


def _reversed_bits(x: Tensor) -> Tensor:
    bits, wide, found = 8 * x.itemsize, x.to(torch.int64), torch.zeros_like(x, dtype=torch.int64)
    for place in range(bits):
        found |= ((wide >> place) & 1) << (bits - 1 - place)
    return found


def _permuted_bytes(x: Tensor, y: Tensor, selector: Tensor) -> Tensor:
    both, found = numerics.unsigned(x) | (y.to(torch.int64) << 32), torch.zeros_like(x, dtype=torch.int64)
    for place in range(4):
        found |= ((both >> (8 * ((selector >> (4 * place)) & 7))) & 255) << (8 * place)
    return found


def _low_24(x: Tensor) -> Tensor:
    return ((x.to(torch.int64) & 0xFFFFFF) ^ 0x800000) - 0x800000


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.int64)


_unsigned = numerics.unsigned
_INTEGER_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "__nv_brev": _reversed_bits,
    "__nv_brevll": _reversed_bits,
    "__nv_byte_perm": _permuted_bytes,
    "__nv_mul24": lambda x, y: _low_24(x) * _low_24(y),
    "__nv_umul24": lambda x, y: (_wide(x) & 0xFFFFFF) * (_wide(y) & 0xFFFFFF),
    "__nv_sad": lambda x, y, z: _distance(_wide(x), _wide(y)) + z,
    "__nv_usad": lambda x, y, z: _distance(_unsigned(x), _unsigned(y)) + z,
    "__nv_hadd": lambda x, y: (_wide(x) + _wide(y)) >> 1,
    "__nv_rhadd": lambda x, y: (_wide(x) + _wide(y) + 1) >> 1,
    "__nv_uhadd": lambda x, y: (_unsigned(x) + _unsigned(y)) >> 1,
    "__nv_urhadd": lambda x, y: (_unsigned(x) + _unsigned(y) + 1) >> 1,
    "__nv_hiloint2double": lambda high, low: ((_wide(high) << 32) | _unsigned(low)).view(torch.float64),
    "__nv_double2loint": lambda x: x.view(torch.int64),
    "__nv_double2hiint": lambda x: x.view(torch.int64) >> 32,
}


# Functions


def _sine_of_half_turns(x: float, offset: int) -> float:
    """sin(pi x), or with 1 cos(pi x)."""
    turn = math.remainder(x, 2)
    quarter = round(2 * turn)
    rest = math.pi * (turn - quarter / 2)
    quarter += offset
    y = math.cos(rest) if quarter & 1 else math.sin(rest)
    y = -y if quarter & 2 else y
    return y or math.copysign(0.0, 1.0 if offset else x)


def _reciprocal_norm(*numbers: float) -> float:
    size = max(map(abs, numbers))
    scale = 2.0**-600 if 1e200 < size < math.inf else 2.0**600 if 0 < size < 1e-200 else 1.0
    norm = math.hypot(*(x * scale for x in numbers))
    return scale / norm if norm else math.inf


_SLOPE = 2 / math.sqrt(math.pi)
_HALF_ROOT = Fraction(math.isqrt(1 << 299), 1 << 150)  # sqrt(1/2)


def _normal_distribution(x: float) -> float:
    if not math.isfinite(x):
        return x if math.isnan(x) else float(x > 0)
    y = -x * math.sqrt(0.5)
    lost = float(Fraction(-x) * _HALF_ROOT - Fraction(y))
    return 0.5 * (math.erfc(y) - (_SLOPE * math.exp(-y * y) * lost if abs(y) < 27 else 0))


def _inverse_error(p: float, q: float) -> float:
    """The y of erf(y) = p and erfc(abs(y)) = q, of which the smaller one is exact."""
    if not q > 0 or p == 0:
        return math.copysign(math.inf, p) if q == 0 else p if p == 0 else math.nan
    y = float(torch.special.ndtri(torch.tensor(q / 2, dtype=torch.float64)) * -math.sqrt(0.5))
    y = abs(p) / _SLOPE if abs(p) < 1e-5 else y
    for _ in range(3):
        slope = _SLOPE * math.exp(-y * y)
        tail = math.erfc(y)
        if abs(p) <= 0.5:
            y -= (math.erf(y) - abs(p)) / slope
        elif tail and slope:
            y += (math.log(tail) - math.log(q)) * (tail / slope) if tail > 2 * q or 2 * tail < q else (tail - q) / slope
    return math.copysign(y, p)


def _scaled_complement(x: float) -> float:
    """exp(x^2) erfc(x)."""
    if not -27 < x < 5:
        return float(torch.special.erfcx(torch.tensor(x, dtype=torch.float64)))
    square = x * x
    lost = float(Fraction(x) ** 2 - Fraction(square))
    try:
        return math.exp(square) * math.erfc(x) * (1 + lost)
    except OverflowError:
        return math.inf


def _downwards(n: int, x: float) -> list[float]:
    """J of order 0 up to ``n`` and on, for x > 0: Miller's recurrence, scaled by the sum of the even orders."""
    start = 2 * (int(max(n, x) + 30 + 8 * max(n, x) ** 0.5) // 2 + 1)
    values = [0.0] * (start + 2)
    values[start] = 1e-300
    for k in range(start, 0, -1):
        values[k - 1] = 2 * k / x * values[k] - values[k + 1]
        if abs(values[k - 1]) > 1e250:
            values[k - 1 :] = [v * 1e-250 for v in values[k - 1 :]]
    total = math.fsum([values[0], *(2 * v for v in values[2::2])])
    return [v / total for v in values]


def _far(n: int, x: float) -> tuple[float, float]:
    """J and Y of order 0 or 1 for large x: Hankel's expansion."""
    term, sums = 1.0, [1.0, 0.0]
    for k in range(1, 25):
        term *= (4 * n - (2 * k - 1) ** 2) / (8 * k * x)
        sums[k % 2] += term if k % 4 < 2 else -term
    sine, cosine = math.sin(x) - math.cos(x), math.sin(x) + math.cos(x)  # of x - pi / 4, times sqrt(2)
    if n:
        sine, cosine = -cosine, sine
    root = math.sqrt(math.pi * x)
    return (sums[0] * cosine - sums[1] * sine) / root, (sums[0] * sine + sums[1] * cosine) / root


def _upwards(n: int, x: float, below: float, here: float) -> float:
    for k in range(1, n):
        if math.isinf(here):
            break
        below, here = here, 2 * k / x * here - below
    return here if n else below


def _bessel_j(n: int, x: float) -> float:
    if n < 0 or math.isnan(x):
        return math.nan
    if math.isinf(x) or x == 0:
        return float(n == 0 and x == 0) if n != 1 or x else x
    size = abs(x)
    if n > 2 * size + 1000:  # far below the range
        return 0.0
    if size > 1e4 and n < size:
        y = _upwards(n, size, _far(0, size)[0], _far(1, size)[0])
    else:
        y = _downwards(n, size)[n] if size > 1e-4 or n > 1 else (size / 2 if n else 1.0)
    return -y if n & 1 and x < 0 else y


_EULER = 0.5772156649015329


def _bessel_y(n: int, x: float) -> float:
    """From Neumann's series of Y0 and its derivative."""
    if n < 0 or not x >= 0:
        return math.nan
    if x == 0 or math.isinf(x):
        return 0.0 if x else -math.inf
    if x > 30:
        return _upwards(n, x, _far(0, x)[1], _far(1, x)[1])
    j = _downwards(1, max(x, 1e-4))
    terms = [(-1) ** (k + 1) / k * j[2 * k] for k in range(1, len(j) // 2 - 1)]
    slopes = [(-1) ** (k + 1) / k * (j[2 * k - 1] - j[2 * k + 1]) for k in range(1, len(j) // 2 - 1)]
    logarithm = math.log(x / 2) + _EULER
    zeroth = 2 / math.pi * math.fsum([logarithm * j[0], *(2 * t for t in terms)])
    first = 2 / math.pi * math.fsum([logarithm * j[1], -j[0] / x, *(-t for t in slopes)])
    return _upwards(n, x, zeroth, first)


def _modified_bessel(n: int, x: float) -> float:
    """Of order 0 or 1: the series, and the asymptotic one for large arguments."""
    size = abs(x)
    if math.isinf(x) or math.isnan(x):
        return size if n == 0 else x
    terms = [1.0]
    if size < 20:
        for k in range(1, 43):
            terms.append(terms[-1] * size * size / (4 * k * (k + n)))
        return math.fsum(terms) * (x / 2 if n else 1)
    for k in range(1, 33):
        terms.append(terms[-1] * ((2 * k - 1) ** 2 - 4 * n) / (8 * k * size))
    half = math.exp(min(size / 2, 400))
    found = math.fsum(terms) / math.sqrt(2 * math.pi * size) * half * half
    return math.copysign(found, x) if n else found


def _scaled_by_power(x: float, n: int) -> float:
    try:
        return math.ldexp(x, n)
    except OverflowError:
        return math.copysign(math.inf, x)


def _exponent(x: float) -> float:
    if not math.isfinite(x) or x == 0:
        return abs(x) if x else -math.inf
    return float(math.frexp(x)[1] - 1)


def _whole_exponent(x: Tensor) -> Tensor:
    exponent = numerics.by_element(_exponent)(x)
    low, high = -(1 << 31), (1 << 31) - 1
    return torch.where(exponent.isnan(), low, exponent).clamp(low, high).to(torch.int64)


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
    "sinpi": numerics.by_element(lambda x: _sine_of_half_turns(x, 0)),
    "cospi": numerics.by_element(lambda x: _sine_of_half_turns(x, 1)),
    **dict.fromkeys(("norm3d", "norm4d"), numerics.by_element(math.hypot)),
    **dict.fromkeys(("rhypot", "rnorm3d", "rnorm4d"), numerics.by_element(_reciprocal_norm)),
    "j0": numerics.by_element(lambda x: _bessel_j(0, x)),
    "j1": numerics.by_element(lambda x: _bessel_j(1, x)),
    "jn": numerics.by_element(_bessel_j),
    "y0": numerics.by_element(lambda x: _bessel_y(0, x)),
    "y1": numerics.by_element(lambda x: _bessel_y(1, x)),
    "yn": numerics.by_element(_bessel_y),
    "cyl_bessel_i0": numerics.by_element(partial(_modified_bessel, 0)),
    "cyl_bessel_i1": numerics.by_element(partial(_modified_bessel, 1)),
    "erfinv": numerics.by_element(lambda x: _inverse_error(x, 1 - abs(x))),
    "erfcinv": numerics.by_element(lambda x: _inverse_error(1 - x, min(x, 2 - x))),
    "erfcx": numerics.by_element(_scaled_complement),
    "normcdf": numerics.by_element(_normal_distribution),
    "normcdfinv": numerics.by_element(lambda x: _inverse_error(2 * x - 1, min(2 * x, 2 - 2 * x)) * math.sqrt(2)),
    "lgamma": torch.lgamma,
    "ilogb": _whole_exponent,
    "logb": numerics.by_element(_exponent),
    **dict.fromkeys(("ldexp", "scalbn"), numerics.by_element(_scaled_by_power)),
    "powi": lambda x, n: torch.pow(x, n.to(torch.float64)),
    "nextafter": torch.nextafter,
    "tgamma": numerics.by_element(_gamma),
    "trunc": torch.trunc,
}
_FAST = ("cos", "exp", "exp10", "log", "log10", "log2", "pow", "sin", "tan")

LIBRARY: dict[str, Callable[..., Tensor]] = {
    **{f"__nv_{name}": function for name, function in _FLOATING.items()},
    **{f"__nv_{name}f": function for name, function in _FLOATING.items()},
    **_rounded(),
    **_INTEGER_FUNCTIONS,
    "__nv_fmaf": _NEAREST_FMA["f"],
    "__nv_nextafterf": lambda x, y: torch.nextafter(x.to(torch.float32), y.to(torch.float32)),
    "__nv_fast_fdividef": torch.div,
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
