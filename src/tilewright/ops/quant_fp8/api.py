"""The public functions of FP8 quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from tilewright.dispatch import Operation
from tilewright.dispatch.eager import unobserved
from tilewright.dispatch.selection import bound, override
from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.quant_fp8.call import EMITS, Inputs, Options, describe
from tilewright.ops.quant_fp8.dequant_call import DequantInputs, describe_dequant
from tilewright.ops.quant_fp8.format import QuantFormat
from tilewright.ops.quant_fp8.keywords import format_of, formats_of, texts_of
from tilewright.ops.quant_fp8.op import (
    DEQUANT_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    dequantise,
    described,
    described_dequant,
    options_of,
    quantise,
    refuse_gradients,
    run_registered,
)
from tilewright.ops.quant_fp8.reference import scaled_mm
from tilewright.ops.quant_fp8.results import (
    ActivationQuantized,
    AddNormQuantized,
    NormQuantized,
    Quantized,
    RotationQuantized,
)
from tilewright.ops.rms_norm import call as norm
from tilewright.ops.rope import call as rope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.dispatch import Described
    from tilewright.ops.quant_fp8.format import QuantPolicy
    from tilewright.ops.rms_norm.api import Cast, ResidualRounding
    from tilewright.ops.rope.api import Layout, Numerics

ScaleFormat = Literal["fp32", "ue8m0", "ue8m0_fp32", "ue8m0_packed"]
ScaleLayout = Literal["row", "column", "tma_aligned"]
_NO_NORM = norm.Options()
_NO_ROPE = rope.Options()
_NO_TABLE = (None, None, None)


def quant_fp8(
    x: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    group_size: int | None = 128,
    scale_format: ScaleFormat = "fp32",
    scale_layout: ScaleLayout = "row",
    dtype: torch.dtype | None = None,
    policy: QuantPolicy | str = "exact",
    impl: str | None = None,
) -> Quantized:
    """Quantise rows to FP8, with a scale for each group of neighbours.

    With ``amax`` the largest magnitude of a group and ``maximum`` the dtype's largest number (448 for e4m3fn)::

        scale = max(amax / maximum, floor)        rounded up to a power of two for the ue8m0 formats
        value = fp8(clamp(x / scale, -maximum, maximum))

    All arithmetic is float32, every step rounded to nearest even. ``policy`` selects the floors and the order of
    operations of a known kernel instead; :class:`tilewright.QuantPolicy` names each of them. Source of the scheme: 1 x
    128 tiles of DeepSeek-V3, arXiv:2412.19437; power-of-two scales of OCP Microscaling Formats, version 1.0.

    Args:
        x: ``[..., N]``, bfloat16, float16 or float32, any strides, N from 1 to 262144.
        scale: a float32 tensor of one element: static quantisation by this scale for every element. The group size and
            the scale's format and layout then keep their defaults.
        group_size: 128, 64 or 32 neighbours along the last dimension share a scale, or None: the whole row (per token).
            The last group of a row may be shorter.
        scale_format: ``"fp32"``, ``"ue8m0"`` (``torch.float8_e8m0fnu``), ``"ue8m0_fp32"`` (powers of two as float32),
            or ``"ue8m0_packed"`` (four exponents in an int32, the first group's lowest, as DeepGEMM takes them).
        scale_layout: ``"row"``: scales of a row lie together; ``"column"``: strides ``(1, rows)``; ``"tma_aligned"``:
            the same, each column padded to a multiple of four elements. Packed scales need ``"tma_aligned"``. With
            more than one leading dimension rows are counted over all of them.
        dtype: ``torch.float8_e4m3fn``, ``torch.float8_e4m3fnuz`` or ``torch.float8_e5m2``; by default the E4M3 format
            of the device: e4m3fnuz on AMD's gfx940 to gfx942, e4m3fn elsewhere.
        policy: the arithmetic, or a preset's name: ``"exact"``, ``"vllm_native"``, ``"vllm_native_per_token"``,
            ``"vllm_cuda"``, ``"vllm_fused"``, ``"aiter"``, ``"deep_gemm"``.
        impl: the implementation that must serve, such as ``"triton"``; by default the best one for the device.

    Returns:
        ``Quantized(values, scales)``: values ``[..., N]``, contiguous, and scales ``[..., groups]``.

        A NaN makes its group's scale and values NaN. An infinity makes its group's scale infinite, itself NaN and its
        finite neighbours 0. A group of zeros has the least scale, and zeros. Without rows the results are empty.

        Not differentiable.

    Raises:
        ArgumentError: a shape, device or option that does not fit, or an input that requires a gradient in grad mode.
        DTypeError: a dtype that is not accepted, or an argument of another type.
        ImplementationError: ``impl`` cannot serve this call.

    Example:
        >>> import torch, tilewright
        >>> values, scales = tilewright.quant_fp8(torch.randn(4, 7168, dtype=torch.bfloat16))
        >>> values.dtype, scales.shape
        (torch.float8_e4m3fn, torch.Size([4, 56]))
    """
    formats = (format_of(group_size, scale_format, scale_layout, dtype, policy),)
    results = _run("quant_fp8", (x, None, None, scale, *_NO_TABLE), (formats, False, _NO_NORM, _NO_ROPE), impl)
    return Quantized(results[0], results[1] if scale is None else scale)


def rms_norm_quant_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast: Cast = "before_weight",
    scale: torch.Tensor | None = None,
    group_size: int | None = 128,
    scale_format: ScaleFormat = "fp32",
    scale_layout: ScaleLayout = "row",
    dtype: torch.dtype | None = None,
    policy: QuantPolicy | str = "exact",
    also: Sequence[QuantFormat] = (),
    return_norm: bool = False,
    impl: str | None = None,
) -> NormQuantized:
    """Quantise the RMSNorm of ``x`` to FP8 in one launch, without writing the norm unless it is asked for.

    The result is that of :func:`tilewright.quant_fp8` on :func:`tilewright.rms_norm`, bit for bit, unless the policy
    quantises the norm before it is rounded (``round_input=False``).

    Args:
        x: ``[..., N]``, bfloat16, float16 or float32, any strides, N from 1 to 262144.
        weight: as in :func:`tilewright.rms_norm`.
        eps: as in :func:`tilewright.rms_norm`.
        weight_offset: as in :func:`tilewright.rms_norm`.
        cast: as in :func:`tilewright.rms_norm`.
        scale: as in :func:`tilewright.quant_fp8`.
        group_size: as in :func:`tilewright.quant_fp8`.
        scale_format: as in :func:`tilewright.quant_fp8`.
        scale_layout: as in :func:`tilewright.quant_fp8`.
        dtype: as in :func:`tilewright.quant_fp8`.
        policy: as in :func:`tilewright.quant_fp8`.
        also: at most two more formats in which the same norm is quantised in the same launch.
        return_norm: also return the norm.
        impl: as in :func:`tilewright.quant_fp8`.

    Returns:
        ``NormQuantized(values, scales, norm, also)``; ``norm`` is None unless ``return_norm``. Not differentiable.

    Raises:
        ArgumentError: as :func:`tilewright.quant_fp8` and :func:`tilewright.rms_norm`, or too many formats.
        DTypeError: likewise.
        ImplementationError: as :func:`tilewright.quant_fp8`.

    Example:
        >>> import torch, tilewright
        >>> x, weight = torch.randn(4, 512, dtype=torch.bfloat16), torch.ones(512, dtype=torch.bfloat16)
        >>> also = [tilewright.QuantFormat(group_size=32, scale_format="ue8m0")]
        >>> result = tilewright.rms_norm_quant_fp8(x, weight, also=also, return_norm=True)
        >>> result.scales.shape, result.also[0].scales.shape, result.norm.dtype
        (torch.Size([4, 4]), torch.Size([4, 16]), torch.bfloat16)
    """
    name = "rms_norm_quant_fp8"
    formats = formats_of(format_of(group_size, scale_format, scale_layout, dtype, policy), also, name)
    options = (formats, return_norm, (eps, weight_offset, cast, "rounded"), _NO_ROPE)
    results = _run(name, (x, None, weight, scale, *_NO_TABLE), options, impl)
    pairs, rest = _pairs(results, scale, len(formats))
    return NormQuantized(*pairs[0], rest[0] if rest else None, pairs[1:])


def add_rms_norm_quant_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast: Cast = "before_weight",
    residual_rounding: ResidualRounding = "rounded",
    scale: torch.Tensor | None = None,
    group_size: int | None = 128,
    scale_format: ScaleFormat = "fp32",
    scale_layout: ScaleLayout = "row",
    dtype: torch.dtype | None = None,
    policy: QuantPolicy | str = "exact",
    also: Sequence[QuantFormat] = (),
    return_norm: bool = False,
    impl: str | None = None,
) -> AddNormQuantized:
    """Quantise the RMSNorm of ``x + residual`` to FP8 in one launch, and return the sum.

    The result is that of :func:`tilewright.quant_fp8` on :func:`tilewright.add_rms_norm`, bit for bit, unless the
    policy quantises the norm before it is rounded (``round_input=False``).

    Args:
        x: ``[..., N]``, bfloat16, float16 or float32, any strides, N from 1 to 262144.
        residual: as in :func:`tilewright.add_rms_norm`: the shape of ``x``, its dtype or float32.
        weight: as in :func:`tilewright.rms_norm`.
        eps: as in :func:`tilewright.rms_norm`.
        weight_offset: as in :func:`tilewright.rms_norm`.
        cast: as in :func:`tilewright.rms_norm`.
        residual_rounding: as in :func:`tilewright.add_rms_norm`.
        scale: as in :func:`tilewright.quant_fp8`.
        group_size: as in :func:`tilewright.quant_fp8`.
        scale_format: as in :func:`tilewright.quant_fp8`.
        scale_layout: as in :func:`tilewright.quant_fp8`.
        dtype: as in :func:`tilewright.quant_fp8`.
        policy: as in :func:`tilewright.quant_fp8`.
        also: at most two more formats in which the same norm is quantised in the same launch.
        return_norm: also return the norm.
        impl: as in :func:`tilewright.quant_fp8`.

    Returns:
        ``AddNormQuantized(values, scales, residual, norm, also)``; the sum has the dtype of ``residual`` and the
        strides that ``torch.empty_like`` gives it; ``norm`` is None unless ``return_norm``. Not differentiable.

    Raises:
        ArgumentError: as :func:`tilewright.quant_fp8` and :func:`tilewright.add_rms_norm`, or too many formats.
        DTypeError: likewise.
        ImplementationError: as :func:`tilewright.quant_fp8`.

    Example:
        >>> import torch, tilewright
        >>> x, residual = torch.randn(2, 4, 512, dtype=torch.bfloat16)
        >>> result = tilewright.add_rms_norm_quant_fp8(x, residual, group_size=None)
        >>> torch.equal(result.residual, x + residual), result.scales.shape
        (True, torch.Size([4, 1]))
    """
    name = "add_rms_norm_quant_fp8"
    formats = formats_of(format_of(group_size, scale_format, scale_layout, dtype, policy), also, name)
    options = (formats, return_norm, (eps, weight_offset, cast, residual_rounding), _NO_ROPE)
    results = _run(name, (x, residual, weight, scale, *_NO_TABLE), options, impl)
    pairs, rest = _pairs(results, scale, len(formats))
    return AddNormQuantized(*pairs[0], rest[0], rest[1] if len(rest) > 1 else None, pairs[1:])


def silu_mul_quant_fp8(
    x: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    group_size: int | None = 128,
    scale_format: ScaleFormat = "fp32",
    scale_layout: ScaleLayout = "row",
    dtype: torch.dtype | None = None,
    policy: QuantPolicy | str = "exact",
    also: Sequence[QuantFormat] = (),
    return_activation: bool = False,
    impl: str | None = None,
) -> ActivationQuantized:
    """Quantise ``silu(gate) * up`` to FP8 in one launch, ``gate`` and ``up`` being the two halves of each row.

    ``silu(g) = g / (1 + exp(-g))`` in float32 is rounded to the dtype of ``x`` and multiplied by ``up``; the product is
    rounded again, as PyTorch's two operators would. A policy with ``round_input=False`` leaves out both roundings.

    Args:
        x: ``[..., 2 N]``, gate then up, bfloat16, float16 or float32, any strides, 2 N from 2 to 262144.
        scale: as in :func:`tilewright.quant_fp8`.
        group_size: as in :func:`tilewright.quant_fp8`.
        scale_format: as in :func:`tilewright.quant_fp8`.
        scale_layout: as in :func:`tilewright.quant_fp8`.
        dtype: as in :func:`tilewright.quant_fp8`.
        policy: as in :func:`tilewright.quant_fp8`.
        also: at most two more formats in which the same activation is quantised in the same launch.
        return_activation: also return the activation.
        impl: as in :func:`tilewright.quant_fp8`.

    Returns:
        ``ActivationQuantized(values, scales, activation, also)``: values ``[..., N]``; ``activation`` is None unless
        ``return_activation``. Not differentiable.

    Raises:
        ArgumentError: as :func:`tilewright.quant_fp8`, or too many formats, or an odd row.
        DTypeError: as :func:`tilewright.quant_fp8`.
        ImplementationError: as :func:`tilewright.quant_fp8`.

    Example:
        >>> import torch, tilewright
        >>> result = tilewright.silu_mul_quant_fp8(torch.randn(4, 1024), scale_format="ue8m0")
        >>> result.values.shape, result.scales.dtype
        (torch.Size([4, 512]), torch.float8_e8m0fnu)
    """
    name = "silu_mul_quant_fp8"
    formats = formats_of(format_of(group_size, scale_format, scale_layout, dtype, policy), also, name)
    results = _run(name, (x, None, None, scale, *_NO_TABLE), (formats, return_activation, _NO_NORM, _NO_ROPE), impl)
    pairs, rest = _pairs(results, scale, len(formats))
    return ActivationQuantized(*pairs[0], rest[0] if rest else None, pairs[1:])


def rope_quant_fp8(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: Layout = "bshd",
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    numerics: Numerics = "exact",
    scale: torch.Tensor | None = None,
    group_size: int | None = 128,
    scale_format: ScaleFormat = "fp32",
    scale_layout: ScaleLayout = "row",
    dtype: torch.dtype | None = None,
    policy: QuantPolicy | str = "exact",
    also: Sequence[QuantFormat] = (),
    return_rotated: bool = False,
    impl: str | None = None,
) -> RotationQuantized:
    """Rotate pairs of features as :func:`tilewright.rope` does, and quantise each head to FP8, in one launch.

    What is quantised is rounded to the dtype of ``x`` first, so that values and scales are those of
    :func:`tilewright.quant_fp8` on the rotation, bit for bit; a policy with ``round_input=False`` leaves that out.

    Args:
        x: ``[B, S, H, D]`` in the order that ``layout`` says, or ``[T, H, D]``, bfloat16, float16 or float32, any
            strides; D even, 2 to 512.
        cos: as in :func:`tilewright.rope`.
        sin: as in :func:`tilewright.rope`.
        layout: as in :func:`tilewright.rope`.
        interleaved: as in :func:`tilewright.rope`.
        position_ids: as in :func:`tilewright.rope`, ``[S]`` or ``[B, S]``.
        rotary_dim: as in :func:`tilewright.rope`.
        rotary_offset: as in :func:`tilewright.rope`.
        numerics: as in :func:`tilewright.rope`.
        scale: as in :func:`tilewright.quant_fp8`.
        group_size: as in :func:`tilewright.quant_fp8`; groups lie within a head.
        scale_format: as in :func:`tilewright.quant_fp8`.
        scale_layout: as in :func:`tilewright.quant_fp8`.
        dtype: as in :func:`tilewright.quant_fp8`.
        policy: as in :func:`tilewright.quant_fp8`.
        also: at most two more formats in which the same rotation is quantised in the same launch.
        return_rotated: also return the rotation.
        impl: as in :func:`tilewright.quant_fp8`.

    Returns:
        ``RotationQuantized(values, scales, rotated, also)``: values of the shape of ``x``; ``rotated`` is None unless
        ``return_rotated``. Not differentiable.

    Raises:
        ArgumentError: as :func:`tilewright.quant_fp8` and :func:`tilewright.rope`, or too many formats.
        DTypeError: likewise.
        ImplementationError: as :func:`tilewright.quant_fp8`.

    Example:
        >>> import torch, tilewright
        >>> cos, sin = tilewright.rope_table(64, 16)
        >>> result = tilewright.rope_quant_fp8(torch.randn(1, 16, 4, 128), cos, sin)
        >>> result.values.shape, result.scales.shape
        (torch.Size([1, 16, 4, 128]), torch.Size([1, 16, 4, 1]))
    """
    name = "rope_quant_fp8"
    formats = formats_of(format_of(group_size, scale_format, scale_layout, dtype, policy), also, name)
    turned = (layout, interleaved, rotary_dim, rotary_offset, None, None, False, False, False, numerics)
    inputs = (x, None, None, scale, cos, sin, position_ids)
    results = _run(name, inputs, (formats, return_rotated, _NO_NORM, turned), impl)
    pairs, rest = _pairs(results, scale, len(formats))
    return RotationQuantized(*pairs[0], rest[0] if rest else None, pairs[1:])


def dequant_fp8(
    values: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_size: int | None = 128,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> torch.Tensor:
    """Multiply FP8 values by their scales: ``values * scales`` in float32, rounded once to ``dtype``.

    Args:
        values: ``[..., N]``, ``torch.float8_e4m3fn``, ``torch.float8_e4m3fnuz`` or ``torch.float8_e5m2``, any strides.
        scales: ``[..., groups]``, float32 or ``torch.float8_e8m0fnu``, or four to an int32, as
            :func:`tilewright.quant_fp8` returns them, any strides; or one float32 number for all values.
        group_size: how many neighbours share a scale: 128, 64, 32, or None for the whole row.
        dtype: of the result: bfloat16, float16 or float32.
        impl: as in :func:`tilewright.quant_fp8`.

    Returns:
        ``[..., N]``, contiguous. Not differentiable.

    Raises:
        ArgumentError: a shape, device or option that does not fit, or an input that requires a gradient in grad mode.
        DTypeError: a dtype that is not accepted, or an argument of another type.
        ImplementationError: ``impl`` cannot serve this call.

    Example:
        >>> import torch, tilewright
        >>> values, scales = tilewright.quant_fp8(torch.tensor([[-2.0, 0.0, 1.0]]))
        >>> tilewright.dequant_fp8(values, scales)
        tensor([[-2., 0., 1.]])
    """
    if impl is None:
        impl = override()
    if unobserved((values, scales)):
        refuse_gradients("dequant_fp8", DequantInputs._fields, (values, scales))
        return dequantise(values, scales, group_size, dtype, impl)
    if not torch.compiler.is_compiling():
        describe_dequant(DequantInputs(values, scales), group_size, dtype)
        refuse_gradients("dequant_fp8", DequantInputs._fields, (values, scales))
    result: torch.Tensor = torch.ops.tilewright.dequant_fp8(values, scales, group_size, dtype, impl)
    return result


def scaled_mm_fp8(
    a: Quantized | tuple[torch.Tensor, torch.Tensor],
    b: Quantized | tuple[torch.Tensor, torch.Tensor],
    *,
    group_size: int | tuple[int | None, int | None] | None = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """What a matrix product on FP8 operands approximates, in plain PyTorch: for checks, not for speed.

    ``dequant(a) @ dequant(b).T`` in float32, rounded once to ``dtype``. There is no kernel behind it, no choice of an
    implementation and no registered operator.

    Args:
        a: values ``[..., M, K]`` and their scales along K, as :func:`tilewright.quant_fp8` returns them.
        b: values ``[N, K]``, a linear layer's weight, and their scales along K.
        group_size: of both operands, or ``(a's, b's)``.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        ``[..., M, N]``.

    Raises:
        ArgumentError: shapes that do not fit.
        DTypeError: a dtype that is not accepted.

    Example:
        >>> import torch, tilewright
        >>> a, b = tilewright.quant_fp8(torch.randn(4, 256)), tilewright.quant_fp8(torch.randn(8, 256))
        >>> tilewright.scaled_mm_fp8(a, b).shape
        torch.Size([4, 8])
    """
    name = "scaled_mm_fp8"
    sizes = group_size if isinstance(group_size, tuple) else (group_size, group_size)
    if len(sizes) != 2:
        raise ArgumentError(name, "group_size", f"got {group_size!r}; expected one for both operands, or (a's, b's)")
    operands: tuple[Any, Any] = (a, b)
    for operand, size, argument in zip(operands, sizes, ("a", "b"), strict=True):
        if not isinstance(operand, tuple) or len(operand) != len(Quantized._fields):
            raise DTypeError(name, argument, f"got {type(operand).__name__}; expected (values, scales)")
        describe_dequant(DequantInputs._make(operand), size, dtype, name, argument)
        if operand[0].dim() < 2 or (argument == "b" and operand[0].dim() != 2):
            raise ArgumentError(name, argument, f"values: got shape {tuple(operand[0].shape)}; expected a matrix")
    if a[0].shape[-1] != b[0].shape[-1]:
        raise ArgumentError(name, "b", f"has rows of {b[0].shape[-1]}, 'a' of {a[0].shape[-1]}; expected equal ones")
    if a[0].device != b[0].device:
        raise ArgumentError("scaled_mm_fp8", "b", f"lies on {b[0].device}, 'a' on {a[0].device}; move it there")
    return scaled_mm(a, b, group_size=sizes, dtype=dtype)


def _pairs(
    results: list[torch.Tensor], scale: torch.Tensor | None, n_formats: int
) -> tuple[tuple[Quantized, ...], list[torch.Tensor]]:
    """Values and scales of each format, and the results after them."""
    if scale is not None:
        return (Quantized(results[0], scale),), results[1:]
    pairs = tuple([Quantized(results[2 * i], results[2 * i + 1]) for i in range(n_formats)])
    return pairs, results[2 * n_formats :]


def _run(operation: str, inputs: tuple[Any, ...], options: tuple[Any, ...], impl: str | None) -> list[torch.Tensor]:
    if impl is None:
        impl = override()
    if unobserved(inputs):
        refuse_gradients(operation, Inputs._fields, inputs)
        return quantise(operation, inputs, options, impl)
    return _run_watched(operation, inputs, options, impl)


def _run_watched(
    operation: str, inputs: tuple[Any, ...], options: tuple[Any, ...], impl: str | None
) -> list[torch.Tensor]:
    """Through the registered operators: under torch.compile and wherever somebody watches the dispatcher."""
    if not torch.compiler.is_compiling():  # an error's constructor cannot be traced: there the operator judges alone
        describe(Inputs(*inputs), options_of(options), operation)
        refuse_gradients(operation, Inputs._fields, inputs)
    texts = texts_of(options[0], str(inputs[0].device), operation)
    return run_registered(operation, inputs, texts, options, impl)


def _describe(function: Callable[..., Any]) -> Callable[..., Described]:
    """How an explanation reads the arguments of a public function that quantises."""

    def describe(*args: Any, **kwargs: Any) -> Described:
        given = bound(function, args, kwargs)
        name = function.__name__
        own = QuantFormat(*(given[field] for field in QuantFormat.__dataclass_fields__))
        tensors: dict[str, Any] = {field: given.get(field) for field in Inputs._fields}
        inputs = Inputs(**tensors)
        normed = norm.Options(**{field: given[field] for field in norm.Options._fields if field in given})
        turned = rope.Options(**{field: given[field] for field in rope.Options._fields if field in given})
        emit = next((given[keyword] for keyword in EMITS.values() if keyword in given), False)
        options = Options(formats_of(own, given.get("also", ()), name), emit, normed, turned)
        return described(inputs, options, given["impl"], name)

    return describe


def _describe_dequant(*args: Any, **kwargs: Any) -> Described:
    given = bound(dequant_fp8, args, kwargs)
    inputs = DequantInputs(given["values"], given["scales"])
    return described_dequant(inputs, given["group_size"], given["dtype"], given["impl"])


OPERATIONS = {
    function.__name__: Operation(function.__name__, _describe(function), IMPLEMENTATIONS)
    for function in (quant_fp8, rms_norm_quant_fp8, add_rms_norm_quant_fp8, silu_mul_quant_fp8, rope_quant_fp8)
} | {"dequant_fp8": Operation("dequant_fp8", _describe_dequant, DEQUANT_IMPLEMENTATIONS)}
