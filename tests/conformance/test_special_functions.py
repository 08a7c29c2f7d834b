"""Special functions of ``libdevice`` against decimal arithmetic, within the errors that the CUDA guide gives."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from conformance.harness import DTYPES, Dtype, assert_close_ulps, assert_equal, gpu_differs, interpreter_gap, random
from conformance.test_libdevice import arguments, launch

pytestmark = [interpreter_gap("has no libdevice"), gpu_differs("float32 functions flush denormals")]
FLOAT32, FLOAT64 = DTYPES["float32"], DTYPES["float64"]
FLOATING = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211707")
EULER = Decimal("0.57721566490153286060651209008240243104215933593992359880576723488486772677766467093694706329174675")


def series(first: Decimal, ratio) -> Decimal:
    """The sum of terms of which each is ``ratio(k)`` times the one before."""
    term = total = first
    k = 0
    while abs(term) > abs(total) * Decimal(10) ** -60 or (k < 4 and term):
        k += 1
        term *= ratio(k)
        total += term
    return total


def erf(x: Decimal) -> Decimal:
    return 2 / PI.sqrt() * (-x * x).exp() * series(x, lambda k: 2 * x * x / (2 * k + 1))


def erfc(x: Decimal) -> Decimal:
    """To 30 digits. Above 6 a continued fraction, from its far end."""
    if x < 6:
        return 1 - erf(x)
    tail = x
    for k in range(300, 0, -1):
        tail = x + Decimal(k) / 2 / tail
    return (-x * x).exp() / (PI.sqrt() * tail)


def inverse(x: Decimal, function, start: float) -> Decimal:
    """Where ``function``, erf or erfc, is ``x``: Newton's steps, on the logarithm."""
    y, sign = Decimal(start), 1 if function is erf else -1
    for _ in range(7):
        value = function(y)
        y -= (value / x).ln() * value / (sign * 2 / PI.sqrt() * (-y * y).exp())
    return y


def erfinv(x: Decimal) -> Decimal:
    return inverse(
        abs(x), erf, float(torch.special.erfinv(torch.tensor(float(abs(x)), dtype=torch.float64)))
    ).copy_sign(x)


def erfcinv(x: Decimal) -> Decimal:
    start = float(torch.special.ndtri(torch.tensor(float(x), dtype=torch.float64) / 2)) * -math.sqrt(0.5)
    return inverse(x, erfc, start)


def bessel(n: int, x: Decimal, sign: int) -> Decimal:
    """J with -1, I with 1."""
    return series((x / 2) ** n / math.factorial(n), lambda k: sign * x * x / (4 * k * (k + n)))


def bessel_y(n: int, x: Decimal) -> Decimal:
    if n > 1:
        return 2 * (n - 1) / x * bessel_y(n - 1, x) - bessel_y(n - 2, x)
    total, term, k = Decimal(0), (x / 2) ** n, 0
    digamma = [-EULER, 1 - EULER]
    while k < 20 or abs(term) > Decimal(10) ** -60:
        total += (digamma[k] + digamma[k + n]) * term
        digamma.append(digamma[-1] + 1 / Decimal(len(digamma)))
        k += 1
        term *= -x * x / (4 * k * (k + n))
    return (2 * (x / 2).ln() * bessel(n, x, -1) - (2 / x if n else 0) - total) / PI


def log_gamma(x: Decimal) -> Decimal:
    """Of an integer above 0, or half an odd one."""
    value, place = (Decimal(1), Decimal(1)) if x % 1 == 0 else (PI.sqrt(), Decimal("0.5"))
    while place < x:
        value, place = value * place, place + 1
    while place > x:
        place -= 1
        value /= place
    return abs(value).ln()


