"""The numerics policy accepts what it should and rejects a result that is one step outside its budget."""

import math

import pytest
import torch

from tilewright.numerics import FEW, REFERENCE_ERRORS, compare, compare_curves, difference, is_fp8

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def rounded(dtype, n=64):
    """A truth in float64 and the reference that only rounds it."""
    truth = torch.linspace(1.0, 1.9, n, dtype=torch.float64) ** 2
    return truth.to(dtype), truth


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_itself_agrees(dtype):
    reference, truth = rounded(dtype)
    agreement = compare(reference, reference, truth)
    assert agreement.ok
    assert agreement.error == float((reference.double() - truth).abs().max())
    assert agreement.worst <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", [0, 31, 63])
def test_one_step_outside_the_budget_is_rejected(dtype, element):
    # Truth and steps are powers of two, so that every number here is exact: the reference is right everywhere, which
    # leaves one rounding of each element.
    truth = torch.ones(64, dtype=torch.float64)
    reference = truth.to(dtype)
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:  # there the reference counts as half a unit off
        eps *= 1 + REFERENCE_ERRORS / 2
    result = reference.clone()
    result[element] += eps
    assert compare(result, reference, truth).ok
    result[element] += torch.finfo(dtype).eps
    agreement = compare(result, reference, truth)
    assert not agreement.ok
    assert agreement.worst > 1
    assert "DISAGREES" in str(agreement)


def test_the_budget_grows_with_the_references_own_error():
    truth = torch.ones(8, dtype=torch.float64)
    reference = torch.ones(8)
    reference[3] += 0.25  # its largest error anywhere is allowed everywhere
    eps = torch.finfo(torch.float32).eps
    result = torch.ones(8)
    result[0] += REFERENCE_ERRORS * 0.25
    assert compare(result, reference, truth).ok
    result[0] += 4 * eps
    assert not compare(result, reference, truth).ok
    assert compare(result, reference, truth).reference_error == 0.25


@pytest.mark.parametrize("reduced", [1, 4, 16])
def test_reductions_scale_with_the_square_root(reduced):
    truth = torch.ones(FEW, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    inside, outside = torch.ones(FEW), torch.ones(FEW)
    inside[0] += math.sqrt(reduced) * eps
    outside[0] += (math.sqrt(reduced) + 1) * eps
    assert compare(inside, torch.ones(FEW), truth, reduced=reduced).ok
    assert not compare(outside, torch.ones(FEW), truth, reduced=reduced).ok


@pytest.mark.parametrize("n", [1, FEW - 1, FEW])
def test_few_numbers_that_are_right_by_luck(n):
    """One rounding is half a unit: twice that, and the unit that every result has, are two steps beside 1."""
    eps = torch.finfo(torch.float32).eps
    exact = torch.ones(n)
    steps = 2 if n < FEW else 1
    assert compare(exact + steps * eps, exact, exact.double()).ok
    assert not compare(exact + (steps + 1) * eps, exact, exact.double()).ok


def test_a_truth_of_zero_asks_for_zero():
    zero = torch.zeros(4, dtype=torch.float64)
    assert compare(torch.zeros(4), torch.zeros(4), zero).ok
    tiny = torch.full((4,), torch.finfo(torch.float32).smallest_normal)
    assert not compare(tiny, torch.zeros(4), zero).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value):
    truth = torch.tensor([1.0, value, 2.0], dtype=torch.float64)
    same = truth.float()
    assert compare(same, same, truth).ok, "where the truth is not finite, so is the result"
    for other in (0.0, math.nan, math.inf):
        if math.isnan(other) == math.isnan(value) and math.isinf(other) == math.isinf(value):
            continue
        wrong = same.clone()
        wrong[1] = other
        assert not compare(wrong, same, truth).ok
    finite = torch.tensor([1.0, 1.5, 2.0])
    wrong = finite.clone()
    wrong[1] = value
    assert not compare(wrong, finite, finite.double()).ok, "the truth is finite, the result is not"


