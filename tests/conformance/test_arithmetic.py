"""Operators on every pair of dtypes: promotion, wrap-around, truncating division, shifts, comparisons, selection."""

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
    FLOATS,
    INTEGERS,
    ON_GPU,
    SIGNED,
    Dtype,
    assert_close_ulps,
    assert_equal,
    edge_values,
    gpu_differs,
    interpreter_gap,
    random,
    random_bits,
    since,
)

COUNT, BLOCK = 4096, 1024
ELEMENTS = (*INTEGERS, *FLOATS)
FLOAT32, FLOAT64 = DTYPES["float32"], DTYPES["float64"]
NO_BFLOAT16 = interpreter_gap("computes with the bit patterns of bfloat16 as if they were integers")
DIV_FULL_ULPS = 2  # what PTX promises of div.full.f32, which `/` becomes on NVIDIA


def values_of(dtype: Dtype, seed: int) -> torch.Tensor:
    """Half edges, half random, in an order of their own, so that two of them meet in many combinations."""
    rng = np.random.default_rng(seed)
    edges = edge_values(dtype, "cpu")
    drawn = edges[torch.from_numpy(rng.integers(0, len(edges), COUNT // 2))]
    plain = random(dtype, COUNT // 4, seed, "cpu")
    anything = random_bits(dtype, COUNT - COUNT // 2 - COUNT // 4, seed + 1, "cpu")
    return torch.cat([drawn, plain, anything]).to(DEVICE)


def operands(first: Dtype, second: Dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shuffled = torch.from_numpy(np.random.default_rng(2).permutation(COUNT))
    other = values_of(second, 3).cpu()  # where torch can index tensors of every dtype
    mixed = (other if second.bits > 1 else other.to(torch.uint8))[shuffled].to(other.dtype)
    return values_of(first, 1), mixed.to(DEVICE)


def without_bfloat16(dtypes: tuple[Dtype, ...]) -> list:
    return [pytest.param(d, marks=NO_BFLOAT16 if d.name == "bfloat16" else (), id=d.name) for d in dtypes]


def promoted(first: Dtype, second: Dtype, divide: bool = False) -> Dtype:
    """The dtype in which Triton computes with two tensors."""
    names = {first.name, second.name}
    for wide in ("float64", "float32"):
        if wide in names:
            return DTYPES[wide]
    if "float16" in names:
        return FLOAT32 if divide else DTYPES["float16"]
    if "bfloat16" in names:
        return DTYPES["bfloat16"] if len(names) == 1 and not divide else FLOAT32
    if first.is_signed == second.is_signed:
        return max(first, second, key=lambda d: d.bits)
    signed, unsigned = (first, second) if first.is_signed else (second, first)
    return unsigned if unsigned.bits >= signed.bits else signed


def in_dtype(tensor: torch.Tensor, dtype: Dtype) -> np.ndarray:
    """As NumPy computes with it: float16 and bfloat16 as float64, where one operation on them is exact or rounds
    once harmlessly before the rounding to the dtype (53 bits are more than twice 11 and two)."""
    return to_numpy(convert(tensor, dtype))


def out_of(values: np.ndarray, dtype: Dtype) -> torch.Tensor:
    return torch.from_numpy(values) if dtype.name not in ("float16", "bfloat16") else round_to(values, dtype)


@triton.jit
def ring_kernel(x_ptr, y_ptr, out_ptr, n, RESULT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    tl.static_assert((x + y).dtype == RESULT)
    tl.static_assert((x * y).dtype == RESULT)
    tl.store(out_ptr + offsets, x + y, mask)
    tl.store(out_ptr + n + offsets, x - y, mask)
    tl.store(out_ptr + 2 * n + offsets, y - x, mask)
    tl.store(out_ptr + 3 * n + offsets, x * y, mask)


def ring_cases() -> list:
    cases = []
    for i, first in enumerate((BOOL, *ELEMENTS)):
        for second in (BOOL, *ELEMENTS)[max(i, 1) :]:
            alone = "bfloat16" in (first.name, second.name) and first.name != "float16"
            marks = NO_BFLOAT16 if alone else ()  # beside float16 it becomes float16
            cases.append(pytest.param(first, second, marks=marks, id=f"{first}-{second}"))
    return cases


@pytest.mark.parametrize(("first", "second"), ring_cases())
def test_add_subtract_multiply(first: Dtype, second: Dtype) -> None:
    x, y = operands(first, second)
    result = promoted(first, second)
    out = torch.empty(4, COUNT, dtype=result.torch, device=DEVICE)
    ring_kernel[(triton.cdiv(COUNT, BLOCK),)](x, y, out, COUNT, RESULT=result.triton, BLOCK=BLOCK)
    a, b = in_dtype(x, result), in_dtype(y, result)
    with np.errstate(all="ignore"):
        expected = [a + b, a - b, b - a, a * b]
    for row, values in enumerate(expected):
        assert_equal(out[row], out_of(values, result), x, y)


@interpreter_gap("adds booleans as NumPy does, True + True is True; i1 wraps to False")
def test_booleans_wrap() -> None:
    x, y = torch.tensor([0, 0, 1, 1]).bool().to(DEVICE), torch.tensor([0, 1, 0, 1]).bool().to(DEVICE)
    out = torch.empty(4, 4, dtype=torch.bool, device=DEVICE)
    ring_kernel[(1,)](x, y, out, 4, RESULT=tl.int1, BLOCK=4)
    assert_equal(out, torch.stack([x ^ y, x ^ y, x ^ y, x & y]))


@triton.jit
def divide_kernel(x_ptr, y_ptr, quotient_ptr, whole_ptr, rest_ptr, n, RESULT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask, other=1)
    tl.static_assert((x / y).dtype == RESULT)
    tl.store(quotient_ptr + offsets, x / y, mask)
    if whole_ptr is not None:
        tl.store(whole_ptr + offsets, x // y, mask)
    if rest_ptr is not None:
        tl.store(rest_ptr + offsets, x % y, mask)


def assert_quotient(actual: torch.Tensor, expected: np.ndarray, dtype: Dtype, *inputs: torch.Tensor) -> None:
    """Rounded once, save on a GPU in float32."""
    if ON_GPU and dtype is FLOAT32:
        assert_close_ulps(actual, expected.astype(np.float64), dtype, DIV_FULL_ULPS, *inputs)
    else:
        assert_equal(actual, expected, *inputs)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(a, b, id=f"{a}-{b}")
        for a in INTEGERS
        for b in INTEGERS
        if a.kind == b.kind and (a is b or {a.bits, b.bits} in ({8, 32}, {32, 64}))
    ],
)
def test_divide_integers(first: Dtype, second: Dtype) -> None:
    x, y = operands(first, second)
    result = promoted(first, second)
    a, b = x.cpu().numpy(), y.cpu().numpy()
    b[b == 0] = 3  # undefined, and so is the quotient that does not fit
    if result.kind == "int":
        b[(a == result.min) & (b == -1)] = 1
    x, y = torch.from_numpy(a).to(DEVICE), torch.from_numpy(b).to(DEVICE)
    quotient = torch.empty(COUNT, dtype=torch.float32, device=DEVICE)
    whole, rest = (torch.empty(COUNT, dtype=result.torch, device=DEVICE) for _ in range(2))
    grid = (triton.cdiv(COUNT, BLOCK),)
    divide_kernel[grid](x, y, quotient, whole, rest, COUNT, RESULT=tl.float32, BLOCK=BLOCK)
    a, b = in_dtype(x, result), in_dtype(y, result)
    down, over = np.divmod(a, b)  # rounds down; Triton truncates, as C does
    truncated = down + ((over != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    assert_equal(whole, truncated, x, y)
    assert_equal(rest, a - truncated * b, x, y)
    with np.errstate(all="ignore"):
        assert_quotient(quotient, in_dtype(x, FLOAT32) / in_dtype(y, FLOAT32), FLOAT32, x, y)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(DTYPES[a], DTYPES[b], marks=NO_BFLOAT16 if "bfloat16" in (a, b) else (), id=f"{a}-{b}")
        for a, b in [
            *[(d.name, d.name) for d in FLOATS],
            *[(d.name, "int32") for d in FLOATS],
            *[("float16", other) for other in ("bfloat16", "float32", "uint8", "int64")],
            *[("uint64", "float32"), ("int8", "float64"), ("bfloat16", "float64"), ("float32", "float64")],
        ]
    ],
)
def test_divide_floats(first: Dtype, second: Dtype) -> None:
    x, y = operands(first, second)
    result = promoted(first, second, divide=True)
    quotient = torch.empty(COUNT, dtype=result.torch, device=DEVICE)
    divide_kernel[(triton.cdiv(COUNT, BLOCK),)](x, y, quotient, None, None, COUNT, RESULT=result.triton, BLOCK=BLOCK)
    with np.errstate(all="ignore"):
        expected = in_dtype(x, result).astype(result.name) / in_dtype(y, result).astype(result.name)
    assert_quotient(quotient, expected, result, x, y)


@gpu_differs("the remainder is x - trunc(x / y) * y in floating point, inexact for large quotients")
@pytest.mark.parametrize("dtype", without_bfloat16(FLOATS))
def test_remainder_of_floats(dtype: Dtype) -> None:
    x, y = operands(dtype, dtype)
    result = promoted(dtype, dtype, divide=True)
    quotient, rest = (torch.empty(COUNT, dtype=result.torch, device=DEVICE) for _ in range(2))
    divide_kernel[(triton.cdiv(COUNT, BLOCK),)](x, y, quotient, None, rest, COUNT, RESULT=result.triton, BLOCK=BLOCK)
    with np.errstate(all="ignore"):
        expected = np.fmod(in_dtype(x, result), in_dtype(y, result))
    assert_equal(rest, expected, x, y)


@triton.jit
def bitwise_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    tl.store(out_ptr + offsets, x & y, mask)
    tl.store(out_ptr + n + offsets, x | y, mask)
    tl.store(out_ptr + 2 * n + offsets, x ^ y, mask)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *[pytest.param(d, d, id=d.name) for d in (BOOL, *INTEGERS)],
        *[
            pytest.param(DTYPES[a], DTYPES[b], id=f"{a}-{b}")
            for a, b in [("int8", "int32"), ("uint8", "int16"), ("uint32", "int32"), ("int64", "uint16")]
        ],
    ],
)
def test_bitwise(first: Dtype, second: Dtype) -> None:
    x, y = operands(first, second)
    result = promoted(first, second)
    out = torch.empty(3, COUNT, dtype=result.torch, device=DEVICE)
    bitwise_kernel[(triton.cdiv(COUNT, BLOCK),)](x, y, out, COUNT, BLOCK=BLOCK)
    a, b = in_dtype(x, result), in_dtype(y, result)
    for row, values in enumerate([a & b, a | b, a ^ b]):
        assert_equal(out[row], values, x, y)


@triton.jit
def invert_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, ~tl.load(x_ptr + offsets, offsets < n), offsets < n)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            d, marks=interpreter_gap("~ of unsigned integers overflows") if d.kind == "uint" else (), id=d.name
        )
        for d in (BOOL, *INTEGERS)
    ],
)
def test_invert(dtype: Dtype) -> None:
    x = values_of(dtype, 1)
    out = torch.empty_like(x)
    invert_kernel[(triton.cdiv(COUNT, BLOCK),)](x, out, COUNT, BLOCK=BLOCK)
    assert_equal(out, ~x.cpu().numpy(), x)


