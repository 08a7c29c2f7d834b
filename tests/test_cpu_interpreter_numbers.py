"""The interpreter of the CPU target: what arithmetic and conversions give, exactly."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cpu_interpreter_helpers import assert_same, elementwise, launch
from tilewright.cpu.interpreter_libdevice import LIBRARY
from tilewright.cpu.libdevice import NATIVE

INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OP == "+":
        z = x + y
    elif OP == "-":
        z = x - y
    elif OP == "*":
        z = x * y
    elif OP == "//":
        z = x // y
    elif OP == "%":
        z = x % y
    elif OP == "<<":
        z = x << y
    elif OP == ">>":
        z = x >> y
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "min":
        z = tl.minimum(x, y)
    elif OP == "<":
        z = (x < y).to(x.dtype)
    else:
        z = x / y
    tl.store(out_ptr + offsets, z)


def edges(dtype: torch.dtype) -> list[int]:
    info = torch.iinfo(dtype)
    near = {*range(-3, 4), 7, info.bits - 1, info.bits, 100, *range(info.min, info.min + 3)}
    return sorted(v for v in near | {info.max, info.max - 1, info.max // 2 + 1} if info.min <= v <= info.max)


def wrapped(value: int, dtype: torch.dtype) -> int:
    info = torch.iinfo(dtype)
    value &= 2**info.bits - 1
    return value - 2**info.bits if value > info.max else value


def python_result(operation: str, x: int, y: int, bits: int) -> int:
    quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) if y else 0
    return {
        "+": x + y, "-": x - y, "*": x * y, "//": quotient, "%": x - quotient * y, "max": max(x, y), "min": min(x, y),
        "<": int(x < y), "<<": x << y if 0 <= y < bits else 0, ">>": x >> y if 0 <= y < bits else -(x < 0),
    }[operation]  # fmt: skip


@pytest.mark.parametrize("operation", ["+", "-", "*", "//", "%", "<<", ">>", "max", "min", "<"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_arithmetic(dtype: torch.dtype, operation: str) -> None:
    pairs = [(x, y) for x, y in itertools.product(edges(dtype), repeat=2) if y or operation not in {"//", "%"}]
    if operation in {"<<", ">>"}:  # a negative count is too large as well
        pairs = [(x, y) for x, y in pairs if dtype.is_signed or y < 2**63]
    size = triton.next_power_of_2(len(pairs))
    pairs += [(1, 1)] * (size - len(pairs))
    x, y = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    out = torch.zeros(size, dtype=dtype)
    launch(binary_kernel, (1,), x, y, out, OP=operation, BLOCK=size)
    bits = torch.iinfo(dtype).bits
    assert out.tolist() == [wrapped(python_result(operation, *pair, bits), dtype) for pair in pairs]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("operation", ["//", "%"])
def test_division_by_zero_is_all_ones(dtype: torch.dtype, operation: str) -> None:
    """As GPUs have it: it does not trap, and the remainder is the dividend."""
    x, y, out = torch.tensor(edges(dtype)[:4], dtype=dtype), torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    launch(binary_kernel, (1,), x, y, out, OP=operation, BLOCK=4)
    assert out.tolist() == (x.tolist() if operation == "%" else [wrapped(-1, dtype)] * 4)


@triton.jit
def high_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.umulhi(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)))


@pytest.mark.parametrize("dtype", [torch.uint32, torch.uint64], ids=str)
def test_upper_half_of_a_product(dtype: torch.dtype) -> None:
    bits = torch.iinfo(dtype).bits
    numbers = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits // 2) - 1, 3 * 2 ** (bits // 2) + 5, 0xDEADBEEF, 12345]
    pairs = list(itertools.product(numbers, repeat=2))
    x, y = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    out = torch.zeros(64, dtype=dtype)
    launch(high_kernel, (1,), x, y, out, BLOCK=64)
    assert out.tolist() == [a * b >> bits for a, b in pairs]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arith.floordivsi", lambda x, y: x // y),
        ("arith.ceildivsi", lambda x, y: -(-x // y)),
        ("arith.ceildivui", lambda x, y: -(-(x % 2**32) // (y % 2**32))),
        ("arith.divui", lambda x, y: (x % 2**32) // (y % 2**32)),
        ("arith.maxui", lambda x, y: max(x % 2**32, y % 2**32)),
        ("arith.minui", lambda x, y: min(x % 2**32, y % 2**32)),
    ],
)
def test_integer_operations_without_syntax(name: str, expected) -> None:
    pairs = [(x, y) for x, y in itertools.product([-(2**31) + 1, -7, -1, 0, 1, 5, 2**31 - 1, 12], repeat=2) if y]
    pairs += [(1, 1)] * 8
    x, y = (torch.tensor(column, dtype=torch.int32) for column in zip(*pairs, strict=True))
    out = elementwise(name, "", [x, y], torch.zeros_like(x))
    assert out.tolist() == [wrapped(expected(*pair), torch.int32) for pair in pairs]


@pytest.mark.parametrize("name", ["arith.addi", "arith.muli", "arith.maxsi", "arith.cmpi", "arith.extsi"])
def test_truth_values_are_one_bit_integers(name: str) -> None:
    """Which as signed ones are 0 and -1."""
    x, y = torch.tensor([False, False, True, True]), torch.tensor([False, True, False, True])
    if name == "arith.extsi":
        assert elementwise(name, "", [x], torch.zeros(4, dtype=torch.int8)).tolist() == [0, 0, -1, -1]
        return
    attributes = "<{predicate = 2 : i64}>" if name == "arith.cmpi" else ""  # signed less than
    expected = {"arith.addi": x ^ y, "arith.muli": x & y, "arith.maxsi": x & y, "arith.cmpi": x & ~y}[name]
    assert torch.equal(elementwise(name, attributes, [x, y], torch.zeros(4, dtype=torch.bool)), expected)


# Floating point

FLOATS = {torch.float16: (11, -14, 15), torch.bfloat16: (8, -126, 127), torch.float32: (24, -126, 127)}
FLOATS |= {torch.float64: (53, -1022, 1023), torch.float8_e4m3fn: (4, -6, 8), torch.float8_e5m2: (3, -14, 15)}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, 0.1, -2.75, 1e-8, 65504.0, 1e30, math.inf, -math.inf, math.nan]


def nearest(value: Fraction, dtype: torch.dtype, towards_zero: bool = False) -> float:
    """The number of a format nearest to a fraction, ties to even; from the definition of the format."""
    digits, least, greatest = FLOATS[dtype]
    size = abs(value)
    if not size:
        return 0.0
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, least)
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - digits + 1)
    units = math.floor(size / unit) if towards_zero else round(size / unit)  # Python rounds ties to even
    rounded = units * unit
    largest = Fraction(torch.finfo(dtype).max)
    if rounded > largest:
        saturates = towards_zero or dtype.itemsize == 1
        return math.copysign(float(largest) if saturates else math.inf, value)
    assert rounded < Fraction(2) ** (greatest + 1)
    return math.copysign(float(rounded), value)


def rounded(values: list[float], dtype: torch.dtype, towards_zero: bool = False) -> torch.Tensor:
    """The numbers of a format nearest to Python floats, as f64."""

    def one(value: float) -> float:
        if math.isfinite(value):
            return math.copysign(nearest(Fraction(value), dtype, towards_zero), value)
        if dtype.itemsize == 1 and math.isinf(value) and not (towards_zero and dtype == torch.float8_e5m2):
            return math.copysign(torch.finfo(dtype).max, value)
        return value

    return torch.tensor([one(value) for value in values], dtype=torch.float64)


def near_ties(dtype: torch.dtype) -> list[float]:
    """Numbers of a narrow format, the middles between them, and what lies just beside these."""
    generator = torch.Generator().manual_seed(1)
    info = torch.finfo(dtype)
    exponents = torch.randint(-8, 9, (200,), generator=generator).double()
    values = (torch.rand(200, generator=generator, dtype=torch.float64) * 2 - 1) * 2.0**exponents
    lower = values.to(torch.float32).to(dtype).double()
    middles = lower * (1 + info.eps / 2)
    tiny = info.smallest_normal * info.eps * torch.tensor([0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 3.5], dtype=torch.float64)
    top = info.max * (1 + info.eps * torch.tensor([0.1, 0.24, 0.26, 0.5, 1.0, 1e3], dtype=torch.float64))
    found = torch.cat([values, lower, middles, tiny, top])
    return [*torch.cat([found, found * (1 + 2.0**-30), found * (1 - 2.0**-30), -top]).tolist(), *SPECIAL]


@triton.jit
def cast_kernel(x_ptr, out_ptr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    size = triton.next_power_of_2(len(x))
    padded = torch.cat([x, torch.ones(size - len(x)).to(x.dtype)])
    out = torch.zeros(size).to(dtype)
    launch(cast_kernel, (1,), padded, out, ROUNDING=rounding, BLOCK=size)
    return out[: len(x)]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *[(torch.float32, target) for target in FLOATS if target not in {torch.float32, torch.float64}],
        *[(torch.float64, target) for target in (torch.float16, torch.bfloat16, torch.float32)],
        (torch.float16, torch.float8_e4m3fn),
        (torch.float16, torch.float8_e5m2),
        (torch.bfloat16, torch.float8_e5m2),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_float_conversions_round_once(source: torch.dtype, target: torch.dtype) -> None:
    """To nearest, ties to even; fp8 saturates, infinity too."""
    x = torch.tensor(near_ties(target), dtype=torch.float64)
    x = x if source == torch.float64 else x.to(torch.float32).to(source)
    got = cast(x, target)
    expected = rounded(x.double().tolist(), target)
    assert_same(got.double(), expected)
    numbers = ~x.isnan()
    assert torch.equal(torch.signbit(got.float())[numbers], torch.signbit(x)[numbers])


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_float_conversions_towards_zero(target: torch.dtype) -> None:
    x = torch.tensor(near_ties(target), dtype=torch.float32)
    assert_same(cast(x, target, "rtz").double(), rounded(x.double().tolist(), target, towards_zero=True))


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_number(source: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    digits, least, _ = FLOATS[source]
    expected = []
    for code in range(256):
        exponent, fraction = (code & 0x7F) >> (digits - 1), code & (2 ** (digits - 1) - 1)
        if source == torch.float8_e4m3fn and code & 0x7F == 0x7F:
            number = math.nan
        elif source == torch.float8_e5m2 and exponent == 31:
            number = math.nan if fraction else math.inf
        else:
            scale = 2.0 ** (max(exponent, 1) - 1 + least - digits + 1)
            number = (fraction + (2 ** (digits - 1) if exponent else 0)) * scale
        expected.append(-number if code >= 128 else number)
    assert_same(cast(codes.view(source), torch.float32), expected)


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("source", INTEGERS, ids=str)
def test_integers_to_floats_round_once(source: torch.dtype, target: torch.dtype) -> None:
    info = torch.iinfo(source)
    powers = [2**k + d for k in range(info.bits) for d in (-1, 0, 1)]
    powers += [2**k + 2 ** max(0, k - p) + d for k in range(info.bits) for p in (8, 11, 24, 53) for d in (-1, 0, 1)]
    numbers = sorted({s * v for v in powers for s in (1, -1) if info.min <= s * v <= info.max} | set(edges(source)))
    got = cast(torch.tensor(numbers, dtype=source), target)
    assert got.double().tolist() == [nearest(Fraction(v), target) for v in numbers]


@pytest.mark.parametrize("source", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", INTEGERS, ids=str)
def test_floats_to_integers_truncate(source: torch.dtype, target: torch.dtype) -> None:
    info = torch.iinfo(target)
    limits = [float(info.max), float(info.min), info.max / 2 + 1, info.max * 0.75]
    x = torch.tensor([0.0, 0.99, -0.99, 1.5, 2.5, 100.25, -1.5, -100.9, *limits], dtype=torch.float64).to(source)
    x = x[torch.tensor([math.isfinite(v) and info.min <= math.trunc(v) <= info.max for v in x.tolist()])]
    assert cast(x, target).tolist() == [math.trunc(v) for v in x.tolist()]


@pytest.mark.parametrize("operation", ["+", "-", "*", "/"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_float_arithmetic_rounds_once(dtype: torch.dtype, operation: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = ((torch.randn(512, generator=generator) * 8).to(dtype) for _ in range(2))
    if dtype == torch.float64:
        x, y = x / 3, y / 7
    out = torch.zeros(512, dtype=dtype)
    launch(binary_kernel, (1,), x, y, out, OP=operation, BLOCK=512)
    exact = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}[operation]
    pairs = zip(x.double().tolist(), y.double().tolist(), strict=True)
    assert out.double().tolist() == [nearest(exact(Fraction(a), Fraction(b)), dtype) for a, b in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float_remainder_is_exact(dtype: torch.dtype) -> None:
    numbers = [v for v in SPECIAL if v] + [1e-300 if dtype == torch.float64 else 1e-40, 3.4e38, 7.0]
    pairs = list(itertools.product(numbers, repeat=2))
    pairs += [(1.0, 1.0)] * (256 - len(pairs))
    x, y = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    out = torch.zeros(256, dtype=dtype)
    launch(binary_kernel, (1,), x, y, out, OP="%", BLOCK=256)
    with np.errstate(invalid="ignore"):
        assert_same(out, np.fmod(x.numpy(), y.numpy()))


@triton.jit
def rounded_kernel(x_ptr, y_ptr, z_ptr, fma_ptr, root_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    tl.store(fma_ptr + offsets, tl.fma(x, y, z))
    tl.store(root_ptr + offsets, tl.sqrt(tl.abs(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fma_and_root_round_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y, z = (torch.randn(1024, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    z[::2] = (-x * y)[::2]  # leaves the rounding of the product
    z[1::8] *= torch.finfo(dtype).eps
    y[3::8] *= 1e-30
    x[0] = y[0] = 1 + 2.0**-12  # in f32 the product lies half way between two numbers, and the sum just above
    z[0] = 2.0**-80
    fma, root = torch.zeros_like(x), torch.zeros_like(x)
    launch(rounded_kernel, (1,), x, y, z, fma, root, BLOCK=1024)
    triples = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    assert fma.tolist() == [nearest(Fraction(a) * Fraction(b) + Fraction(c), dtype) for a, b, c in triples]
    for value, found in zip(x.abs().tolist(), root.tolist(), strict=True):
        # The nearest one: the square of neither middle to a neighbour lies between.
        below, above = (float(np.nextafter(root.numpy().dtype.type(found), side)) for side in (-np.inf, np.inf))
        low, high = ((Fraction(found) + Fraction(side)) / 2 for side in (below, above))
        assert low**2 <= Fraction(value) <= high**2


def test_fma_at_the_ends_of_f64() -> None:
    big, inf, nan = 1e300, math.inf, math.nan
    cases = [
        *[(big, big, 1.0, inf), (big, -big, 1.0, -inf), (big, big, -inf, -inf), (big, 1e9, -inf, -inf)],
        *[(inf, 0.0, 1.0, nan), (inf, 1.0, -inf, nan), (nan, 1.0, 1.0, nan), (1.0, 2.0, nan, nan)],
        *[(1e-200, 1e-200, 0.0, 0.0), (1e-200, -1e-200, 5e-324, 5e-324), (2.0, -3.0, 6.0, 0.0), (0.0, -1.0, 4.0, 4.0)],
        *[(2.0**600, 2.0**500, -(2.0**1023), inf), (2.0**512, 2.0**511, -(2.0**1023), 0.0), (inf, 2.0, 1.0, inf)],
        (2.0**512, 2.0**512, -(2.0**1023), 2.0**1023),  # the product alone overflows
    ]
    x, y, z, expected = (torch.tensor(column, dtype=torch.float64) for column in zip(*cases, strict=True))
    fma, root = torch.zeros_like(x), torch.zeros_like(x)
    launch(rounded_kernel, (1,), x, y, z, fma, root, BLOCK=16)
    assert_same(fma, expected)


PREDICATES = (
    *("false", "oeq", "ogt", "oge", "olt", "ole", "one", "ord"),
    *("ueq", "ugt", "uge", "ult", "ule", "une", "uno", "true"),
)


@pytest.mark.parametrize("name", PREDICATES)
def test_float_comparisons(name: str) -> None:
    pairs = list(itertools.product([0.0, -0.0, 1.0, -2.0, math.inf, -math.inf, math.nan, 5.0], repeat=2))
    x, y = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    attributes = f"<{{predicate = {PREDICATES.index(name)} : i64}}>"
    got = elementwise("arith.cmpf", attributes, [x, y], torch.zeros(64, dtype=torch.bool))

    def expected(a: float, b: float) -> bool:
        if math.isnan(a) or math.isnan(b):
            return name.startswith("u") or name == "true"
        ordered = {"eq": a == b, "gt": a > b, "ge": a >= b, "lt": a < b, "le": a <= b, "ne": a != b}
        return {"false": False, "true": True, "ord": True, "uno": False}.get(name, ordered.get(name[1:], False))

    assert got.tolist() == [expected(a, b) for a, b in pairs]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["maxnumf", "minnumf", "maximumf", "minimumf"])
def test_nan_in_minimum_and_maximum(name: str, dtype: torch.dtype) -> None:
    pairs = list(itertools.product([0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 5.0, -7.0], repeat=2))
    x, y = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    if dtype == torch.float32:  # a signalling NaN is one like any other
        x.view(torch.int32)[x.isnan()] = 0x7F800001
    got = elementwise(f"arith.{name}", "", [x, y], torch.zeros(64, dtype=dtype))
    pick = max if name.startswith("max") else min
    expected = []
    for a, b in pairs:
        known = [v for v in (a, b) if not math.isnan(v)]
        expected.append(math.nan if not known or ("num" not in name and len(known) < 2) else pick(known))
    assert_same(got, torch.tensor(expected, dtype=dtype))


@triton.jit
def clamp_kernel(x_ptr, out_ptr, low, high, NAN: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mode: tl.constexpr = tl.PropagateNan.ALL if NAN else tl.PropagateNan.NONE
    tl.store(out_ptr + offsets, tl.clamp(tl.load(x_ptr + offsets), low, high, propagate_nan=mode))


@pytest.mark.parametrize("propagate", [False, True])
def test_clamp(propagate: bool) -> None:
    x = torch.tensor([-math.inf, -3.0, -1.0, 0.5, 2.0, 7.0, math.inf, math.nan])
    out = torch.zeros(8)
    launch(clamp_kernel, (1,), x, out, -1.0, 2.0, NAN=propagate, BLOCK=8)
    assert_same(out, [-1.0, -1.0, -1.0, 0.5, 2.0, 2.0, 2.0, math.nan if propagate else -1.0])


MATH = {
    "exp": math.exp, "exp2": lambda v: 2.0**v, "log": math.log, "log2": math.log2, "sin": math.sin, "cos": math.cos,
    "erf": math.erf, "rsqrt": lambda v: 1 / math.sqrt(v), "tanh": math.tanh, "atan": math.atan, "log1p": math.log1p,
    "floor": math.floor, "ceil": math.ceil, "absf": abs,
    "round": lambda v: math.floor(abs(v) + 0.5), "roundeven": round,
}  # fmt: skip


@pytest.mark.parametrize("name", MATH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_functions_are_rounded_from_f64(name: str, dtype: torch.dtype) -> None:
    """Which gives the nearest number, unless that is a coin's toss in f64."""
    generator = torch.Generator().manual_seed(4)
    x = (torch.rand(256, generator=generator) * 10 + 0.01).to(dtype)
    got = elementwise(f"math.{name}", "", [x], torch.zeros(256, dtype=dtype))
    expected = [nearest(Fraction(float(MATH[name](v))), dtype) for v in x.double().tolist()]
    assert got.double().tolist() == expected


