"""The numerics policy: one rule for how far a result may lie from the truth.

The truth is an operation's reference evaluated in float64. A result in a lower precision may be off by twice the error
that the reference itself makes in that precision, plus one rounding of the output dtype::

    |result - truth| <= 2 * max|reference - truth| + eps(dtype) * |truth|

Nothing is more precise than float64 here, so a float64 reference is taken to be off by half a unit in the last place of
the largest value, which is what one rounding may make. So is a reference of fewer than :data:`FEW` numbers: where it is
nearer to the truth it may have been lucky, and says little about how near one comes. A result that sums ``reduced``
rows may be off by ``sqrt(reduced)`` times as much, because its order of summation is its own. FP8 codes are compared as
codes (:func:`compare_codes`). Two ways to compute one thing, neither of them the truth, may be :data:`ROUNDINGS_APART`
(:func:`difference`). An NPU, whose rounding is known by its dtype only, may be off by :data:`DEVICE_TOLERANCES`
(:func:`device_difference`).
No other tolerance exists in the project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

REFERENCE_ERRORS = 2.0
"""How many times the reference's own error a result may be off."""

ROUNDINGS_APART = 2
"""How many roundings two ways to compute one thing may be apart."""

FLOAT32_ROUNDINGS_APART = 4
"""Likewise in float32, which nothing rounds in between: a mean in another order, its root, two products and a division
make almost three."""

FEW = 16
"""Numbers of which the largest error is no good sample."""


@dataclass(frozen=True)
class Agreement:
    """How a result compares with the truth.

    Attributes:
        ok: every element lies within its budget and has a NaN exactly where the truth has one.
        error: the largest absolute error of the result.
        reference_error: the largest absolute error of the same-dtype reference.
        worst: the largest ratio of error to budget; at most 1 when ``ok``.
    """

    ok: bool
    error: float
    reference_error: float
    worst: float

    def __str__(self) -> str:
        verdict = "agrees" if self.ok else "DISAGREES"
        return (
            f"{verdict}: largest error {self.error:.3e}, the reference's own {self.reference_error:.3e}, "
            f"{self.worst:.2f} of the budget used"
        )


def compare(result: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, *, reduced: int = 1) -> Agreement:
    """Hold ``result`` against the policy.

    Args:
        result: what is judged, any dtype and shape.
        reference: the reference in the same dtype as ``result``, same shape.
        truth: the reference in float64, same shape.
        reduced: how many rows each element sums over.
    """
    import torch

    if result.shape != truth.shape or reference.shape != truth.shape:
        return Agreement(False, math.inf, math.nan, math.inf)
    if truth.numel() == 0:
        return Agreement(True, 0.0, 0.0, 0.0)
    truth = truth.double()
    finite = torch.isfinite(truth)
    # Where the truth is not finite the result must be the same infinity, or NaN where it is NaN.
    same_class = torch.where(finite, torch.isfinite(result), (result == truth) | (result.isnan() & truth.isnan()))
    error = (result.double() - truth).abs().masked_fill(~finite, 0.0)
    reference_error = (reference.double() - truth).abs().masked_fill(~finite, 0.0).max()
    scale = math.sqrt(reduced)
    eps = torch.finfo(result.dtype).eps
    if result.dtype == torch.float64 or truth.numel() < FEW:
        rounding = 0.5 * eps * truth.abs().masked_fill(~finite, 0.0).max()
        reference_error = torch.maximum(reference_error, rounding)
    budget = scale * (REFERENCE_ERRORS * reference_error + eps * truth.abs().masked_fill(~finite, 0.0))
    # Where even the budget is zero, an exact result is asked for: 0 / 0 counts as none of the budget used.
    used = torch.where(error > 0, error / budget, torch.zeros_like(error))
    worst = float(used.max())
    ok = bool(same_class.all()) and bool((error <= budget).all())
    return Agreement(ok, float(error.max()), float(reference_error), worst)


def disagreement(
    what: str,
    results: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    truths: Sequence[torch.Tensor],
    reduced: Sequence[int] | None = None,
) -> str:
    """Why several results are wrong; empty if :func:`compare` finds all of them right.

    Args:
        what: what they are, for the message.
        results: what is judged.
        references: the references in the same dtypes.
        truths: the references in float64.
        reduced: how many rows each result sums over; by default 1.
    """
    rows = [1] * len(results) if reduced is None else reduced
    for index, (result, reference, truth, n) in enumerate(zip(results, references, truths, rows, strict=True)):
        agreement = compare(result, reference, truth, reduced=n)
        if not agreement.ok:
            return f"{what} {index}: {agreement}"
    return ""


