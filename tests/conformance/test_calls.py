"""Functions that kernels call: inlined, outlined, recursive, as constants, with returns from their branches."""

import pytest
import torch
import triton
import triton.language as tl

from .harness import DEVICE, DTYPES, assert_equal, random


def numbers(n, seed=0):
    return (random(DTYPES["int32"], n, seed) % 1000).abs()


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@triton.jit
def square(x):
    return x * x


@triton.jit
def divide(a, b):
    return a // b, a % b


@triton.jit
def put(pointer, value, offset: tl.constexpr = 0):
    tl.store(pointer + offset, value)


@triton.jit
def calls(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    quotient, rest = divide(square(x) + 1, 7)
    put(out_ptr + i, quotient)
    put(out_ptr + i, rest, offset=BLOCK)
    put(out_ptr + 2 * BLOCK + i, divide(b=3, a=x)[1])
    put(out_ptr + 3 * BLOCK + i, square(square(x % 10)))


def test_calls():
    x, out = numbers(16), zeros(4, 16)
    calls[(1,)](x, out, BLOCK=16)
    squares = x * x + 1
    assert_equal(out, torch.stack([squares // 7, squares % 7, x % 3, (x % 10) ** 4]))


@triton.jit(noinline=True)
def outlined_square(x):
    return x * x


@triton.jit(noinline=True)
def outlined_pair(a, b, pointer):
    low = tl.minimum(a, b)
    return low * tl.load(pointer), (a + b).to(tl.int64) << 33


@triton.jit(noinline=True)
def outlined_put(pointer, value):
    tl.store(pointer, value)


@triton.jit(noinline=True)
def outlined_choice(a, b):
    if a > b:
        return a * 2
    return b * 3


@triton.jit
def outlined_calls(x_ptr, y_ptr, out_ptr, wide_ptr):
    row = tl.program_id(0)
    x, y = tl.load(x_ptr + row), tl.load(y_ptr + row)
    low, total = outlined_pair(outlined_square(x), y, x_ptr)
    outlined_put(out_ptr + 3 * row, low)
    outlined_put(out_ptr + 3 * row + 1, outlined_square(low))
    outlined_put(wide_ptr + row, total)
    tl.store(out_ptr + 3 * row + 2, outlined_choice(x, y) - outlined_choice(y, x))


def test_calls_that_are_not_inlined():
    # Such functions take and return scalars alone.
    x, y = numbers(16, 0) % 30, numbers(16, 1)
    x[0] = 3
    out, wide = zeros(16, 3), zeros(16, dtype=torch.int64)
    outlined_calls[(16,)](x, y, out, wide)
    low = torch.minimum(x * x, y) * 3
    choice = torch.where(x > y, x * 2, y * 3) - torch.where(y > x, y * 2, x * 3)
    assert_equal(out, torch.stack([low, low * low, choice], dim=1))
    assert_equal(wide, (x * x + y).long() << 33)


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    if EXPONENT == 0:
        return x * 0 + 1
    else:  # what follows a constant branch would be compiled too, and recur without end
        return power(x, EXPONENT - 1) * x


@triton.jit
def powers(x_ptr, out_ptr, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, power(tl.load(x_ptr + i), EXPONENT))


@pytest.mark.parametrize("exponent", [0, 1, 5])
def test_recursion_over_a_constant(exponent):
    x, out = numbers(16) % 20, zeros(16)
    powers[(1,)](x, out, EXPONENT=exponent, BLOCK=16)
    assert_equal(out, x**exponent)


@triton.jit
def apply(x, FUNCTION: tl.constexpr):
    return FUNCTION(x) + 1


@triton.jit
def negate(x):
    return -x


@triton.jit
def functions_as_constants(x_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, apply(tl.load(x_ptr + i), FUNCTION))


@pytest.mark.parametrize("function", [square, negate], ids=["square", "negate"])
def test_functions_as_constants(function):
    x, out = numbers(16), zeros(16)
    functions_as_constants[(1,)](x, out, FUNCTION=function, BLOCK=16)
    assert_equal(out, (x * x if function is square else -x) + 1)


@triton.jit
def returns_from_branches(x, y, limit):
    if limit > 10:
        return x + y
    elif limit > 5:
        return x - y
    return x * y


@triton.jit
def choose_by_call(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + i, returns_from_branches(tl.load(x_ptr + i), tl.load(y_ptr + i), row * 4))


def test_functions_return_from_their_branches():
    x, y, out = numbers(16, 0), numbers(16, 1), zeros(4, 16)
    choose_by_call[(4,)](x, y, out, BLOCK=16)
    assert_equal(out, torch.stack([x * y, x * y, x - y, x + y]))