@triton.jit
def shift_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    tl.store(out_ptr + offsets, x << y, mask)
    tl.store(out_ptr + n + offsets, x >> y, mask)  # keeps the sign of a signed x
    tl.store(out_ptr + 2 * n + offsets, x << 3, mask)
    tl.store(out_ptr + 3 * n + offsets, x >> 5, mask)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_shifts(dtype: Dtype) -> None:
    x = values_of(dtype, 1)
    y = torch.from_numpy((np.arange(COUNT) * 7 % dtype.bits).astype(dtype.name)).to(DEVICE)
    out = torch.empty(4, COUNT, dtype=dtype.torch, device=DEVICE)
    shift_kernel[(triton.cdiv(COUNT, BLOCK),)](x, y, out, COUNT, BLOCK=BLOCK)
    powers, wide = [2**k for k in y.cpu().numpy().tolist()], x.cpu().numpy().tolist()
    expected = [
        [v * p for v, p in zip(wide, powers, strict=True)],
        [v // p for v, p in zip(wide, powers, strict=True)],
        [v * 8 for v in wide],
        [v // 32 for v in wide],
    ]
    for row, values in enumerate(expected):
        wrapped = np.array([v % 2**dtype.bits for v in values], dtype=f"uint{dtype.bits}").view(dtype.name)
        assert_equal(out[row], wrapped, x, y)


@triton.jit
def compare_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    tl.static_assert((x < y).dtype == tl.int1)
    tl.store(out_ptr + offsets, x < y, mask)
    tl.store(out_ptr + n + offsets, x <= y, mask)
    tl.store(out_ptr + 2 * n + offsets, x > y, mask)
    tl.store(out_ptr + 3 * n + offsets, x >= y, mask)
    tl.store(out_ptr + 4 * n + offsets, x == y, mask)
    tl.store(out_ptr + 5 * n + offsets, x != y, mask)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *[
            pytest.param(d, d, marks=NO_BFLOAT16 if d.name == "bfloat16" else (), id=d.name)
            for d in (*INTEGERS, *FLOATS)
        ],
        *[
            pytest.param(DTYPES[a], DTYPES[b], id=f"{a}-{b}")
            for a, b in [
                *[("int8", "int32"), ("uint8", "int8"), ("int32", "uint32"), ("uint64", "int64"), ("uint16", "int32")],
                *[("float16", "float32"), ("float32", "float64"), ("int32", "float32"), ("uint8", "float16")],
            ]
        ],
    ],
)
def test_comparisons(first: Dtype, second: Dtype) -> None:
    x, y = operands(first, second)
    if first is second:
        y[::5] = x[::5]
    out = torch.empty(6, COUNT, dtype=torch.bool, device=DEVICE)
    compare_kernel[(triton.cdiv(COUNT, BLOCK),)](x, y, out, COUNT, BLOCK=BLOCK)
    result = promoted(first, second)
    a, b = in_dtype(x, result), in_dtype(y, result)
    for row, values in enumerate([a < b, a <= b, a > b, a >= b, a == b, a != b]):
        assert_equal(out[row], values, x, y)


