"""Every conversion between two dtypes, bit for bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from conformance.conversions import convert, round_to, to_numpy
from conformance.harness import (
    BOOL,
    DEVICE,
    DTYPES,
    FLOAT8,
    FLOATS,
    INTEGERS,
    ON_GPU,
    Dtype,
    all_values,
    assert_equal,
    bits,
    edge_values,
    from_bits,
    gpu_differs,
    interpreter_gap,
    random,
    random_bits,
)

BLOCK = 4096
RANDOM = 30_000


@triton.jit
def cast_kernel(x_ptr, out_ptr, n, DTYPE: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, offsets < n)
    cast = x.to(DTYPE, fp_downcast_rounding=ROUNDING)
    tl.static_assert(cast.dtype == DTYPE)
    tl.store(out_ptr + offsets, cast, offsets < n)


def cast(x: torch.Tensor, dtype: Dtype, rounding: str | None = None) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype.torch, device=DEVICE)
    cast_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), DTYPE=dtype.triton, ROUNDING=rounding, BLOCK=BLOCK)
    return out


def between_neighbours(target: Dtype) -> np.ndarray:
    """Float64 ties between floats of ``target``, and what lies just beside them."""
    codes = edge_values(target, "cpu") if target.bits > 16 else all_values(target, "cpu")
    values = np.unique(to_numpy(codes).astype(np.float64))
    values = values[np.isfinite(values)]
    middle = (values[1:] + values[:-1]) / 2
    return np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])


def sources(source: Dtype, target: Dtype) -> torch.Tensor:
    """All values of a short dtype; edges, random values, random bits and near-ties of a longer one."""
    if source.bits <= 16:
        return all_values(source, "cpu")
    parts = [edge_values(source, "cpu"), random(source, RANDOM, 1, "cpu"), random_bits(source, RANDOM, 2, "cpu")]
    if source.is_float and target.is_float and target.bits < source.bits:
        ties = between_neighbours(target)
        parts.append(torch.from_numpy(ties[np.random.default_rng(0).permutation(len(ties))[:RANDOM]]).to(source.torch))
    if not source.is_float and target.is_float:
        parts.append(integers_near_ties(source, target))
    return torch.cat(parts)


def integers_near_ties(source: Dtype, target: Dtype) -> torch.Tensor:
    """Numbers of every length whose bits after those that ``target`` keeps are 0111..., 1000... or 1000...1."""
    rng = np.random.default_rng(4)
    found = []
    for length in range(target.mantissa + 3, source.bits - source.is_signed + 1):
        dropped = length - target.mantissa - 1
        kept = [int(k) << dropped for k in rng.integers(2**target.mantissa, 2 ** (target.mantissa + 1), 40)]
        found += [k + (1 << (dropped - 1)) + near for k in kept for near in (-1, 0, 1)]
    return from_bits(found + [-k for k in found if source.is_signed], source)


def in_range(x: torch.Tensor, target: Dtype) -> torch.Tensor:
    """A float outside the integer's range has no defined conversion."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = to_numpy(x).astype(np.longdouble)
    whole = np.trunc(np.where(np.isfinite(values), values, np.inf))
    return x[torch.from_numpy((whole >= target.min) & (whole <= target.max))]


ALL = (BOOL, *INTEGERS, *FLOATS, *FLOAT8)
BY_HAND = interpreter_gap(
    "truncates or rounds ties up to bfloat16 and float8; wrong denormals, infinities, NaN, float64"
)
THROUGH_FLOAT32 = ("bool", "float32", "float64")  # what loses bfloat16's denormals in the interpreter


def pairs() -> list:
    cases = []
    for source in ALL:
        for target in ALL:
            eight = (source in FLOAT8) + (target in FLOAT8)
            if source is target or (eight and not (source.is_float and target.is_float)):
                continue  # float8 converts only to and from floats
            marks = []
            if (eight and "float64" in (source.name, target.name)) or eight == 2:
                marks.append(gpu_differs("does not compile this pair"))
            if eight or target.name == "bfloat16" or (source.name == "bfloat16" and target.name in THROUGH_FLOAT32):
                marks.append(BY_HAND)
            cases.append(pytest.param(source, target, marks=marks, id=f"{source}-{target}"))
    return cases


@pytest.mark.parametrize(("source", "target"), pairs())
def test_cast(source: Dtype, target: Dtype) -> None:
    x = sources(source, target)
    if source.is_float and target in INTEGERS:
        x = in_range(x, target)
    if ON_GPU and (source.name, target.name) == ("float8e5", "bfloat16"):
        x = x[x.float().isfinite()]  # multiplied by 2 ** 112 there, which leaves infinity and NaN finite
    assert_equal(cast(x.to(DEVICE), target), convert(x, target), x)