def test_library_functions_are_those_of_native_code() -> None:
    assert set(NATIVE) <= set(LIBRARY)


def call(symbol: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    attributes = f'<{{libname = "", libpath = "", pure = true, symbol = "{symbol}"}}>'
    return elementwise("tt.extern_elementwise", attributes, [x], output)


@pytest.mark.parametrize(
    ("symbol", "numbers", "expected"),
    [
        ("__nv_round", [-2.5, -0.5, -0.2, 0.5, 1.4999, 2.5], [-3.0, -1.0, -0.0, 1.0, 1.0, 3.0]),
        ("__nv_cbrt", [-27.0, 8.0, 0.0, 1e-300, math.inf], [-3.0, 2.0, 0.0, 1e-100, math.inf]),
        ("__nv_tgamma", [5.0, 0.5, -1.0, 0.0, 200.0], [24.0, math.sqrt(math.pi), math.nan, math.inf, math.inf]),
        ("__nv_exp10", [3.0, -2.0], [1000.0, 0.01]),
        ("__nv_saturatef", [-1.0, 0.25, 3.0, math.nan], [0.0, 0.25, 1.0, 0.0]),
        ("__nv_isnand", [1.0, math.nan, math.inf], [0, 1, 0]),
        ("__nv_isinfd", [1.0, math.nan, -math.inf], [0, 0, 1]),
        ("__nv_signbitd", [1.0, -0.0, -math.inf], [0, 1, 1]),
        ("__nv_llrint", [0.5, 1.5, -2.5], [0, 2, -2]),
        ("__nv_llround", [0.5, 1.5, -2.5], [1, 2, -3]),
        ("__nv_popc", [0, -1, 0x10101], [0, 32, 3]),
        ("__nv_clz", [0, 1, -1, 0x00FF0000], [32, 31, 0, 8]),
        ("__nv_ffs", [0, 1, -(2**31), 12], [0, 1, 32, 3]),
        ("__nv_clzll", [0, 1, 2**40], [64, 63, 23]),
        ("__nv_abs", [-5, 5, -(2**31)], [5, 5, -(2**31)]),
    ],
)
def test_library_functions(symbol: str, numbers: list[float], expected: list[float]) -> None:
    counted = torch.int64 if symbol.endswith("ll") else torch.int32
    x = torch.tensor(numbers, dtype=torch.float64 if isinstance(numbers[0], float) else counted)
    whole = torch.int64 if symbol.startswith("__nv_ll") else torch.int32
    output = torch.zeros(len(x), dtype=whole if isinstance(expected[0], int) else torch.float64)
    assert_same(call(symbol, x, output), torch.tensor(expected, dtype=output.dtype))