@triton.jit
def logic_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    less, negative = x < y, y < 0
    tl.store(out_ptr + offsets, less & negative, mask)
    tl.store(out_ptr + n + offsets, less | negative, mask)
    tl.store(out_ptr + 2 * n + offsets, less ^ negative, mask)
    tl.store(out_ptr + 3 * n + offsets, ~less, mask)
    tl.store(out_ptr + 4 * n + offsets, less.logical_and(negative), mask)
    tl.store(out_ptr + 5 * n + offsets, less.logical_or(negative), mask)
    tl.store(out_ptr + 6 * n + offsets, tl.where(less, ~negative, negative), mask)
    # an i1 widens to 0 and 1, not to 0 and -1
    tl.store(out_ptr + 7 * n + offsets, less.to(tl.int32) + negative.to(tl.int8) == 2, mask)


@pytest.mark.parametrize("dtype", [*SIGNED, DTYPES["float16"], FLOAT32, FLOAT64], ids=str)
def test_logic(dtype: Dtype) -> None:
    x, y = operands(dtype, dtype)
    out = torch.empty(8, COUNT, dtype=torch.bool, device=DEVICE)
    logic_kernel[(triton.cdiv(COUNT, BLOCK),)](x, y, out, COUNT, BLOCK=BLOCK)
    less, negative = x < y, y < 0
    chosen = torch.where(less, ~negative, negative)
    expected = [less & negative, less | negative, less ^ negative, ~less, less & negative, less | negative, chosen]
    for row, values in enumerate([*expected, less & negative]):
        assert_equal(out[row], values, x, y)