@BY_HAND
@pytest.mark.parametrize("target", FLOAT8, ids=str)
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_float8_saturates(source: str, target: Dtype) -> None:
    """Past the largest value, and from infinity, comes the largest value; NaN stays NaN."""
    x = torch.tensor([target.max * 1.0625, 1e9, float("inf"), -float("inf"), -1e9, float("nan")])
    x = x.clamp(torch.finfo(DTYPES[source].torch).min, None) if source == "float16" else x
    got = cast(x.to(DTYPES[source].torch).to(DEVICE), target).float().cpu()
    sign = torch.tensor([1.0, 1, 1, -1, -1])
    assert torch.equal(got[:5], sign * target.max)
    assert got[5].isnan()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(
            source,
            target,
            marks=[
                *([gpu_differs("does not compile this pair")] if target == "float64" else []),
                *([BY_HAND] if target == "float64" or (source.name, target) == ("float8e5", "float16") else []),
            ],
            id=f"{source}-{target}",
        )
        for source in FLOAT8
        for target in ("float16", "bfloat16", "float32", "float64")
    ],
)
def test_float8_is_exact(source: Dtype, target: str) -> None:
    """Every finite code gives the number that the format's definition says, whatever torch says."""
    x = all_values(source, "cpu")
    x = x[x.float().isfinite()]
    code = bits(x).numpy().astype(np.int64) & 0x7F
    exponent, fraction = code >> source.mantissa, code % 2**source.mantissa
    normal = np.ldexp(1 + fraction / 2**source.mantissa, exponent - 1 + source.min_exponent)
    value = np.where(exponent > 0, normal, np.ldexp(fraction / 2**source.mantissa, source.min_exponent))
    value = np.where(bits(x).numpy() < 0, -value, value)
    got = cast(x.to(DEVICE), DTYPES[target]).double().cpu()
    assert_equal(got, value)


@BY_HAND
@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(DTYPES["float32"], DTYPES["float16"], id="float32-float16"),
        pytest.param(DTYPES["float32"], DTYPES["bfloat16"], id="float32-bfloat16"),
        pytest.param(DTYPES["float32"], DTYPES["float8e5"], id="float32-float8e5"),
    ],
)
def test_cast_towards_zero(source: Dtype, target: Dtype) -> None:
    """Overflow stops at the largest finite value; infinity stays infinity, also in float8e5."""
    x = sources(source, target)
    expected = round_to(to_numpy(x), target, "rtz", saturate=False)
    assert_equal(cast(x.to(DEVICE), target, "rtz"), expected, x)


@triton.jit
def bitcast_kernel(x_ptr, out_ptr, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, offsets < n)
    tl.store(out_ptr + offsets, x.to(DTYPE, bitcast=True), offsets < n)


@pytest.mark.parametrize(
    ("source", "target"),
    [pytest.param(a, b, id=f"{a}-{b}") for a in ALL for b in ALL if a is not b and a.bits == b.bits],
)
def test_bitcast(source: Dtype, target: Dtype) -> None:
    x = all_values(source) if source.bits <= 16 else torch.cat([edge_values(source), random_bits(source, BLOCK)])
    out = torch.empty(x.shape, dtype=target.torch, device=DEVICE)
    bitcast_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), DTYPE=target.triton, BLOCK=BLOCK)
    assert torch.equal(bits(out), bits(x))  # NaN keeps its payload


@triton.jit
def implicit_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, offsets < n), offsets < n)


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "float16"), ("int64", "int8"), ("float64", "int32"), ("uint8", "float32")],
)
def test_store_casts_to_the_pointers_dtype(source: str, target: str) -> None:
    x = sources(DTYPES[source], DTYPES[target])
    x = in_range(x, DTYPES[target]) if source == "float64" else x
    out = torch.empty(x.shape, dtype=DTYPES[target].torch, device=DEVICE)
    implicit_kernel[(triton.cdiv(x.numel(), BLOCK),)](x.to(DEVICE), out, x.numel(), BLOCK=BLOCK)
    assert_equal(out, convert(x, DTYPES[target]), x)


@triton.jit
def round_trip_kernel(x_ptr, out_ptr, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, offsets < n)
    tl.store(out_ptr + offsets, x.to(DTYPE).to(tl.float32), offsets < n)


@pytest.mark.parametrize(
    "middle", ["float16", *[pytest.param(name, marks=BY_HAND) for name in ("bfloat16", "float8e4nv", "float8e5")]]
)
def test_a_round_trip_rounds(middle: str) -> None:
    """The two conversions must not cancel."""
    x = torch.cat([random(DTYPES["float32"], BLOCK, 1, "cpu"), edge_values(DTYPES["float32"], "cpu")])
    out = torch.empty(x.shape, device=DEVICE)
    round_trip_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x.to(DEVICE), out, x.numel(), DTYPE=DTYPES[middle].triton, BLOCK=BLOCK
    )
    assert_equal(out, to_numpy(convert(x, DTYPES[middle])).astype(np.float32), x)
