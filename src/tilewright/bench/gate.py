"""The gate before the clock: a provider whose result is wrong gets no time.

Results are held against the numerics policy of the project, on random data. Before a provider runs, what it writes
into is filled with NaN: buffers that it was given directly, and buffers that it allocates itself by way of the
allocator, which hands out again what was freed last.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tilewright.numerics import compare

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.bench.providers import Formulation, Prepared, Suite, Task, Tensors


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a provider.

    Attributes:
        ok: the results are right.
        formulation: the name of what they were judged against.
        less_precise: why that is a less precise job than the family's own; empty if it is the same.
        worst: the largest share of the error budget that a result used; None where no budget applies.
        rms_error: root mean square error against the family's own truth, relative to that of the truth: how many
            digits a job gives, whatever it was judged against.
        reason: why the results are wrong; empty if they are right.
    """

    ok: bool
    formulation: str
    less_precise: str = ""
    worst: float | None = None
    rms_error: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record in JSON's types."""
        return asdict(self)


class Gate:
    """Judges the providers of one task. What is true is computed once for each formulation.

    Args:
        suite: the family's suite.
        task: the task. Nobody else may write into its tensors.
    """

    def __init__(self, suite: Suite, task: Task) -> None:
        self._suite = suite
        self._task = task
        self._known: dict[str, tuple[Tensors, Tensors]] = {}

    def judge(self, prepared: Prepared) -> Verdict:
        """Run the first of the prepared calls and judge its results."""
        formulation = prepared.formulation or self._suite.formulation
        if prepared.expected is None:
            reference, truth = self._facts(formulation)
        else:
            reference = truth = prepared.expected
        for tensor in prepared.outputs:
            spoil(tensor)
        _poison(reference)
        results = tuple(result.detach() for result in prepared.results(prepared.calls[0]()))
        if prepared.expected is not None:
            same = len(results) == len(truth) and all(map(torch.equal, results, truth))
            return Verdict(same, "bit for bit", reason="" if same else "the copy differs from its source")
        worst, reason = self._compare(formulation, results, reference, truth)
        if reason:
            return Verdict(False, formulation.name, formulation.less_precise, worst, reason=reason)
        own = self._suite.formulation
        rms_error = _rms_error(own.numbers(self._task, results), self._facts(own)[1])
        return Verdict(True, formulation.name, formulation.less_precise, worst, rms_error)

    def _facts(self, formulation: Formulation) -> tuple[Tensors, Tensors]:
        if formulation.name not in self._known:
            self._known[formulation.name] = formulation.evaluate(self._task), formulation.exact(self._task)
        return self._known[formulation.name]

    def _compare(
        self, formulation: Formulation, results: Tensors, reference: Tensors, truth: Tensors
    ) -> tuple[float | None, str]:
        """The largest share of the budget used, and why the results are wrong or nothing."""
        for what, form in _FORMS.items():
            came, expected = [form(tensor) for tensor in results], [form(tensor) for tensor in reference]
            if came != expected:
                return None, f"{what}: came {came}, expected {expected}"
        if formulation.judges is not None:
            return None, formulation.judges(self._task, results, reference, truth)
        worst, reason = 0.0, ""
        rows = [1] * len(results) if self._suite.reduced is None else self._suite.reduced(self._task)
        for index, (result, plain, exact, n) in enumerate(zip(results, reference, truth, rows, strict=True)):
            agreement = compare(result, plain, exact, reduced=n)
            worst = max(worst, agreement.worst)
            if not agreement.ok and not reason:
                reason = f"result {index} {agreement}"
        return worst, reason


_FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "shapes": lambda tensor: tuple(tensor.shape),
    "dtypes": lambda tensor: str(tensor.dtype).removeprefix("torch."),
}


def _rms_error(results: Tensors, truth: Tensors) -> float:
    """Relative root mean square error of all results together, where the truth is finite."""
    error = scale = 0.0
    for result, exact in zip(results, truth, strict=True):
        finite = torch.isfinite(exact)
        error += float((result.double() - exact).masked_fill(~finite, 0.0).square().sum())
        scale += float(exact.double().masked_fill(~finite, 0.0).square().sum())
    return math.sqrt(error / scale) if scale else math.sqrt(error)


def _poison(like: Tensors) -> None:
    """Leave NaN in the memory that the allocator will hand out next for tensors like these."""
    poisoned = [torch.empty_like(tensor) for tensor in like]
    for tensor in poisoned:
        spoil(tensor)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ONE_ZERO = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def spoil(tensor: torch.Tensor) -> None:
    """Fill with NaN, in place, by bits: not every device fills FP8, and integers may hold packed exponents.

    All bits set are a NaN in every format, four NaN exponents in an int32, but for FP8 formats with one zero, whose
    only NaN is where negative zero would be.
    """
    bits = _INTEGERS[tensor.dtype.itemsize]
    tensor.detach().view(bits).fill_(torch.iinfo(bits).min if tensor.dtype in _ONE_ZERO else -1)
