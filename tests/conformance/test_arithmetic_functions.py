"""Arithmetic that Triton offers as functions: clamp, cdiv, umulhi, fma, divisions and roots of stated rounding."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from conformance.conversions import convert, round_to, to_numpy
from conformance.harness import (
    DEVICE,
    DTYPES,
    FLOATS,
    INTEGERS,
    ON_GPU,
    Dtype,
    assert_close_ulps,
    assert_equal,
    edge_values,
    from_bits,
    interpreter_gap,
    random,
    random_bits,
    since,
)

COUNT, BLOCK = 2048, 1024
GRID = (COUNT // BLOCK,)
FLOAT32, FLOAT64 = DTYPES["float32"], DTYPES["float64"]
NO_BFLOAT16 = interpreter_gap("computes with the bit patterns of bfloat16 as if they were integers")


def values_of(dtype: Dtype, seed: int) -> torch.Tensor:
    edges = edge_values(dtype, "cpu")
    edges = edges[torch.from_numpy(np.random.default_rng(seed).integers(0, len(edges), COUNT // 2))]
    quarter = COUNT // 4
    return torch.cat([edges, random(dtype, quarter, seed, "cpu"), random_bits(dtype, quarter, seed, "cpu")])


@triton.jit
def clamp_kernel(x_ptr, low_ptr, high_ptr, out_ptr, RESULT: tl.constexpr, PROPAGATE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    clamped = tl.clamp(x, tl.load(low_ptr + offsets), tl.load(high_ptr + offsets), propagate_nan=PROPAGATE)
    tl.static_assert(clamped.dtype == RESULT)
    tl.store(out_ptr + offsets, clamped)


@pytest.mark.parametrize(
    "propagate",
    [
        pytest.param(tl.PropagateNan.ALL, id="all"),
        pytest.param(tl.PropagateNan.NONE, id="none", marks=interpreter_gap("NaN wins in every mode")),
    ],
)
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=NO_BFLOAT16 if d.name == "bfloat16" else (), id=d.name) for d in FLOATS]
)
def test_clamp(dtype: Dtype, propagate: tl.PropagateNan) -> None:
    """NaN stays, or becomes the lower bound, for the larger of it and the bound is taken first."""
    x = values_of(dtype, 1)
    bounds = torch.stack([random(dtype, COUNT, 2, "cpu"), random(dtype, COUNT, 3, "cpu")])
    bounds[1, ::7] = float("inf")
    low, high = bounds.amin(0), bounds.amax(0)
    result = FLOAT32 if dtype.name == "bfloat16" and not since("3.9") else dtype
    out = torch.empty(COUNT, dtype=result.torch, device=DEVICE)
    given = [t.to(DEVICE) for t in (x, low, high)]
    clamp_kernel[GRID](*given, out, RESULT=result.triton, PROPAGATE=propagate, BLOCK=BLOCK)
    a, b, c = to_numpy(x), to_numpy(low), to_numpy(high)
    nan = a if propagate is tl.PropagateNan.ALL else b
    expected = np.where(np.isnan(a), nan, np.where(a < b, b, np.where(a > c, c, a)))
    assert_equal(out, convert(torch.from_numpy(expected), result), x, low, high)


@triton.jit
def cdiv_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.cdiv(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_cdiv(dtype: Dtype) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, dtype.max // 2, COUNT, dtype=dtype.name)
    y = rng.integers(1, min(dtype.max // 2, 1000), COUNT, dtype=dtype.name)
    out = torch.empty(COUNT, dtype=dtype.torch, device=DEVICE)
    cdiv_kernel[GRID](torch.from_numpy(x).to(DEVICE), torch.from_numpy(y).to(DEVICE), out, BLOCK=BLOCK)
    assert_equal(out, np.array([-(-int(a) // int(b)) for a, b in zip(x, y, strict=True)], dtype=dtype.name))


@triton.jit
def umulhi_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.umulhi(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)))


@pytest.mark.parametrize(
    "name",
    ["uint32", "uint64", *[pytest.param(n, marks=interpreter_gap("extends the sign")) for n in ("int32", "int64")]],
)
def test_umulhi(name: str) -> None:
    """The upper half of the product of the bit patterns, read as unsigned numbers whatever the dtype says."""
    dtype = DTYPES[name]
    x, y = values_of(dtype, 1), values_of(dtype, 2)
    out = torch.empty(COUNT, dtype=dtype.torch, device=DEVICE)
    umulhi_kernel[GRID](x.to(DEVICE), y.to(DEVICE), out, BLOCK=BLOCK)
    size = 2**dtype.bits
    pairs = zip(x.numpy().tolist(), y.numpy().tolist(), strict=True)
    assert_equal(out, from_bits([(a % size) * (b % size) // size for a, b in pairs], dtype), x, y)


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    tl.store(out_ptr + offsets, tl.fma(x, y, z))


def exact_fma(x: float, y: float, z: float) -> float:
    """Rounded once to float64, from exact fractions."""
    if not np.isfinite([x, y, z]).all():
        return z if np.isfinite([x, y]).all() else float(np.float64(x) * y + z)
    total = Fraction(x) * Fraction(y) + Fraction(z)
    if total == 0:
        return x * y + z if z == 0 else 0.0  # the sign of zero is that of the sum of the signs
    try:
        return float(total)
    except OverflowError:
        return float("inf") if total > 0 else float("-inf")


def rounded_to_odd(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` in float64, where an inexact sum ends in an odd bit: rounding it again rounds the exact sum.

    For operands of at most float32, whose products are exact in float64.
    """
    product = x * y
    total = product + z
    part = total - product
    lost = (product - (total - part)) + (z - part)  # exactly what the addition rounded away
    even = total.view(np.int64) % 2 == 0
    inexact = np.isfinite(total) & (lost != 0) & even
    away = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where(inexact, (total.view(np.int64) + away), total.view(np.int64)).view(np.float64)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=interpreter_gap("rounds the product"), id=d.name) for d in FLOATS],
)
def test_fma_rounds_once(dtype: Dtype) -> None:
    x, y, z = (values_of(dtype, seed) for seed in (1, 2, 3))
    z[::3] = (-x.double() * y.double()).to(dtype.torch)[::3]  # cancels all but the rounding
    out = torch.empty(COUNT, dtype=dtype.torch, device=DEVICE)
    fma_kernel[GRID](x.to(DEVICE), y.to(DEVICE), z.to(DEVICE), out, BLOCK=BLOCK)
    a, b, c = (t.double().numpy() for t in (x, y, z))
    with np.errstate(all="ignore"):
        if dtype is FLOAT64:
            exact = [exact_fma(*v) for v in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
            expected = torch.tensor(exact, dtype=torch.float64)
        elif dtype is FLOAT32:
            expected = torch.from_numpy(rounded_to_odd(a, b, c).astype(np.float32))
        else:
            expected = round_to(rounded_to_odd(a, b, c), dtype)
    assert_equal(out, expected, x, y, z)


@triton.jit
def root_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    if OP == "div_rn":
        out = tl.div_rn(x, y)
    elif OP == "sqrt_rn":
        out = tl.sqrt_rn(x)
    elif OP == "fdiv":
        out = tl.fdiv(x, y)
    else:
        out = tl.fdiv(x, y, ieee_rounding=True)
    tl.store(out_ptr + offsets, out)


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        *[("div_rn", "float32"), ("sqrt_rn", "float32")],
        *[("fdiv", "float32"), ("fdiv", "float64"), ("fdiv_ieee", "float32"), ("fdiv_ieee", "float64")],
    ],
)
def test_rounded_division_and_root(operation: str, dtype: str) -> None:
    """The nearest float, save for ``fdiv`` of float32 on a GPU (2 ulps; ``ieee_rounding`` changes nothing there)."""
    x, y = values_of(DTYPES[dtype], 1), values_of(DTYPES[dtype], 2)
    out = torch.empty(COUNT, dtype=x.dtype, device=DEVICE)
    root_kernel[GRID](x.to(DEVICE), y.to(DEVICE), out, OP=operation, BLOCK=BLOCK)
    with np.errstate(all="ignore"):
        expected = np.sqrt(x.numpy()) if operation == "sqrt_rn" else x.numpy() / y.numpy()
    if ON_GPU and operation.startswith("fdiv") and dtype == "float32":
        assert_close_ulps(out, expected.astype(np.float64), FLOAT32, 2, x, y)
    else:
        assert_equal(out, expected, x, y)
