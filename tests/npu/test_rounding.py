"""The numbers that a device calculates with, against all of dlfloat16's patterns, one by one."""

import math
from functools import lru_cache

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tilewright.errors import UnknownNameError
from tilewright.npu.rounding import COMPUTE_DTYPES, DLFLOAT16_MAX, DLFLOAT16_MIN, rounding

properties = hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
FRACTION, BIAS = 9, 31
INFINITY = 0x7FFF


def decoded(pattern: int) -> float:
    """The number of a positive pattern: 6 bits of exponent, 9 of fraction. There are no subnormal numbers."""
    if pattern == 0:
        return 0.0
    exponent, fraction = pattern >> FRACTION, pattern & (1 << FRACTION) - 1
    return math.ldexp(1.0 + fraction / (1 << FRACTION), exponent - BIAS)


@lru_cache(maxsize=1)
def numbers() -> torch.Tensor:
    """All that is not negative and finite, in float64, by pattern."""
    return torch.tensor([decoded(pattern) for pattern in range(INFINITY)], dtype=torch.float64)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest number, of two the one whose pattern is even, found by a search."""
    magnitude = x.double().abs()
    above = torch.searchsorted(numbers(), magnitude).clamp(max=len(numbers()) - 1)
    below = (above - 1).clamp(min=0)
    up, down = numbers()[above] - magnitude, magnitude - numbers()[below]
    chosen = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    chosen = torch.where(magnitude > numbers()[-1], len(numbers()) - 1, chosen)
    return torch.copysign(numbers()[chosen], x.double()).float()


def same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, the sign of zero included."""
    torch.testing.assert_close(result.view(torch.int32), expected.view(torch.int32), rtol=0, atol=0)


def test_every_number_is_its_own_rounding() -> None:
    assert numbers()[-1] == DLFLOAT16_MAX
    assert numbers()[1] == DLFLOAT16_MIN
    assert bool((numbers().diff() > 0).all())
    exact = numbers().float()
    assert bool((exact.double() == numbers()).all())
    for x in (exact, -exact):
        same(rounding("dlfloat16")(x), x)


def test_between_all_neighbours() -> None:
    """Just below, at and just above the middle of each two; ties go to the even pattern."""
    middles = ((numbers()[:-1] + numbers()[1:]) / 2).float()
    assert bool((middles.double() * 2 == numbers()[:-1] + numbers()[1:]).all())
    up = torch.tensor(math.inf)
    for x in (middles, torch.nextafter(middles, up), torch.nextafter(middles, -up)):
        for signed in (x, -x):
            same(rounding("dlfloat16")(signed), nearest(signed))
    tie = rounding("dlfloat16")(middles)
    assert bool((torch.searchsorted(numbers(), tie.double()) % 2 == 0).all())


@properties
@hypothesis.given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_any_float32(bits: list[int]) -> None:
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    finite = x[x.isfinite()]
    before = finite.clone()
    same(rounding("dlfloat16")(finite), nearest(finite))
    same(finite, before)


def test_ends() -> None:
    greatest, least = DLFLOAT16_MAX, DLFLOAT16_MIN
    x = torch.tensor(
        [0.0, -0.0, least / 2, -least / 2, least * 0.75, 2.0**-31, -(2.0**-31), 1e-45, greatest, greatest * 2, -3.4e38]
    )
    expected = torch.tensor([0.0, -0.0, 0.0, -0.0, least, least, -least, 0.0, greatest, greatest, -greatest])
    same(rounding("dlfloat16")(x), expected)
    same(nearest(x), expected)


@pytest.mark.parametrize("compute_dtype", COMPUTE_DTYPES)
def test_infinities_and_nan_stay_what_they_are(compute_dtype: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    torch.testing.assert_close(rounding(compute_dtype)(x), x, rtol=0, atol=0, equal_nan=True)
    for shape in ((), (0,), (2, 3, 4)):
        zeros = torch.zeros(shape)
        torch.testing.assert_close(rounding(compute_dtype)(zeros), zeros, rtol=0, atol=0)
    strided = torch.randn(4, 6).T[::2]
    torch.testing.assert_close(
        rounding(compute_dtype)(strided), rounding(compute_dtype)(strided.contiguous()), rtol=0, atol=0
    )


@properties
@hypothesis.given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_bfloat16_keeps_the_upper_half(bits: list[int]) -> None:
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x = x[x.isfinite()]
    result = rounding("bfloat16")(x)
    below = x.view(torch.int32) & -(1 << 16)
    above = (below.long() + (1 << 16)).to(torch.int32).view(torch.float32).double()
    low, exact = below.view(torch.float32).double(), x.double()
    up, down = (above - exact).abs(), (exact - low).abs()
    even = (below >> 16) % 2 == 0
    expected = torch.where((down < up) | ((down == up) & even), low, above).float()
    inside = above.isfinite()
    same(result[inside], expected[inside])
    same(rounding("float32")(x), x)


def test_other_numbers_are_unknown() -> None:
    with pytest.raises(UnknownNameError, match="expected one of float32, bfloat16, dlfloat16"):
        rounding("float8")
