"""What a call of an FP8 quantisation is: its tensors, its options, and the validated description of both.

There are five sources of what is quantised: a tensor as it is, its RMSNorm, the RMSNorm of a sum, the gated SiLU of its
two halves, and its rotation by a table. ``describe`` is the one place where arguments are judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.quant_fp8.format import QuantFormat, checked
from tilewright.ops.rms_norm import call as norm
from tilewright.ops.rope import call as rope

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCES = {
    "quant_fp8": "plain",
    "rms_norm_quant_fp8": "norm",
    "add_rms_norm_quant_fp8": "norm",
    "silu_mul_quant_fp8": "silu_mul",
    "rope_quant_fp8": "rope",
}
EMITS = {
    "rms_norm_quant_fp8": "return_norm",
    "add_rms_norm_quant_fp8": "return_norm",
    "silu_mul_quant_fp8": "return_activation",
    "rope_quant_fp8": "return_rotated",
}
"""The keyword that asks for what is quantised, by the function."""

MAX_FORMATS = 3
_SCALE_DTYPES = {
    "fp32": torch.float32,
    "ue8m0": torch.float8_e8m0fnu,
    "ue8m0_fp32": torch.float32,
    "ue8m0_packed": torch.int32,
}
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Inputs(NamedTuple):
    """The tensors of a call; None where there is none."""

    x: torch.Tensor
    residual: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


class Options(NamedTuple):
    """The options of a call. All are hashable.

    Attributes:
        formats: one for each quantisation.
        emit: also return what is quantised, rounded to the dtype of ``x``: the norm, the activation or the rotation.
        norm: of the RMSNorm, if there is one.
        rope: of the rotation, if there is one.
    """

    formats: tuple[QuantFormat, ...]
    emit: bool = False
    norm: norm.Options = norm.Options()
    rope: rope.Options = rope.Options()


@dataclass(frozen=True)
class QuantCall:
    """A valid call, as sizes, dtypes and flags. ``str`` gives the shape class that an explanation shows.

    Attributes:
        source: ``"plain"``, ``"norm"``, ``"silu_mul"`` or ``"rope"``.
        formats: checked ones, each with its dtype; where ``static``, their group size, format and layout say nothing.
        emit: whether what is quantised is returned too.
        static: whether the scale is given.
        n_rows: how many rows are quantised.
        n_cols: the length of a row of values.
        dtype: that of ``x``.
        norm: the call of the RMSNorm, if there is one.
        rope: that of the rotation, if there is one.
    """

    source: str
    formats: tuple[QuantFormat, ...]
    emit: bool
    static: bool
    n_rows: int
    n_cols: int
    dtype: torch.dtype
    norm: norm.RmsNormCall | None
    rope: rope.RopeCall | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the floating-point tensors that come in, then those of the values that go out."""
        given = (self.dtype,) if self.norm is None else self.norm.dtypes
        return (*given, *(f.dtype for f in self.formats if f.dtype is not None))

    def __str__(self) -> str:
        source = self.norm or self.rope
        shown = [f"{self.n_rows} rows of {self.n_cols}" if source is None else str(source)]
        for f in self.formats:
            if self.static:
                how = "by a given scale"
            else:
                groups = "per token" if f.group_size is None else f"groups of {f.group_size}"
                how = f"{groups}, {f.scale_format} scales, {f.scale_layout}"
            policy = f.policy if isinstance(f.policy, str) else "own policy"
            shown.append(f"{str(f.dtype).removeprefix('torch.')} {how}, {policy}")
        return "; ".join(shown)


