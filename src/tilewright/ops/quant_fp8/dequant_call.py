"""What a call of ``dequant_fp8`` is: its tensors, and the validated description of them and of its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.quant_fp8.call import INPUT_DTYPES
from tilewright.ops.quant_fp8.format import DTYPES, GROUP_SIZES

SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu, torch.int32)


class DequantInputs(NamedTuple):
    """The tensors of a call."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class DequantCall:
    """A valid call, as sizes, dtypes and a flag. ``str`` gives the shape class that an explanation shows.

    Attributes:
        n_rows: how many rows there are.
        n_cols: the length of a row.
        group_size: how many neighbours share a scale; None for the whole row. Says nothing where ``one_scale``.
        one_scale: a single float32 scale serves all values.
        values_dtype: an FP8 dtype.
        scales_dtype: float32, float8_e8m0fnu, or int32 where four exponents share a word.
        dtype: that of the result.
    """

    n_rows: int
    n_cols: int
    group_size: int | None
    one_scale: bool
    values_dtype: torch.dtype
    scales_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def is_packed(self) -> bool:
        """Whether four scales share an int32."""
        return self.scales_dtype == torch.int32

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the values that come in and of the result."""
        return (self.values_dtype, self.dtype)

    def __str__(self) -> str:
        groups = "per token" if self.group_size is None else f"groups of {self.group_size}"
        kind = "packed" if self.is_packed else str(self.scales_dtype).removeprefix("torch.")
        how = "one scale" if self.one_scale else f"{groups}, {kind} scales"
        return f"{self.n_rows} rows of {self.n_cols}, {how}"


def describe_dequant(
    inputs: DequantInputs, group_size: int | None, dtype: torch.dtype, operation: str = "dequant_fp8", name: str = ""
) -> DequantCall:
    """Validate a call by its metadata alone.

    Args:
        inputs: the tensors.
        group_size: how many neighbours share a scale.
        dtype: of the result.
        operation: the public function, for messages.
        name: the argument that holds both tensors; by default they are arguments themselves.

    Raises:
        ArgumentError: a shape, device or option that does not fit.
        DTypeError: a dtype that is not accepted, or an argument of another type.
    """
    values, scales = inputs
    for field, tensor, known in (
        ("values", values, tuple(DTYPES.values())),
        ("scales", scales, SCALE_DTYPES),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise DTypeError(operation, name or field, f"{field}: got {type(tensor).__name__}; expected a tensor")
        if tensor.dtype not in known:
            expected = ", ".join(map(str, known))
            raise DTypeError(operation, name or field, f"{field}: got {tensor.dtype}; expected one of {expected}")
        if tensor.layout != torch.strided:
            raise ArgumentError(operation, name or field, f"{field}: is {tensor.layout}; expected strided")
    if scales.device != values.device:
        message = f"scales: lies on {scales.device}, the values on {values.device}; move it there"
        raise ArgumentError(operation, name or "scales", message)
    if values.dim() < 1 or values.shape[-1] < 1:
        raise ArgumentError(operation, name or "values", f"values: got shape {tuple(values.shape)}; expected [..., N]")
    _check_options(group_size, dtype, operation)
    one_scale = scales.dtype == torch.float32 and scales.numel() == 1
    if not one_scale:
        groups = 1 if group_size is None else -(-values.shape[-1] // group_size)
        width = -(-groups // 4) if scales.dtype == torch.int32 else groups
        expected_shape = (*values.shape[:-1], width)
        if tuple(scales.shape) != expected_shape:
            message = f"scales: got shape {tuple(scales.shape)}; expected {expected_shape}"
            raise ArgumentError(operation, name or "scales", message)
    return DequantCall(
        n_rows=math.prod(values.shape[:-1]),
        n_cols=values.shape[-1],
        group_size=group_size,
        one_scale=one_scale,
        values_dtype=values.dtype,
        scales_dtype=scales.dtype,
        dtype=dtype,
    )


def _check_options(group_size: Any, dtype: Any, operation: str) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int | None):
        raise DTypeError(operation, "group_size", f"got {group_size!r}; expected an int or None")
    if group_size not in GROUP_SIZES:
        raise ArgumentError(operation, "group_size", f"got {group_size}; expected {', '.join(map(str, GROUP_SIZES))}")
    if dtype not in INPUT_DTYPES:
        raise DTypeError(operation, "dtype", f"got {dtype!r}; expected bfloat16, float16 or float32")
