"""What ``libdevice`` has beyond the common functions: directed rounding, conversions, integers, special functions.

Whatever is exact is compared with rational arithmetic, the rest with decimal arithmetic of fifty digits, within the
largest errors that the CUDA programming guide gives.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from conformance.harness import (
    DEVICE,
    DTYPES,
    Dtype,
    assert_equal,
    edge_values,
    gpu_differs,
    interpreter_gap,
    random,
    random_bits,
)

pytestmark = [interpreter_gap("has no libdevice"), gpu_differs("float32 functions flush denormals")]
BLOCK = 1024
FLOAT32, FLOAT64 = DTYPES["float32"], DTYPES["float64"]
FLOATING = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)


@triton.jit
def kernel_of_one(x_ptr, out_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, getattr(libdevice, NAME)(tl.load(x_ptr + i, i < n)), i < n)


@triton.jit
def kernel_of_two(x_ptr, y_ptr, out_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, getattr(libdevice, NAME)(tl.load(x_ptr + i, i < n), tl.load(y_ptr + i, i < n)), i < n)


@triton.jit
def kernel_of_three(x_ptr, y_ptr, z_ptr, out_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + i, i < n), tl.load(y_ptr + i, i < n), tl.load(z_ptr + i, i < n)
    tl.store(out_ptr + i, getattr(libdevice, NAME)(x, y, z), i < n)


@triton.jit
def kernel_of_four(x_ptr, y_ptr, z_ptr, w_ptr, out_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z, w = (
        tl.load(x_ptr + i, i < n),
        tl.load(y_ptr + i, i < n),
        tl.load(z_ptr + i, i < n),
        tl.load(w_ptr + i, i < n),
    )
    tl.store(out_ptr + i, getattr(libdevice, NAME)(x, y, z, w), i < n)


def launch(name: str, *inputs: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    count = len(inputs[0])
    out = torch.empty(count, dtype=dtype or inputs[0].dtype, device=DEVICE)
    kernel = (kernel_of_one, kernel_of_two, kernel_of_three, kernel_of_four)[len(inputs) - 1]
    kernel[(triton.cdiv(count, BLOCK),)](*(i.to(DEVICE) for i in inputs), out, count, NAME=name, BLOCK=BLOCK)
    return out


def shuffled(x: torch.Tensor, seed: int) -> torch.Tensor:
    return x[torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))]


def arguments(dtype: Dtype, count: int = 1) -> list[torch.Tensor]:
    """Edges, ordinary numbers, and numbers of every magnitude; later arguments shuffled, or in part near the first."""
    edges, plain = edge_values(dtype, "cpu"), random(dtype, 300, 1, "cpu")
    first = torch.cat([edges, edges, plain, plain * 100, random_bits(dtype, 300, 3, "cpu")])
    others = [shuffled(first, seed) for seed in range(1, count)]
    for k, other in enumerate(others):
        other[: len(edges)] = first[: len(edges)] * (-1 if k else 1)
    return [first, *others]


# Directed rounding

MODES = {"rn": None, "rz": 0, "rd": -1, "ru": 1}
EXACT = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "div": (2, lambda a, b: a / b),
    "rcp": (1, lambda a: 1 / a),
    "fma": (3, lambda a, b, c: a * b + c),
}


def neighbours(exact: Fraction, dtype: Dtype) -> tuple[float, float]:
    """The floats below and above, or twice the number itself."""
    if abs(exact) > Fraction(dtype.max):
        ends = (float(dtype.max), math.inf)
        return ends if exact > 0 else (-ends[1], -ends[0])
    kind = np.dtype(str(dtype)).type
    near = kind(float(exact))  # nearly
    while Fraction(float(near)) > exact:
        near = np.nextafter(near, kind(-np.inf))
    while np.isfinite(above := np.nextafter(near, kind(np.inf))) and Fraction(float(above)) <= exact:
        near = above
    low = float(near)
    return low, low if Fraction(low) == exact else float(above)


def directed(exact: Fraction, mode: int | None, dtype: Dtype) -> float:
    low, high = neighbours(exact, dtype)
    if mode is None:
        if abs(exact) >= Fraction(dtype.max) + Fraction(2) ** (math.frexp(dtype.max)[1] - dtype.mantissa - 2):
            found = math.inf if exact > 0 else -math.inf
        elif math.isinf(low) or math.isinf(high):
            found = high if math.isinf(low) else low
        elif exact - Fraction(low) == Fraction(high) - exact != 0:
            even = lambda v: np.array(v, str(dtype)).view(f"i{dtype.bits // 8}") % 2 == 0  # noqa: E731
            found = low if even(low) else high
        else:
            found = low if exact - Fraction(low) < Fraction(high) - exact else high
    else:
        found = low if mode < 0 or (mode == 0 and exact > 0) else high
    return math.copysign(found, 1 if exact > 0 else -1) if exact else found


def expected_of(name: str, mode: int | None, dtype: Dtype, inputs: list[torch.Tensor]) -> np.ndarray:
    found = []
    function = EXACT[name][1]
    arrays = [x.numpy() for x in inputs]
    with np.errstate(all="ignore"):
        plain = function(*(arrays if name != "fma" else [a.astype(np.float64) for a in arrays]))
        product = np.copysign(1, arrays[0]) * np.copysign(1, arrays[-1 if name != "fma" else 1])
    for k, numbers in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
        divisor = {"div": -1, "rcp": 0}.get(name)
        if not all(map(math.isfinite, numbers)) or (divisor is not None and numbers[divisor] == 0):
            value = float(plain[k])
            if name == "fma" and math.isinf(numbers[2]) and all(map(math.isfinite, numbers[:2])):
                value = numbers[2]  # the product may overflow in float64
            found.append(value)
            continue
        exact = function(*map(Fraction, numbers))
        if exact:
            found.append(directed(exact, mode, dtype))
        elif name in ("add", "sub", "fma"):
            signs = [math.copysign(1, numbers[0]), math.copysign(1, numbers[-1])]
            signs[0] = float(product[k]) if name == "fma" else signs[0]
            signs[1] *= -1 if name == "sub" else 1
            zero = all(x == 0 for x in numbers) or (name == "fma" and 0 in numbers[:2] and numbers[2] == 0)
            negative = signs == [-1, -1] if mode != -1 else signs != [1, 1]
            found.append(-0.0 if (negative and (zero or mode == -1)) else 0.0)
        else:
            found.append(math.copysign(0.0, float(product[k]) if name != "rcp" else numbers[0]))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(found, dtype=np.float64).astype(str(dtype))


@FLOATING
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EXACT)
def test_operation_rounds_in_its_direction(name: str, mode: str, dtype: Dtype) -> None:
    inputs = arguments(dtype, EXACT[name][0])
    expected = expected_of(name, MODES[mode], dtype, inputs)
    assert_equal(launch(f"{name}_{mode}", *inputs), expected, *inputs)


@FLOATING
@pytest.mark.parametrize("mode", MODES)
def test_sums_of_close_operands_round_in_their_direction(mode: str, dtype: Dtype) -> None:
    """Where products are cancelled up to their last bits, and where one operand is negligible."""
    x = random(dtype, 400, 1, "cpu")
    y = random(dtype, 400, 2, "cpu")
    scale = torch.from_numpy(np.random.default_rng(4).integers(-120, 120, 400)).to(torch.float64)
    z = torch.cat([-(x * y)[:200], (x * y * torch.exp2(scale))[200:].to(dtype.torch)])
    for name, inputs in (("fma", [x, y, z]), ("add", [x, z]), ("sub", [z, x])):
        assert_equal(launch(f"{name}_{mode}", *inputs), expected_of(name, MODES[mode], dtype, inputs), *inputs)


@FLOATING
@pytest.mark.parametrize("mode", MODES)
def test_root_rounds_in_its_direction(mode: str, dtype: Dtype) -> None:
    plain = random(dtype, 300, 2, "cpu").abs()
    x = torch.cat([arguments(dtype)[0], plain * plain])
    with np.errstate(all="ignore"):
        near = np.sqrt(x.numpy())
    expected = []
    for value, root in zip(x.tolist(), near, strict=True):
        if MODES[mode] is None or not value > 0 or math.isinf(value):
            expected.append(root)
            continue
        error = Fraction(value) - Fraction(float(root)) ** 2
        towards = {True: np.inf, False: -np.inf}
        step = (error > 0 and MODES[mode] > 0) or (error < 0 and MODES[mode] <= 0)
        expected.append(np.nextafter(root, root.dtype.type(towards[error > 0])) if step else root)
    assert_equal(launch(f"sqrt_{mode}", x), np.array(expected, dtype=str(dtype)), x)


def test_reciprocal_root_is_the_nearest() -> None:
    x = arguments(FLOAT32)[0]
    with np.errstate(all="ignore"):
        expected = (1 / np.sqrt(x.numpy().astype(np.longdouble))).astype(np.float32)
    assert_equal(launch("rsqrt_rn", x), expected, x)


@triton.jit
def product_and_sum_kernel(x_ptr, y_ptr, z_ptr, product_ptr, sum_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(product_ptr + i, libdevice.mul_rn(x, y) + z)
    tl.store(sum_ptr + i, libdevice.add_rn(x * y, z))


@FLOATING
def test_products_and_sums_are_rounded_by_themselves(dtype: Dtype) -> None:
    x, y = random(dtype, BLOCK, 1, "cpu"), random(dtype, BLOCK, 2, "cpu")
    z = -(x * y)  # a fused operation would leave what the product's rounding lost
    outputs = [torch.empty(BLOCK, dtype=dtype.torch, device=DEVICE) for _ in range(2)]
    product_and_sum_kernel[(1,)](x.to(DEVICE), y.to(DEVICE), z.to(DEVICE), *outputs, BLOCK=BLOCK)
    for out in outputs:
        assert_equal(out, torch.zeros_like(x), x, y)


# Conversions

WHOLE = {"rn": np.rint, "rz": np.trunc, "rd": np.floor, "ru": np.ceil}
TARGETS = {"int": (32, True), "uint": (32, False), "ll": (64, True), "ull": (64, False)}


@pytest.mark.parametrize("mode", WHOLE)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("source", "dtype"), [("float", FLOAT32), ("double", FLOAT64)])
def test_floats_become_integers(source: str, dtype: Dtype, target: str, mode: str) -> None:
    width, is_signed = TARGETS[target]
    ends = torch.tensor([2.0**k for k in range(30, 66)], dtype=dtype.torch)
    near = [ends, torch.nextafter(ends, ends * 0), torch.nextafter(ends, ends * 2), ends - 0.5]
    x = torch.cat([arguments(dtype)[0], *near, *(-e for e in near)])
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if is_signed else (0, 2**width - 1)
    nan = 0 if dtype is FLOAT32 and width == 32 else 2 ** (width - 1)  # as PTX says
    with np.errstate(invalid="ignore"):
        whole = WHOLE[mode](x.numpy()).tolist()
    values = [nan if math.isnan(v) else int(min(max(v, low), high)) for v in whole]
    unsigned = np.array([v % 2**width for v in values], dtype=f"u{width // 8}")
    out = getattr(torch, f"int{width}")
    assert_equal(launch(f"{source}2{target}_{mode}", x, dtype=out), unsigned.view(f"i{width // 8}"), x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ["float", "double"])
@pytest.mark.parametrize("source", TARGETS)
def test_integers_become_floats(source: str, target: str, mode: str) -> None:
    width, is_signed = TARGETS[source]
    if target == "double" and width == 32 and mode != "rn":
        pytest.skip("exact in every direction, so libdevice has one")
    dtype = FLOAT32 if target == "float" else FLOAT64
    kind = DTYPES[f"{'' if is_signed else 'u'}int{width}"]
    x = torch.cat([edge_values(kind, "cpu"), random_bits(kind, 300, 1, "cpu")])
    expected = np.array([directed(Fraction(v), MODES[mode], dtype) for v in x.tolist()]).astype(str(dtype))
    assert_equal(launch(f"{source}2{target}_{mode}", x, dtype=dtype.torch), expected, x)


@pytest.mark.parametrize("mode", MODES)
def test_doubles_become_floats(mode: str) -> None:
    x = torch.cat([arguments(FLOAT64)[0], arguments(FLOAT32)[0].double() * (1 + 2**-30)])
    expected = [directed(Fraction(v), MODES[mode], FLOAT32) if math.isfinite(v) and v else v for v in x.tolist()]
    expected = np.array(expected).astype(np.float32)
    assert_equal(launch(f"double2float_{mode}", x, dtype=torch.float32), expected, x)


def test_halves_of_doubles() -> None:
    x = arguments(FLOAT64)[0]
    patterns = x.numpy().view(np.uint64)
    low, high = (
        (patterns & 0xFFFFFFFF).astype(np.uint32).view(np.int32),
        (patterns >> 32).astype(np.uint32).view(np.int32),
    )
    assert_equal(launch("double2loint", x, dtype=torch.int32), low, x)
    assert_equal(launch("double2hiint", x, dtype=torch.int32), high, x)
    halves = torch.from_numpy(high), torch.from_numpy(low)
    assert_equal(launch("hiloint2double", *halves, dtype=torch.float64).view(torch.int64), x.view(torch.int64))


# Integers


def signed_24(x: int) -> int:
    return (x + 2**23) % 2**24 - 2**23


def permuted(x: int, y: int, s: int) -> int:
    data = (x % 2**32).to_bytes(4, "little") + (y % 2**32).to_bytes(4, "little")
    return int.from_bytes(bytes(data[(s >> 4 * k) & 7] for k in range(4)), "little")


INTEGER = [
    ("brev", "int32", 1, lambda x: int(f"{x % 2**32:032b}"[::-1], 2)),
    ("brev", "int64", 1, lambda x: int(f"{x % 2**64:064b}"[::-1], 2)),
    ("byte_perm", "int32", 3, permuted),
    ("mul24", "int32", 2, lambda x, y: signed_24(x) * signed_24(y)),
    ("mul24", "uint32", 2, lambda x, y: x % 2**24 * (y % 2**24)),
    ("sad", "uint32", 3, lambda x, y, z: abs(x - y) + z),
    ("hadd", "int32", 2, lambda x, y: (x + y) // 2),
    ("hadd", "uint32", 2, lambda x, y: (x + y) // 2),
    ("rhadd", "int32", 2, lambda x, y: (x + y + 1) // 2),
    ("rhadd", "uint32", 2, lambda x, y: (x + y + 1) // 2),
]


@pytest.mark.parametrize(("name", "type_name", "count", "function"), INTEGER)
def test_integer_function(name: str, type_name: str, count: int, function) -> None:
    kind = DTYPES[type_name]
    x = torch.cat([edge_values(kind, "cpu"), random_bits(kind, 300, 1, "cpu")])
    inputs = [x, *(shuffled(x, seed) for seed in range(1, count))]
    out = DTYPES["int32"] if name == "sad" else kind  # Triton's declaration, also without sign
    values = [function(*v) % 2**kind.bits for v in zip(*(i.tolist() for i in inputs), strict=True)]
    expected = np.array(values, dtype=f"u{kind.bits // 8}").view(str(out))
    assert_equal(launch(name, *inputs, dtype=out.torch), expected, *inputs)


def test_distance_of_signed_integers() -> None:
    kind = DTYPES["int32"]
    x = torch.cat([edge_values(kind, "cpu"), random_bits(kind, 300, 1, "cpu")])
    y, z = shuffled(x, 1), random_bits(DTYPES["uint32"], len(x), 2, "cpu")
    values = [(abs(a - b) + c) % 2**32 for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)]
    assert_equal(launch("sad", x, y, z), np.array(values, dtype=np.uint32).view(np.int32), x, y, z)


# Exponents and neighbours


@FLOATING
def test_exponents(dtype: Dtype) -> None:
    x = arguments(dtype)[0]
    with np.errstate(all="ignore"):
        whole = np.frexp(x.numpy())[1] - 1
        special = np.where(x.numpy() == 0, -np.inf, np.abs(x.numpy()))
    is_special = (x.numpy() == 0) | ~np.isfinite(x.numpy())
    expected = np.where(is_special, special, whole).astype(str(dtype))
    assert_equal(launch("logb", x), expected, x)
    limits = np.where(np.isposinf(special), 2**31 - 1, -(2**31))
    assert_equal(launch("ilogb", x, dtype=torch.int32), np.where(is_special, limits, whole).astype(np.int32), x)


@FLOATING
@pytest.mark.parametrize("name", ["ldexp", "scalbn"])
def test_scaling_by_powers(name: str, dtype: Dtype) -> None:
    x = torch.cat([arguments(dtype)[0]] * 3)
    n = torch.from_numpy(np.random.default_rng(1).integers(-2200, 2200, len(x)).astype(np.int32))
    n[::3] //= 16
    n[:4] = torch.tensor([2**31 - 1, -(2**31), 5000, -5000])
    with np.errstate(all="ignore"):
        expected = np.ldexp(x.numpy(), n.numpy())
    assert_equal(launch(name, x, n), expected, x)


@FLOATING
def test_next_number(dtype: Dtype) -> None:
    x, y = arguments(dtype, 2)
    with np.errstate(all="ignore"):
        expected = np.nextafter(x.numpy(), y.numpy())
    assert_equal(launch("nextafter", x, y), expected, x, y)