@triton.jit
def unary_kernel(x_ptr, minus_ptr, abs_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    tl.store(minus_ptr + offsets, -x, mask)
    tl.store(abs_ptr + offsets, tl.abs(x), mask)


@pytest.mark.parametrize("dtype", without_bfloat16(ELEMENTS))
def test_minus_and_abs(dtype: Dtype) -> None:
    x = values_of(dtype, 1)
    minus, absolute = torch.empty_like(x), torch.empty_like(x)
    unary_kernel[(triton.cdiv(COUNT, BLOCK),)](x, minus, absolute, COUNT, BLOCK=BLOCK)
    a = in_dtype(x, dtype)
    negated = since("3.8") and dtype.is_float
    with np.errstate(all="ignore"):
        expected = -a if negated else 0 - a  # otherwise minus zero is zero; minus the smallest integer is itself
    assert_equal(minus, out_of(expected, dtype), x)
    assert_equal(absolute, out_of(np.abs(a), dtype), x)


@triton.jit
def select_kernel(c_ptr, x_ptr, y_ptr, out_ptr, n, RESULT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    chosen = tl.load(c_ptr + offsets, mask) != 0
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    picked = tl.where(chosen, x, y)
    tl.static_assert(picked.dtype == RESULT)
    tl.store(out_ptr + offsets, picked, mask)
    tl.store(out_ptr + n + offsets, tl.where(chosen, x, 0).to(RESULT), mask)
    tl.store(out_ptr + 2 * n + offsets, tl.where(tl.program_id(0) % 2 == 0, x, y), mask)  # a scalar chooses


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *[pytest.param(d, d, id=d.name) for d in (*INTEGERS, *FLOATS)],
        *[
            pytest.param(DTYPES[a], DTYPES[b], id=f"{a}-{b}")
            for a, b in [("int8", "int32"), ("uint8", "float16"), ("float16", "float32"), ("int64", "float64")]
        ],
    ],
)
def test_where(first: Dtype, second: Dtype) -> None:
    x, y = operands(first, second)
    result = promoted(first, second)
    condition = random(DTYPES["int8"], COUNT, seed=5) & 1
    out = torch.empty(3, COUNT, dtype=result.torch, device=DEVICE)
    select_kernel[(triton.cdiv(COUNT, BLOCK),)](condition, x, y, out, COUNT, RESULT=result.triton, BLOCK=BLOCK)
    a, b = convert(x, result).to(DEVICE), convert(y, result).to(DEVICE)
    even = (torch.arange(COUNT, device=DEVICE) // BLOCK) % 2 == 0
    zero = torch.zeros_like(a)
    chosen = condition != 0
    for row, values in enumerate([torch.where(chosen, a, b), torch.where(chosen, a, zero), torch.where(even, a, b)]):
        assert_equal(out[row], values, x, y)


@triton.jit
def extreme_kernel(x_ptr, y_ptr, out_ptr, n, RESULT: tl.constexpr, PROPAGATE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask)
    y = tl.load(y_ptr + offsets, mask)
    tl.static_assert(tl.minimum(x, y).dtype == RESULT)
    tl.store(out_ptr + offsets, tl.minimum(x, y, propagate_nan=PROPAGATE), mask)
    tl.store(out_ptr + n + offsets, tl.maximum(x, y, propagate_nan=PROPAGATE), mask)


def extremes(dtype: Dtype, result: Dtype, propagate: tl.PropagateNan) -> tuple[torch.Tensor, ...]:
    x, y = operands(dtype, dtype)
    out = torch.empty(2, COUNT, dtype=result.torch, device=DEVICE)
    grid = (triton.cdiv(COUNT, BLOCK),)
    extreme_kernel[grid](x, y, out, COUNT, RESULT=result.triton, PROPAGATE=propagate, BLOCK=BLOCK)
    return x, y, out


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_minimum_and_maximum_of_integers(dtype: Dtype) -> None:
    x, y, out = extremes(dtype, dtype, tl.PropagateNan.NONE)
    assert_equal(out[0], np.minimum(x.cpu().numpy(), y.cpu().numpy()), x, y)
    assert_equal(out[1], np.maximum(x.cpu().numpy(), y.cpu().numpy()), x, y)


@pytest.mark.parametrize(
    "propagate",
    [
        pytest.param(tl.PropagateNan.ALL, id="all"),
        pytest.param(tl.PropagateNan.NONE, id="none", marks=interpreter_gap("NaN wins in every mode")),
    ],
)
@pytest.mark.parametrize("dtype", without_bfloat16(FLOATS))
def test_minimum_and_maximum_of_floats(dtype: Dtype, propagate: tl.PropagateNan) -> None:
    """With NONE a NaN gives way to a number. Of two zeros either may come."""
    result = FLOAT32 if dtype.name == "bfloat16" and not since("3.9") else dtype
    x, y, out = extremes(dtype, result, propagate)
    a, b = in_dtype(x, result), in_dtype(y, result)
    both = propagate is tl.PropagateNan.ALL
    for row, find in enumerate([np.minimum if both else np.fmin, np.maximum if both else np.fmax]):
        zeros = torch.from_numpy((a == 0) & (b == 0))
        assert not out[row].cpu()[zeros].any()
        assert_equal(out[row].cpu()[~zeros], out_of(find(a, b), result)[~zeros], x.cpu()[~zeros], y.cpu()[~zeros])