def test_an_infinity_of_the_wrong_sign_is_rejected():
    truth = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert not compare(torch.tensor([1.0, -math.inf]), truth.float(), truth).ok


def test_shapes():
    x, y = torch.ones(4), torch.ones(4, dtype=torch.float64)
    assert not compare(torch.ones(1), x, y).ok, "no broadcasting"
    assert not compare(x, torch.ones(1), y).ok
    empty = torch.ones(0, 3)
    assert compare(empty, empty, empty.double()).ok
    assert not compare(empty, empty, torch.ones(3, 0, dtype=torch.float64)).ok


def test_curves():
    truth = [4.0, 2.0, 1.0, 1.0]
    reference = [4.0, 2.0, 1.5, 1.0]  # errs by a half at the third step
    eps = torch.finfo(torch.float32).eps
    assert compare_curves(reference, reference, truth, dtype=torch.float32).ok
    assert compare_curves(truth, reference, truth, dtype=torch.float32).ok
    late = [4.0, 2.0, 1.0, 1.0 + 2 * 0.5]
    assert compare_curves(late, reference, truth, dtype=torch.float32).ok, "an error is inherited by later steps"
    assert not compare_curves([*late[:3], late[3] + 3 * eps], reference, truth, dtype=torch.float32).ok
    early = [4.0, 2.5, 1.0, 1.0]
    agreement = compare_curves(early, reference, truth, dtype=torch.float32)
    assert not agreement.ok, "the reference had not erred yet"
    assert agreement.worst > 1


def test_curves_round_as_a_random_walk():
    eps = torch.finfo(torch.bfloat16).eps
    flat = [1.0] * 16
    assert compare_curves([*flat[:15], 1 + 4 * eps], flat, flat, dtype=torch.bfloat16).ok
    assert not compare_curves([*flat[:15], 1 + 5 * eps], flat, flat, dtype=torch.bfloat16).ok
    assert not compare_curves([1 + 2 * eps, *flat[1:]], flat, flat, dtype=torch.bfloat16).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 2])
def test_curves_that_blow_up(bad, step):
    truth = [4.0, 2.0, 1.0]
    curve = list(truth)
    curve[step] = bad
    assert not compare_curves(curve, truth, truth, dtype=torch.float32).ok


def test_curves_of_different_lengths():
    assert not compare_curves([1.0], [1.0, 1.0], [1.0, 1.0], dtype=torch.float32).ok
    assert compare_curves([], [], [], dtype=torch.float32).ok


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_two_ways_to_compute_one_thing(dtype, roundings):
    eps = torch.finfo(dtype).eps
    one = torch.ones(10_000, dtype=dtype)
    assert not difference(one * (1 + roundings * eps), one)
    assert difference(one * (1 + (roundings + 1) * eps), one) == "10000 of 10000 numbers"
    few = one.clone()
    few[:10] = 1 + 2.0**-7  # what was rounded to bfloat16 in between
    assert not difference(few, one)
    few[0] = 1 + 2.0**-6 + 2.0**-7
    assert difference(few, one) == "1 numbers by more than a rounding"
    assert difference(one * math.nan, one)
    assert not difference(one * math.nan, one * math.nan)


def test_where_numbers_are_known_to_be_rounded_elsewhere():
    """They may be off by roundings of the largest."""
    other = torch.tensor([1.0, 1e-6])
    result = other + torch.tensor([0.0, 1e-7])
    assert difference(result, other)
    assert not difference(result, other, differs=True)


def test_powers_of_two_are_no_codes():
    one, two = (torch.tensor([float(value)]).to(torch.float8_e8m0fnu) for value in (1, 2))
    assert not is_fp8(one.dtype)
    assert is_fp8(torch.float8_e5m2)
    assert not difference(one, one)
    assert difference(one, two) == "1 of 1 numbers"