FUNCTIONS = {  # of a number: the truth, where to try it, ulps in float32 and float64
    "j0": (lambda x: bessel(0, x, -1), (-8, 8), (9, 7)),
    "j1": (lambda x: bessel(1, x, -1), (-8, 8), (9, 7)),
    "y0": (lambda x: bessel_y(0, x), (0.001, 8), (9, 7)),
    "y1": (lambda x: bessel_y(1, x), (0.001, 8), (9, 7)),
    "cyl_bessel_i0": (lambda x: bessel(0, x, 1), (-80, 80), (6, 6)),
    "cyl_bessel_i1": (lambda x: bessel(1, x, 1), (-80, 80), (6, 6)),
    "erfinv": (erfinv, (-0.9999, 0.9999), (2, 5)),
    "erfcinv": (erfcinv, (1e-6, 1.9999), (4, 6)),
    "normcdfinv": (lambda x: -Decimal(2).sqrt() * erfcinv(2 * x), (1e-6, 0.9999), (5, 8)),
    "normcdf": (lambda x: erfc(-x / Decimal(2).sqrt()) / 2, (-12, 6), (5, 5)),
    "erfcx": (lambda x: (x * x).exp() * erfc(x), (-9, 40), (4, 4)),
}
TINY = {"normcdf": [-37.5, -30.0], "erfcx": [-26.5, 1e3], "cyl_bessel_i0": [700.0, -712.5], "erfcinv": [1e-300, 1e-30]}
TINY |= {"erfinv": [1e-30, -1e-300], "normcdfinv": [1e-300, 1e-20], "cyl_bessel_i1": [1e-300, 650.0]}


def points(dtype: Dtype, name: str, low: float, high: float) -> torch.Tensor:
    drawn = np.random.default_rng(1).uniform(low, high, 60)
    small = np.geomspace(max(low, 1e-3), high, 20)
    extra = TINY.get(name, []) if dtype is FLOAT64 else []
    return torch.from_numpy(np.concatenate([drawn, small, extra])).to(dtype.torch)


def truth(function, *numbers: float | int) -> float:
    with localcontext() as context:
        context.prec = 80
        return np.longdouble(str(function(*(Decimal(v) if isinstance(v, float) else v for v in numbers))))


@FLOATING
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, dtype: Dtype) -> None:
    function, (low, high), ulps = FUNCTIONS[name]
    x = points(dtype, name, low, high)
    expected = np.array([truth(function, v) for v in x.tolist()])
    # Near their zeros the Bessel functions have no relative error to speak of: their terms are near 1.
    absolute = float(np.finfo(str(dtype)).eps) if name[0] in "jy" else 0.0
    assert_close_ulps(launch(name, x), expected, dtype, ulps[dtype is FLOAT64], x, absolute=absolute)


@FLOATING
@pytest.mark.parametrize("name", ["jn", "yn"])
def test_bessel_functions_of_an_order(name: str, dtype: Dtype) -> None:
    n = torch.arange(7, dtype=torch.int32).repeat(12)
    x = torch.from_numpy(np.random.default_rng(2).uniform(0.5, 9, len(n))).to(dtype.torch)
    function = (lambda n, x: bessel(n, x, -1)) if name == "jn" else bessel_y
    expected = np.array([truth(function, *v) for v in zip(n.tolist(), x.tolist(), strict=True)])
    assert expected.dtype == np.longdouble
    eps = float(np.finfo(str(dtype)).eps)
    assert_close_ulps(launch(name, n, x, dtype=dtype.torch), expected, dtype, 7.0 + n.numpy(), n, x, absolute=eps)
    negative = launch(name, n - 7, x, dtype=dtype.torch)
    assert negative.isnan().all()


@FLOATING
def test_logarithm_of_gamma(dtype: Dtype) -> None:
    x = torch.cat([torch.arange(1, 40), torch.arange(40) + 0.5, torch.arange(3) - 1.5]).to(dtype.torch)
    expected = np.array([truth(log_gamma, v) for v in x.tolist()])
    assert_close_ulps(launch("lgamma", x), expected, dtype, 6.0 if dtype is FLOAT32 else 4.0, x)


def of_half_turns(x: float, cosine: bool) -> np.longdouble:
    turn = Fraction(x) % 2
    quarter = round(2 * turn)
    rest = np.longdouble(float(turn - Fraction(quarter, 2))) * np.longdouble(str(PI))
    quarter += cosine
    y = np.cos(rest) if quarter % 2 else np.sin(rest)
    return -y if quarter & 2 else y