EQUAL_CODES = 0.999
"""The share of FP8 codes that must equal the reference's."""

BIAS_DEVIATIONS = 6.0
"""How many standard deviations the codes one up may outnumber those one down, or the other way round."""


def compare_codes(values: torch.Tensor, reference: torch.Tensor) -> str:
    """Why FP8 values that were quantised under equal scales are wrong; empty if they are right.

    At least :data:`EQUAL_CODES` of them must equal the reference's, a NaN any NaN; the others may lie one code away, as
    often above as below: where two roundings differ by chance, the difference is that of a fair coin.

    Args:
        values: what is judged, of an FP8 dtype.
        reference: of the same dtype and shape.
    """
    import torch

    if values.shape != reference.shape or values.dtype != reference.dtype:
        return f"came {tuple(values.shape)}, {values.dtype}; expected {tuple(reference.shape)}, {reference.dtype}"
    nan = reference.isnan()
    if not torch.equal(values.isnan(), nan):
        return "a NaN stands where the reference has none, or is missing"
    apart = (_order(values) - _order(reference)).masked_fill(nan, 0)
    farthest = int(apart.abs().max()) if apart.numel() else 0
    up, down = int((apart > 0).sum()), int((apart < 0).sum())
    if farthest > 1:
        return f"a code lies {farthest} codes from the reference's"
    if up + down > (1 - EQUAL_CODES) * apart.numel():
        return f"{up + down} of {apart.numel()} codes differ from the reference's"
    if abs(up - down) > BIAS_DEVIATIONS * math.sqrt(up + down):
        return f"rounding is biased: {up} codes lie above the reference's, {down} below"
    return ""


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype are FP8 codes, with a sign and a mantissa; powers of two are not."""
    import torch

    return dtype.is_floating_point and dtype.itemsize == 1 and dtype != torch.float8_e8m0fnu


def _order(values: torch.Tensor) -> torch.Tensor:
    """Codes as integers in the order of their values, both zeros alike."""
    import torch

    code = values.contiguous().view(torch.uint8).to(torch.int16)
    return torch.where(code >= 128, 128 - code, code)


def difference(result: torch.Tensor, other: torch.Tensor, *, differs: bool = False) -> str:
    """Why two ways to compute one thing do not agree; empty if they do.

    Sums may have another order and functions other last digits: numbers within :data:`ROUNDINGS_APART` of each other
    count as equal. What has been rounded in between may have fallen on the other side: at least :data:`EQUAL_CODES` of
    the numbers must be equal, the others one bfloat16 rounding apart. FP8 codes agree by :func:`compare_codes`.

    Args:
        result: of any dtype and shape.
        other: of the same dtype and shape.
        differs: whether the two are known to round elsewhere; then numbers may be off by a few roundings of the
            largest.
    """
    import torch

    if is_fp8(result.dtype):
        return compare_codes(result, other)
    if result.dtype.itemsize == 1:  # of a kind that compares with nothing, such as a power of two
        result, other = result.view(torch.uint8), other.view(torch.uint8)
    if not result.dtype.is_floating_point:
        return "" if torch.equal(result, other) else f"{int((result != other).sum())} of {result.numel()} numbers"
    a, b = result.double(), other.double()
    size = b.abs().nan_to_num(posinf=0.0).max() if differs else b.abs()
    roundings = FLOAT32_ROUNDINGS_APART if result.dtype == torch.float32 else ROUNDINGS_APART
    near = (a - b).abs() <= roundings * torch.finfo(result.dtype).eps * size
    off = ~((a == b) | near | (a.isnan() & b.isnan()))
    if int(off.sum()) > (1 - EQUAL_CODES) * off.numel():
        return f"{int(off.sum())} of {off.numel()} numbers"
    coarse = torch.finfo(torch.bfloat16).eps  # what a bfloat16 number, one rounding apart, makes of a scale
    far = off & ((a - b).abs() > coarse * b.abs())
    return f"{int(far.sum())} numbers by more than a rounding" if bool(far.any()) else ""


DEVICE_TOLERANCES = {"float32": (1e-5, 1e-5), "dlfloat16": (2e-2, 2e-1), "bfloat16": (8e-2, 8e-1)}
"""How far an NPU may be from the CPU's run in the same compute dtype: elementwise, and where matrices are multiplied.

