"""Mathematical functions against 64-bit and longer arithmetic, within the accuracy that each promises."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from conformance.harness import (
    DEVICE,
    DTYPES,
    ON_GPU,
    Dtype,
    assert_close_ulps,
    assert_equal,
    edge_values,
    interpreted,
    interpreter_gap,
    random,
    random_bits,
    ulp,
)

BLOCK = 1024
FLOAT32, FLOAT64 = DTYPES["float32"], DTYPES["float64"]
NO_LIBDEVICE = interpreter_gap("has no libdevice")


@triton.jit
def language_kernel(x_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask, other=1.0)
    if OP == "exp":
        y = tl.exp(x)
    elif OP == "exp2":
        y = tl.exp2(x)
    elif OP == "log":
        y = tl.log(x)
    elif OP == "log2":
        y = tl.log2(x)
    elif OP == "sin":
        y = tl.sin(x)
    elif OP == "cos":
        y = tl.cos(x)
    elif OP == "sqrt":
        y = tl.sqrt(x)
    elif OP == "rsqrt":
        y = tl.rsqrt(x)
    elif OP == "erf":
        y = tl.erf(x)
    elif OP == "floor":
        y = tl.floor(x)
    elif OP == "ceil":
        y = tl.ceil(x)
    elif OP == "sigmoid":
        y = tl.sigmoid(x)
    tl.store(out_ptr + offsets, y, mask)


@triton.jit
def libdevice_kernel(x_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask, other=1.0)
    if OP == "exp":
        out = libdevice.exp(x)
    elif OP == "exp2":
        out = libdevice.exp2(x)
    elif OP == "log":
        out = libdevice.log(x)
    elif OP == "log2":
        out = libdevice.log2(x)
    elif OP == "log10":
        out = libdevice.log10(x)
    elif OP == "log1p":
        out = libdevice.log1p(x)
    elif OP == "expm1":
        out = libdevice.expm1(x)
    elif OP == "sin":
        out = libdevice.sin(x)
    elif OP == "cos":
        out = libdevice.cos(x)
    elif OP == "tan":
        out = libdevice.tan(x)
    elif OP == "asin":
        out = libdevice.asin(x)
    elif OP == "acos":
        out = libdevice.acos(x)
    elif OP == "atan":
        out = libdevice.atan(x)
    elif OP == "sinh":
        out = libdevice.sinh(x)
    elif OP == "cosh":
        out = libdevice.cosh(x)
    elif OP == "tanh":
        out = libdevice.tanh(x)
    elif OP == "asinh":
        out = libdevice.asinh(x)
    elif OP == "acosh":
        out = libdevice.acosh(x)
    elif OP == "atanh":
        out = libdevice.atanh(x)
    elif OP == "sqrt":
        out = libdevice.sqrt(x)
    elif OP == "rsqrt":
        out = libdevice.rsqrt(x)
    elif OP == "cbrt":
        out = libdevice.cbrt(x)
    elif OP == "erf":
        out = libdevice.erf(x)
    elif OP == "erfc":
        out = libdevice.erfc(x)
    elif OP == "floor":
        out = libdevice.floor(x)
    elif OP == "ceil":
        out = libdevice.ceil(x)
    elif OP == "trunc":
        out = libdevice.trunc(x)
    elif OP == "rint":
        out = libdevice.rint(x)
    elif OP == "nearbyint":
        out = libdevice.nearbyint(x)
    elif OP == "round":
        out = libdevice.round(x)
    elif OP == "abs":
        out = libdevice.abs(x)
    elif OP == "isnan":
        out = libdevice.isnan(x)
    elif OP == "isinf":
        out = libdevice.isinf(x)
    elif OP == "signbit":
        out = libdevice.signbit(x)
    tl.store(out_ptr + offsets, out, mask)


@triton.jit
def libdevice_kernel_of_two(x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask, other=1.0)
    y = tl.load(y_ptr + offsets, mask, other=1.0)
    if OP == "pow":
        out = libdevice.pow(x, y)
    elif OP == "atan2":
        out = libdevice.atan2(x, y)
    elif OP == "fmod":
        out = libdevice.fmod(x, y)
    elif OP == "hypot":
        out = libdevice.hypot(x, y)
    elif OP == "copysign":
        out = libdevice.copysign(x, y)
    tl.store(out_ptr + offsets, out, mask)


def launch_language(x: torch.Tensor, operation: str) -> torch.Tensor:
    out = torch.empty_like(x, device=DEVICE)
    language_kernel[(triton.cdiv(len(x), BLOCK),)](x.to(DEVICE), out, len(x), OP=operation, BLOCK=BLOCK)
    return out


def launch_libdevice(operation: str, *inputs: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    count = len(inputs[0])
    out = torch.empty(count, dtype=dtype or inputs[0].dtype, device=DEVICE)
    kernel = libdevice_kernel if len(inputs) == 1 else libdevice_kernel_of_two
    kernel[(triton.cdiv(count, BLOCK),)](*(i.to(DEVICE) for i in inputs), out, count, OP=operation, BLOCK=BLOCK)
    return out


def each(function):
    """A function of Python floats on arrays; where Python refuses, the limit is infinity or NaN as given."""

    def apply(*arrays: np.ndarray) -> np.ndarray:
        return np.array([function(*map(float, v)) for v in zip(*arrays, strict=True)], dtype=np.longdouble)

    return apply


def truth_rsqrt(x: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(x)


def truth_sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# Truth, in longdouble where NumPy has it, else Python's float64 within one of its ulps.
TRUTH = {
    **{name: getattr(np, name) for name in ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "floor", "ceil")},
    **{name: getattr(np, name) for name in ("tanh", "sinh", "cosh", "tan", "expm1", "log1p", "log10", "cbrt")},
    **{name: getattr(np, "arc" + name[1:]) for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh")},
    **{"rsqrt": truth_rsqrt, "sigmoid": truth_sigmoid, "erf": each(math.erf), "erfc": each(math.erfc)},
    **{"pow": np.power, "atan2": np.arctan2, "hypot": np.hypot},
}

# Ulps in float32 and float64: what the CUDA programming guide gives as the largest error of each function, and for
# tl.exp, tl.exp2, tl.log2, tl.sqrt, tl.rsqrt what PTX gives for the approximate instruction behind it. One more than
# zero where only the rounding of the result is allowed: half an ulp, and half for the float64 truth's own.
ULPS = {
    **{"exp": (2, 1), "exp2": (2, 1), "log": (1, 1), "log2": (2, 1), "sin": (2, 2), "cos": (2, 2)},
    **{"sqrt": (1, 1), "rsqrt": (2, 2), "erf": (2, 2), "erfc": (4, 5), "sigmoid": (5, 3)},
    **{"tanh": (2, 2), "sinh": (3, 2), "cosh": (2, 1), "tan": (4, 2), "expm1": (1, 1), "log1p": (1, 1)},
    **{"log10": (2, 1), "cbrt": (1, 1), "asin": (2, 2), "acos": (2, 2), "atan": (2, 2), "asinh": (3, 3)},
    **{"acosh": (4, 3), "atanh": (3, 2), "pow": (4, 2), "atan2": (3, 2), "hypot": (3, 2)},
}


def bound(operation: str, dtype: Dtype, x: np.ndarray) -> np.ndarray:
    """Ulps at each ``x``. A GPU multiplies by log2(e) first: half an ulp of the product, magnified by ``exp``."""
    ulps = np.full(x.shape, float(ULPS[operation][dtype is FLOAT64]))
    if interpreted() and dtype is FLOAT32:
        ulps = np.maximum(ulps, 4)  # what NumPy promises of its vectorised float32 functions
    if ON_GPU and dtype is FLOAT32 and operation in ("exp", "sigmoid"):
        product = np.where(np.isfinite(x), x, 0).astype(np.float64) * math.log2(math.e)
        ulps = ulps + ulp(product, dtype) * 2.0**dtype.mantissa
    return ulps


def absolute(operation: str, dtype: Dtype) -> float:
    """On a GPU float32 functions flush denormals; ``tl.sigmoid`` is zero wherever ``exp(-x)`` overflows."""
    if ON_GPU and dtype is FLOAT32:
        return 2.0**dtype.min_exponent
    return 1 / dtype.max if operation == "sigmoid" else 0.0


def arguments(dtype: Dtype, scale: float = 8.0) -> torch.Tensor:
    plain = random(dtype, BLOCK, 1, "cpu")
    return torch.cat(
        [edge_values(dtype, "cpu"), plain, plain * scale, plain * 100, random_bits(dtype, BLOCK, 3, "cpu")]
    )


def truth_of(operation: str, *inputs: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return TRUTH[operation](*(i.numpy().astype(np.longdouble) for i in inputs))


LANGUAGE = ["exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "rsqrt", "erf", "sigmoid"]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("operation", LANGUAGE)
def test_function(operation: str, dtype: Dtype) -> None:
    x = arguments(dtype)
    if ON_GPU and dtype is FLOAT32:
        x = x[(x == 0) | ~(x.abs() < 2.0**dtype.min_exponent)]  # flushed to zero, which roots and logarithms magnify
    expected = truth_of(operation, x)
    got = launch_language(x, operation)
    ulps = bound(operation, dtype, x.numpy())
    assert_close_ulps(got, expected, dtype, ulps, x, absolute=absolute(operation, dtype))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("operation", ["floor", "ceil"])
def test_floor_and_ceil_are_exact(operation: str, dtype: Dtype) -> None:
    x = arguments(dtype)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        expected = getattr(np, operation)(x.numpy())
    assert_equal(launch_language(x, operation), expected, x)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_limits(dtype: Dtype) -> None:
    """What the functions give at the ends of their domains, exactly."""
    infinity, nan = float("inf"), float("nan")
    cases = {
        "exp": [(-infinity, 0), (infinity, infinity), (0.0, 1), (-1e4, 0), (1e4, infinity), (nan, nan)],
        "exp2": [(-infinity, 0), (infinity, infinity), (0.0, 1), (-1e4, 0), (1e4, infinity), (nan, nan)],
        "log": [(0.0, -infinity), (-0.0, -infinity), (1.0, 0), (infinity, infinity), (-1.0, nan), (nan, nan)],
        "log2": [(0.0, -infinity), (-0.0, -infinity), (infinity, infinity), (-infinity, nan), (nan, nan)],
        "sin": [(infinity, nan), (-infinity, nan), (nan, nan), (0.0, 0), (-0.0, -0.0)],
        "cos": [(infinity, nan), (-infinity, nan), (nan, nan), (0.0, 1), (-0.0, 1)],
        "sqrt": [(0.0, 0), (-0.0, -0.0), (infinity, infinity), (-1.0, nan), (nan, nan)],
        "rsqrt": [(0.0, infinity), (-0.0, -infinity), (infinity, 0), (-1.0, nan), (nan, nan)],
        "erf": [(infinity, 1), (-infinity, -1), (0.0, 0), (-0.0, -0.0), (nan, nan)],
        "sigmoid": [(infinity, 1), (-infinity, 0), (0.0, 0.5), (-1e4, 0), (1e4, 1), (nan, nan)],
    }
    for operation, pairs in cases.items():
        x, expected = torch.tensor(pairs, dtype=dtype.torch).unbind(1)
        assert_equal(launch_language(x.contiguous(), operation), expected, x)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + offsets, tl.softmax(tl.load(x_ptr + offsets), dim=1, keep_dims=True))


@pytest.mark.filterwarnings("ignore:The keep_dims argument")
def test_softmax() -> None:
    rows, columns = 16, 64
    x = random(FLOAT32, (rows, columns), 1, "cpu") * 5
    x[3], x[4, 7:], x[5, 2] = 2.0, -float("inf"), 3e4
    out = torch.empty(rows, columns, device=DEVICE)
    softmax_kernel[(1,)](x.to(DEVICE), out, ROWS=rows, COLUMNS=columns)
    # one rounding of x - max, magnified by exp to that many ulps; exp; at most one per addition; the division
    shifted = (x.double() - x.double().amax(1, keepdim=True)).numpy()
    ulps = (
        ulp(np.clip(shifted, -200, 0), FLOAT32) * 2.0**FLOAT32.mantissa + bound("exp", FLOAT32, shifted) + columns + 3
    )
    tiny = absolute("exp", FLOAT32) + ulp(np.zeros(1), FLOAT32)[0]  # a denormal quotient of a rounded denormal
    assert_close_ulps(out, torch.softmax(x.double(), 1), FLOAT32, ulps, x, absolute=tiny)


UNARY = ["exp", "exp2", "log", "log2", "log10", "log1p", "expm1", "sin", "cos", "tan", "asin", "acos", "atan"]
UNARY += ["sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "sqrt", "rsqrt", "cbrt", "erf", "erfc"]


@NO_LIBDEVICE
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("operation", UNARY)
def test_libdevice_function(operation: str, dtype: Dtype) -> None:
    x = arguments(dtype)
    got = launch_libdevice(operation, x)
    ulps = float(ULPS[operation][dtype is FLOAT64])
    assert_close_ulps(got, truth_of(operation, x), dtype, ulps, x, absolute=absolute(operation, dtype))


@NO_LIBDEVICE
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("operation", ["pow", "atan2", "hypot"])
def test_libdevice_function_of_two(operation: str, dtype: Dtype) -> None:
    x = arguments(dtype)
    y = x[torch.from_numpy(np.random.default_rng(5).permutation(len(x)))]
    got = launch_libdevice(operation, x, y)
    ulps = float(ULPS[operation][dtype is FLOAT64])
    assert_close_ulps(got, truth_of(operation, x, y), dtype, ulps, x, y, absolute=absolute(operation, dtype))


def half_away(x: np.ndarray) -> np.ndarray:
    """C's ``round``: halves go away from zero. The fraction left by ``trunc`` is exact."""
    with np.errstate(all="ignore"):
        whole = np.trunc(x)
        return np.copysign(np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(1, x), whole), x).astype(x.dtype)