@FLOATING
@pytest.mark.parametrize("name", ["sinpi", "cospi"])
def test_sine_of_half_turns(name: str, dtype: Dtype) -> None:
    x = arguments(dtype)[0]
    x = x[x.isfinite()]
    expected = np.array([of_half_turns(v, name == "cospi") for v in x.tolist()])
    assert_close_ulps(launch(name, x), expected, dtype, 2.0, x)
    ends = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, math.inf, math.nan], dtype=dtype.torch)
    exact = [0.0, -0.0, 0.0, -0.0, 0.0, 1.0] if name == "sinpi" else [1.0, 1.0, -1.0, -1.0, 1.0, 0.0]
    assert_equal(launch(name, ends), torch.tensor([*exact, math.nan, math.nan], dtype=dtype.torch), ends)


@FLOATING
@pytest.mark.parametrize(
    ("name", "count"), [("rhypot", 2), ("norm3d", 3), ("rnorm3d", 3), ("norm4d", 4), ("rnorm4d", 4)]
)
def test_norms(name: str, count: int, dtype: Dtype) -> None:
    inputs = arguments(dtype, count)
    with np.errstate(all="ignore"):
        size = np.sqrt(sum(np.square(x.numpy().astype(np.longdouble)) for x in inputs))
        size[np.any([np.isinf(x.numpy()) for x in inputs], axis=0)] = np.inf  # also beside NaN
        expected = size if name.startswith("norm") else 1 / size
    assert_close_ulps(launch(name, *inputs), expected, dtype, 3.0 if dtype is FLOAT32 else 2.0, *inputs)


@FLOATING
def test_integer_powers(dtype: Dtype) -> None:
    x = random(dtype, 400, 1, "cpu") * 3
    x[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0], dtype=dtype.torch)
    n = torch.from_numpy(np.random.default_rng(1).integers(-30, 30, 400).astype(np.int32))
    with np.errstate(all="ignore"):
        expected = np.power(x.numpy().astype(np.longdouble), n.numpy())
    assert_close_ulps(launch("pow", x, n), expected, dtype, 2.0, x, n)


@FLOATING
def test_limits(dtype: Dtype) -> None:
    infinity, nan = math.inf, math.nan
    cases = {
        "erfinv": [(1.0, infinity), (-1.0, -infinity), (1.5, nan), (0.0, 0.0), (-0.0, -0.0), (nan, nan)],
        "erfcinv": [(0.0, infinity), (2.0, -infinity), (-0.5, nan), (2.5, nan), (1.0, 0.0), (nan, nan)],
        "normcdfinv": [(0.0, -infinity), (1.0, infinity), (-0.5, nan), (1.5, nan), (0.5, 0.0), (nan, nan)],
        "normcdf": [(infinity, 1.0), (-infinity, 0.0), (0.0, 0.5), (nan, nan)],
        "erfcx": [(infinity, 0.0), (-infinity, infinity), (0.0, 1.0), (-100.0, infinity), (nan, nan)],
        "cyl_bessel_i0": [(infinity, infinity), (-infinity, infinity), (0.0, 1.0), (nan, nan)],
        "cyl_bessel_i1": [(infinity, infinity), (-infinity, -infinity), (0.0, 0.0), (-0.0, -0.0), (nan, nan)],
        "j0": [(infinity, 0.0), (0.0, 1.0), (nan, nan)],
        "y0": [(infinity, 0.0), (0.0, -infinity), (-1.0, nan), (nan, nan)],
        "y1": [(infinity, 0.0), (0.0, -infinity), (-1.0, nan), (nan, nan)],
        "lgamma": [(infinity, infinity), (1.0, 0.0), (2.0, 0.0), (0.0, infinity), (-3.0, infinity), (nan, nan)],
    }
    for name, pairs in cases.items():
        x, expected = torch.tensor(pairs, dtype=dtype.torch).unbind(1)
        assert_equal(launch(name, x.contiguous()), expected, x)
