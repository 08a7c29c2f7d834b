"""Arguments of every kind, constants of every size, and arithmetic on the program's own indices."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from conformance.harness import DEVICE, DTYPES, assert_equal, interpreter_gap


@triton.jit
def program_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(axis=2)
    flat = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out_ptr + flat * 4, x * 100 - y)
    tl.store(out_ptr + flat * 4 + 1, (x + y * 7) // 3 % 4)
    tl.store(out_ptr + flat * 4 + 2, (x - 2) // 2)  # truncates
    tl.store(out_ptr + flat * 4 + 3, tl.num_programs(2) * 10 + z)


@pytest.mark.parametrize("grid", [(1,), (5,), (4, 3), (2, 3, 5), (1, 1, 7)], ids=str)
def test_program_ids(grid: tuple[int, ...]) -> None:
    width, height, depth = (*grid, 1, 1)[:3]
    out = torch.full((depth, height, width, 4), -1, dtype=torch.int32, device=DEVICE)
    program_kernel[grid](out)
    z, y, x = np.meshgrid(np.arange(depth), np.arange(height), np.arange(width), indexing="ij")
    columns = [x * 100 - y, (x + y * 7) // 3 % 4, np.trunc((x - 2) / 2), np.full_like(z, depth * 10) + z]
    assert_equal(out, np.stack(columns, -1).astype(np.int32))


@triton.jit
def scalar_kernel(out_ptr, x, y):
    tl.store(out_ptr, x)
    tl.store(out_ptr + 1, x + y)
    tl.store(out_ptr + 2, x * y)
    tl.store(out_ptr + 3, x - y)


@pytest.mark.parametrize("y", [0, 1, 2, 16, 17, -16], ids=str)
@pytest.mark.parametrize("x", [0, 1, 16, 48, -1, 2**31 - 1, 2**31, 2**32 + 5, -(2**40), 2**62 + 16], ids=str)
def test_integer_arguments(x: int, y: int) -> None:
    """int32 when it fits, else int64 (uint32 is not made from 2 ** 31); 1 and multiples of 16 are specialised."""
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    scalar_kernel[(1,)](out, x, y)
    size = 32 if -(2**31) <= x < 2**31 else 64
    wrap = [(v + 2 ** (size - 1)) % 2**size - 2 ** (size - 1) for v in (x, x + y, x * y, x - y)]
    assert out.tolist() == wrap


@pytest.mark.parametrize("x", [2**63, 2**64 - 1], ids=str)
def test_unsigned_arguments(x: int) -> None:
    out = torch.zeros(4, dtype=torch.uint64, device=DEVICE)
    scalar_kernel[(1,)](out, x, 3)
    assert_equal(out, np.array([v % 2**64 for v in (x, x + 3, x * 3, x - 3)], dtype=np.uint64))


@triton.jit
def float_kernel(out_ptr, x, SCALE: tl.constexpr):
    tl.store(out_ptr, x)
    tl.store(out_ptr + 1, x * SCALE)


PYTHON_FLOAT = interpreter_gap("multiplies Python floats before rounding them, and loses the sign of zero")


@pytest.mark.parametrize(
    "x",
    [
        *[pytest.param(0.1, marks=PYTHON_FLOAT), pytest.param(-0.0, marks=PYTHON_FLOAT)],
        *[1e-45, 3.4e38, float("inf"), float("nan"), 1.0],
    ],
)
def test_float_arguments_are_float32(x: float) -> None:
    out = torch.zeros(2, dtype=torch.float32, device=DEVICE)
    float_kernel[(1,)](out, x, SCALE=0.3)
    assert_equal(out, np.array([x, np.float32(x) * np.float32(0.3)], dtype=np.float32))


def test_float_arguments_lose_the_bits_past_float32() -> None:
    out = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    float_kernel[(1,)](out, 0.1, SCALE=1.0)
    assert_equal(out, np.full(2, np.float32(0.1)).astype(np.float64))


@triton.jit
def flag_kernel(x_ptr, bias_ptr, out_ptr, flag, SHAPE: tl.constexpr, NAME: tl.constexpr):
    offsets = tl.arange(0, SHAPE[0])[:, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :]
    x = tl.load(x_ptr + offsets)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offsets)
    if flag:
        x = -x
    if NAME == "double":
        x *= 2
    tl.store(out_ptr + offsets, x)


@pytest.mark.parametrize("name", ["double", "plain"])
@pytest.mark.parametrize(
    "flag", [0, 1, 2, *[pytest.param(f, marks=interpreter_gap("has no bool arguments")) for f in (True, False)]]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_flags_none_tuples_and_strings(with_bias: bool, flag: int, name: str) -> None:
    x = torch.arange(32, dtype=torch.int32, device=DEVICE).reshape(4, 8)
    bias = x * x if with_bias else None
    out = torch.zeros_like(x)
    flag_kernel[(1,)](x, bias, out, flag, SHAPE=(4, 8), NAME=name)
    expected = x + x * x if with_bias else x
    assert_equal(out, (-expected if flag else expected) * (2 if name == "double" else 1))


@triton.jit
def tuple_kernel(pointers, sizes, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    first = tl.load(pointers[0] + offsets, offsets < sizes[0], other=7)
    second = tl.load(pointers[1] + offsets, offsets < sizes[1], other=0.5)
    tl.store(out_ptr + offsets, first + second)


@pytest.mark.parametrize("sizes", [(1, 16), (5, 1), (16, 3)], ids=str)
def test_tuple_arguments(sizes: tuple[int, int]) -> None:
    x, y = torch.arange(16, dtype=torch.int32), torch.arange(16) / 4
    out = torch.zeros(16, device=DEVICE)
    tuple_kernel[(1,)]((x.to(DEVICE), y.to(DEVICE)), sizes, out, BLOCK=16)
    k = torch.arange(16)
    assert_equal(out, torch.where(k < sizes[0], x, 7) + torch.where(k < sizes[1], y, 0.5))


@triton.jit
def constant_kernel(x_ptr, out_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x + C)
    tl.store(out_ptr + BLOCK + offsets, C - x)
    tl.store(out_ptr + 2 * BLOCK + offsets, x * C)


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        *[("int64", 2**31), ("int64", 2**32 + 1), ("int64", 2**63 - 1), ("int64", -(2**63)), ("uint64", 2**64 - 1)],
        *[("uint64", 2**63), ("uint32", 2**32 - 1), ("uint32", 2**31), ("int32", -(2**31)), ("int8", -128)],
        *[("uint8", 255), ("int16", 32767), ("float16", 0.1), ("float32", 0.1), ("float64", 0.1), ("float64", 1e300)],
        *[("float64", 5e-324), ("float32", float("inf")), ("float32", float("nan")), ("float32", 2**31 + 1)],
        *[("float32", 16777217), ("float64", 2**53 + 1), ("float16", 70000.0)],
    ],
    ids=str,
)
def test_constants(name: str, constant: float) -> None:
    """A constant of no higher kind takes the dtype of the tensor, in one rounding."""
    dtype = DTYPES[name]
    x = np.array([0, 1, 2, 3, 5, 7, 100, 101], dtype=name)
    out = torch.empty(3, 8, dtype=dtype.torch, device=DEVICE)
    constant_kernel[(1,)](torch.from_numpy(x).to(DEVICE), out, C=constant, BLOCK=8)
    with np.errstate(all="ignore"):
        c = np.array(constant).astype(name)
        assert_equal(out, np.stack([x + c, c - x, x * c]))


@triton.jit
def full_kernel(out_ptr, VALUE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.full((BLOCK,), VALUE, DTYPE))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("int64", 2**62 + 1), ("int64", -(2**63)), ("uint64", 2**64 - 1), ("int8", -128), ("uint16", 65535)],
        *[("float64", 1e-310), ("float64", 0.1), ("float32", 0.1), ("float32", float("-inf"))],
        *[("float16", 1 / 3), ("float16", 6e-8), ("bool", True)],
    ],
    ids=str,
)
def test_full(name: str, value: float) -> None:
    out = torch.zeros(16, dtype=DTYPES[name].torch, device=DEVICE)
    full_kernel[(1,)](out, VALUE=value, DTYPE=DTYPES[name].triton, BLOCK=16)
    assert_equal(out, np.full(16, value, dtype=name))
