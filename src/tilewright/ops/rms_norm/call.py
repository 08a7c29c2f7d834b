"""What a call of RMSNorm is: its tensors, its options, and the validated description of both.

``describe`` is the one place where arguments are judged. The registered operators, their fakes, the public functions
and ``explain`` all come through it, those of the fusions with FP8 quantisation too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.errors import ArgumentError, DTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Tensors = tuple[torch.Tensor | None, ...]
    Runner = Callable[[Tensors], None]
    """Computes: takes the inputs, then the outputs, in their order."""


class Planner(NamedTuple):
    """What an implementation of the family is.

    Attributes:
        forward: plans a call from ``(call, Inputs, (y, stored))``; ``stored`` is None without a residual.
        backward: plans one from ``(call, GradInputs, (grad_x, grad_residual, grad_weight))``. ``grad_residual`` is None
            unless its dtype differs from that of ``grad_x``, and ``grad_weight`` where it is not wanted.
    """

    forward: Callable[[RmsNormCall, Inputs, Tensors], Runner]
    backward: Callable[[RmsNormCall, GradInputs, Tensors], Runner]


MAX_COLS = 262_144
MIN_EPS = 2.0**-126
"""The smallest normal float32 number: a smaller eps could vanish, and a row of zeros would become NaN."""

MAX_NUMBER = torch.finfo(torch.float32).max
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CASTS = ("before_weight", "after_weight")
ROUNDINGS = ("rounded", "exact")


class Inputs(NamedTuple):
    """The tensors of a call; ``residual`` and ``weight`` are None where there is none."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None


class GradInputs(NamedTuple):
    """The tensors of a backward call.

    Attributes:
        grad: of the norm, in the dtype of ``x``.
        grad_stored: of the stored sum; None where there is none.
        z: what the norm was taken of, as it is stored; in a call with ``residual``, one summand of it.
        residual: the other summand, where the exact sum is not stored.
        weight: the weight; None where there is none.
    """

    grad: torch.Tensor
    grad_stored: torch.Tensor | None
    z: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None


class Options(NamedTuple):
    """The options of a call, as the registered operators take them. All are hashable."""

    eps: float = 1e-6
    weight_offset: float = 0.0
    cast: str = "before_weight"
    residual_rounding: str = "rounded"


@dataclass(frozen=True)
class RmsNormCall:
    """A valid call, as sizes, dtypes and flags. ``str`` gives the shape class that an explanation shows."""

    options: Options
    n_rows: int
    n_cols: int
    dtype: torch.dtype
    residual_dtype: torch.dtype | None
    weight_dtype: torch.dtype | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The arithmetic's dtype."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the tensors that there are."""
        return tuple(d for d in (self.dtype, self.residual_dtype, self.weight_dtype) if d is not None)

    @property
    def keeps_sum(self) -> bool:
        """Whether the norm is taken of what is stored, so that a backward needs nothing else."""
        return self.residual_dtype is None or self.options.residual_rounding == "rounded"

    def __str__(self) -> str:
        parts = [f"{self.n_rows} rows of {self.n_cols}"]
        if self.residual_dtype is not None:
            parts.append(f"{_name(self.residual_dtype)} residual, {self.options.residual_rounding}")
        if self.weight_dtype is None:
            parts.append("no weight")
        else:
            parts.append(f"{_name(self.weight_dtype)} weight, cast {self.options.cast}")
        return ", ".join(parts)


def describe(
    inputs: Inputs, options: Options, operation: str = "rms_norm", names: tuple[str, str] = ("x", "weight")
) -> RmsNormCall:
    """Validate a call by its metadata alone.

    Args:
        inputs: its tensors.
        options: its options.
        operation: the public function, for messages.
        names: what the caller calls ``x`` and ``weight``.

    Raises:
        ArgumentError: a shape, device or option that does not fit.
        DTypeError: a dtype that is not accepted, or an argument of another type.
    """
    x, residual, weight = inputs
    check_input(x, names[0], operation)
    _check_options(options, operation)
    if residual is not None:
        _check_residual(x, residual, operation)
    elif operation.startswith("add_"):
        raise DTypeError(operation, "residual", "got None; expected a tensor")
    if weight is not None:
        _check_weight(x, weight, names, operation)
    elif options.weight_offset != 0:
        raise ArgumentError(operation, "weight_offset", "has no meaning without a weight")
    n_cols = x.shape[-1]
    return RmsNormCall(
        options=options,
        n_rows=math.prod(x.shape[:-1]),
        n_cols=n_cols,
        dtype=x.dtype,
        residual_dtype=None if residual is None else residual.dtype,
        weight_dtype=None if weight is None else weight.dtype,
    )