EXACT = {
    **{"floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint, "nearbyint": np.rint},
    **{"round": half_away, "abs": np.abs},
}


@NO_LIBDEVICE
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("operation", EXACT)
def test_libdevice_rounding(operation: str, dtype: Dtype) -> None:
    x = arguments(dtype)
    got = launch_libdevice(operation, x)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        expected = EXACT[operation](x.numpy())
    assert_equal(got, expected, x)


@NO_LIBDEVICE
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("operation", ["fmod", "copysign"])
def test_libdevice_exact_function_of_two(operation: str, dtype: Dtype) -> None:
    x = arguments(dtype)
    y = x[torch.from_numpy(np.random.default_rng(5).permutation(len(x)))]
    if ON_GPU and operation == "fmod":
        keep = (x.abs() >= 2.0**dtype.min_exponent) & (y.abs() >= 2.0**dtype.min_exponent)  # no denormals there
        x, y = x[keep], y[keep]
    with np.errstate(all="ignore"):
        expected = getattr(np, operation)(x.numpy(), y.numpy())
    assert_equal(launch_libdevice(operation, x, y), expected, x, y)


@NO_LIBDEVICE
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("operation", ["isnan", "isinf", "signbit"])
def test_libdevice_predicate(operation: str, dtype: Dtype) -> None:
    """Nonzero where it holds."""
    x = arguments(dtype)
    got = launch_libdevice(operation, x, dtype=torch.int32)
    assert_equal(got.cpu() != 0, getattr(np, operation)(x.numpy()), x)