Those of dlfloat16 are what the public tutorials for RBLN allow its hardware; a fraction of bfloat16 has two bits less.
"""


def device_difference(result: torch.Tensor, expected: torch.Tensor, *, compute_dtype: str, products: bool) -> str:
    """Why an NPU's result is not the CPU's; empty if it is.

    No number may be off by more than the tolerance, taken of one and of the number. That alone would let zeros pass for
    small numbers, so the root of the mean square may be off by the elementwise tolerance of itself at most. Infinities,
    NaN and integers are equal.

    Args:
        result: what the NPU gave.
        expected: what the CPU gave with every operation rounded to ``compute_dtype``.
        compute_dtype: a name in :data:`DEVICE_TOLERANCES`.
        products: whether the numbers come from products of matrices.
    """
    import torch

    if result.shape != expected.shape or result.dtype != expected.dtype:
        came = f"{tuple(result.shape)}, {result.dtype}"
        return f"came {came}; expected {tuple(expected.shape)}, {expected.dtype}"
    if not result.dtype.is_floating_point:
        return "" if torch.equal(result, expected) else f"{int((result != expected).sum())} of {result.numel()} numbers"
    rounding = torch.finfo(result.dtype).eps  # of the result itself, which may have fallen on the other side
    elementwise, multiplied = (each + rounding for each in DEVICE_TOLERANCES[compute_dtype])
    a, b = result.double(), expected.double()
    size = b.abs().nan_to_num(nan=0.0, posinf=0.0)
    error = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)  # an infinity, or NaN, on one side only
    error = error.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    off = int((error > (multiplied if products else elementwise) * (1 + size)).sum())
    if off:
        return f"{off} of {result.numel()} numbers, by up to {float(error.max()):.3e}"
    apart, mean = (float(each.square().mean().sqrt()) if each.numel() else 0.0 for each in (error, size))
    within = elementwise * max(mean, elementwise)  # numbers below the tolerance of one count as zeros
    return "" if apart <= within else f"the root mean square of the errors is {apart:.3e}; {within:.3e} is allowed"


def compare_curves(
    curve: Sequence[float], reference: Sequence[float], truth: Sequence[float], *, dtype: torch.dtype
) -> Agreement:
    """Hold a training curve against the policy.

    The truth is the curve of the same training in float64, the reference that of plain PyTorch parts in ``dtype``. A
    step's loss depends on every step before it, so the error allowed at a step is the largest one the reference has
    made up to there, and its rounding counts once for each step so far, adding up as a random walk.

    Args:
        curve: what is judged, one loss per step.
        reference: of the same length.
        truth: of the same length.
        dtype: the dtype in which the model computes.
    """
    if not len(curve) == len(reference) == len(truth):
        return Agreement(False, math.inf, math.nan, math.inf)
    budgets = curve_budget(reference, truth, dtype=dtype)
    errors = [abs(value - exact) for value, exact in zip(curve, truth, strict=True)]
    used = [error / budget if budget else 0.0 for error, budget in zip(errors, budgets, strict=True)]
    return Agreement(
        ok=all(error <= budget for error, budget in zip(errors, budgets, strict=True)),  # False for NaN as well
        error=max(errors, default=0.0),
        reference_error=max((abs(plain - exact) for plain, exact in zip(reference, truth, strict=True)), default=0.0),
        worst=max(used, default=0.0),
    )


def curve_budget(reference: Sequence[float], truth: Sequence[float], *, dtype: torch.dtype) -> tuple[float, ...]:
    """The error that :func:`compare_curves` allows at each step.

    Args:
        reference: the curve of plain PyTorch parts in ``dtype``.
        truth: the same training in float64, of the same length.
        dtype: the dtype in which the model computes.
    """
    import torch

    eps = torch.finfo(dtype).eps
    budget, largest = [], 0.0
    for step, (plain, exact) in enumerate(zip(reference, truth, strict=True), start=1):
        largest = max(largest, abs(plain - exact))
        budget.append(REFERENCE_ERRORS * largest + eps * abs(exact) * math.sqrt(step))
    return tuple(budget)