def describe(inputs: Inputs, options: Options, operation: str) -> QuantCall:
    """Validate a call by its metadata alone.

    Raises:
        ArgumentError: a shape, device or option that does not fit.
        DTypeError: a dtype that is not accepted, or an argument of another type.
    """
    source = SOURCES[operation]
    x = inputs.x
    norm.check_input(x, "x", operation)
    if x.dtype not in INPUT_DTYPES:
        raise DTypeError(operation, "x", f"got {x.dtype}; expected bfloat16, float16 or float32")
    n_cols = x.shape[-1]
    normed = turned = None
    if source == "norm":
        normed = norm.describe(norm.Inputs(x, inputs.residual, inputs.weight), options.norm, operation)
    elif source == "silu_mul":
        if n_cols % 2:
            raise ArgumentError(operation, "x", f"got shape {tuple(x.shape)}; expected [..., 2 N], gate then up")
        n_cols //= 2
    elif source == "rope":
        for name, table in (("cos", inputs.cos), ("sin", inputs.sin)):
            if not isinstance(table, torch.Tensor):
                raise DTypeError(operation, name, f"got {type(table).__name__}; expected a tensor")
        turned = rope.describe(rope_inputs(inputs), 0, options.rope, operation)
    emit: Any = options.emit
    if not isinstance(emit, bool):
        emits = EMITS[operation]
        raise DTypeError(operation, emits, f"got {emit!r}; expected True or False")
    static = inputs.scale is not None
    if inputs.scale is not None:
        _check_scale(inputs.scale, x, options.formats, operation)
    return QuantCall(
        source=source,
        formats=_check_formats(options.formats, x, operation),
        emit=options.emit,
        static=static,
        n_rows=math.prod(x.shape[:-1]),
        n_cols=n_cols,
        dtype=x.dtype,
        norm=normed,
        rope=turned,
    )


def rope_inputs(inputs: Inputs) -> rope.Inputs:
    """The tensors of a call as those of its rotation."""
    tables: Any = inputs.cos  # None is refused there
    return rope.Inputs(inputs.x, None, tables, inputs.sin, inputs.position_ids, None, None)


def _check_formats(given: Sequence[QuantFormat], x: torch.Tensor, operation: str) -> tuple[QuantFormat, ...]:
    if len(given) > MAX_FORMATS:
        raise ArgumentError(operation, "also", f"asks for {len(given) - 1} more; expected at most {MAX_FORMATS - 1}")
    return tuple(checked(f, x.device, operation, "also" if index else "") for index, f in enumerate(given))


def _check_scale(scale: Any, x: torch.Tensor, formats: Sequence[QuantFormat], operation: str) -> None:
    if not isinstance(scale, torch.Tensor):
        raise DTypeError(operation, "scale", f"got {type(scale).__name__}; expected a float32 tensor of one element")
    if scale.dtype != torch.float32:
        raise DTypeError(operation, "scale", f"got {scale.dtype}; expected float32")
    if scale.numel() != 1 or scale.layout != torch.strided:
        raise ArgumentError(operation, "scale", f"got shape {tuple(scale.shape)}; expected one element, strided")
    if scale.device != x.device:
        raise ArgumentError(operation, "scale", f"lies on {scale.device}, 'x' on {x.device}; move it there")
    if len(formats) > 1:
        raise ArgumentError(operation, "also", "has no meaning beside a given scale, which serves one quantisation")
    default = QuantFormat()
    for name in ("group_size", "scale_format", "scale_layout"):
        if getattr(formats[0], name) != getattr(default, name):
            raise ArgumentError(operation, name, "has no meaning beside a given scale")


def scale_strides(f: QuantFormat, lead: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Strides of the scales ``[*lead, groups]`` of one row each; of the int32 words, where they are packed.

    Args:
        f: the format.
        lead: the leading dimensions.
        groups: the last dimension.
    """
    inner = [math.prod(lead[d + 1 :]) for d in range(len(lead))]
    if f.scale_layout == "row":
        return (*(stride * groups for stride in inner), 1)
    n_rows = max(1, math.prod(lead))
    return (*inner, -(-n_rows // 4) * 4 if f.scale_layout == "tma_aligned" else n_rows)


def empty_results(call: QuantCall, inputs: Inputs) -> list[torch.Tensor]:
    """Memory for every result, in the order of ``reference.quantised``; values are contiguous."""
    x = inputs.x
    lead = tuple(x.shape[:-1])
    shape = (*lead, call.n_cols)
    results = []
    for f in call.formats:
        results.append(torch.empty(shape, dtype=f.dtype, device=x.device))
        if not call.static:
            groups, dtype = f.groups(call.n_cols), _SCALE_DTYPES[f.scale_format]
            if f.is_packed:
                padded, groups = groups % 4 != 0, -(-groups // 4)
            strides = scale_strides(f, lead, groups)
            scales = torch.empty_strided((*lead, groups), strides, dtype=dtype, device=x.device)
            results.append(scales.zero_() if f.is_packed and padded else scales)
    if inputs.residual is not None:
        results.append(torch.empty_like(inputs.residual))
    if call.emit:
        results.append(torch.empty(shape, dtype=x.dtype, device=x.device))
    return results