def check_input(x: Any, name: str, operation: str) -> None:
    """Judge a tensor whose last dimension is worked on.

    Raises:
        ArgumentError: it has no columns, too many, or is not strided.
        DTypeError: it is no tensor, or of a dtype that is not accepted.
    """
    if not isinstance(x, torch.Tensor):
        raise DTypeError(operation, name, f"got {type(x).__name__}; expected a tensor")
    if x.dtype not in DTYPES:
        raise DTypeError(operation, name, f"got {x.dtype}; expected one of {', '.join(map(_name, DTYPES))}")
    if x.layout != torch.strided:
        raise ArgumentError(operation, name, f"is {x.layout}; expected strided")
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_COLS:
        raise ArgumentError(operation, name, f"got shape {tuple(x.shape)}; expected [..., N], N from 1 to {MAX_COLS}")


def _check_options(options: Options, operation: str) -> None:
    for name in ("eps", "weight_offset"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DTypeError(operation, name, f"got {value!r}; expected a number")
    if not MIN_EPS <= options.eps <= MAX_NUMBER:
        message = f"got {options.eps}; expected a number from {MIN_EPS:.3g} to {MAX_NUMBER:.3g}"
        raise ArgumentError(operation, "eps", message)
    if not -MAX_NUMBER <= options.weight_offset <= MAX_NUMBER:
        message = f"got {options.weight_offset}; expected a number of at most {MAX_NUMBER:.3g}"
        raise ArgumentError(operation, "weight_offset", message)
    for name, known in (("cast", CASTS), ("residual_rounding", ROUNDINGS)):
        value = getattr(options, name)
        if not isinstance(value, str):
            raise DTypeError(operation, name, f"got {value!r}; expected a string")
        if value not in known:
            raise ArgumentError(operation, name, f"got {value!r}; expected one of {', '.join(known)}")


def _check_residual(x: torch.Tensor, residual: Any, operation: str) -> None:
    if not isinstance(residual, torch.Tensor):
        raise DTypeError(operation, "residual", f"got {type(residual).__name__}; expected a tensor")
    if residual.dtype not in _stream_dtypes(x.dtype):
        known = " or ".join(map(_name, _stream_dtypes(x.dtype)))
        raise DTypeError(operation, "residual", f"got {residual.dtype}; expected {known}")
    if residual.shape != x.shape:
        raise ArgumentError(operation, "residual", f"got shape {tuple(residual.shape)}; expected x's, {tuple(x.shape)}")
    _check_place(x, residual, "residual", operation)


def _check_weight(x: torch.Tensor, weight: Any, names: tuple[str, str], operation: str) -> None:
    of_x, name = names
    if not isinstance(weight, torch.Tensor):
        raise DTypeError(operation, name, f"got {type(weight).__name__}; expected a tensor or None")
    if weight.dtype not in DTYPES or (weight.dtype == torch.float64 and x.dtype != torch.float64):
        known = ", ".join(_name(d) for d in DTYPES if d != torch.float64 or x.dtype == torch.float64)
        raise DTypeError(operation, name, f"got {weight.dtype}; expected one of {known}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ArgumentError(operation, name, f"got shape {tuple(weight.shape)}; expected [{x.shape[-1]}]")
    _check_place(x, weight, name, operation, of_x)


def _check_place(x: torch.Tensor, other: torch.Tensor, name: str, operation: str, of_x: str = "x") -> None:
    if other.layout != torch.strided:
        raise ArgumentError(operation, name, f"is {other.layout}; expected strided")
    if other.device != x.device:
        raise ArgumentError(operation, name, f"lies on {other.device}, '{of_x}' on {x.device}; move it there")


def _stream_dtypes(dtype: torch.dtype) -> Sequence[torch.dtype]:
    """What a residual stream may be kept in beside tensors of ``dtype``."""
    return (dtype,) if dtype in (torch.float32, torch.float64) else (dtype, torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
