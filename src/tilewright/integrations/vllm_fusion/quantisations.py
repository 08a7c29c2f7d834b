"""vLLM's quantisations to FP8."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tilewright.errors import TilewrightError
from tilewright.fusion.graph import same_size, value
from tilewright.integrations.vllm_fusion.calls import Unlike, activation, fake, filled, found
from tilewright.ops.quant_fp8.format import DTYPES, POLICIES, QuantFormat, QuantPolicy, checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.fusion.found import Found
    from tilewright.fusion.functionalized import OperatorCall

AITER_GROUPS = QuantPolicy(amax_floor=1e-10, scale_floor=0.0, apply="reciprocal", fnuz_maximum=240.0)
"""ROCm/aiter, ``dynamic_per_group_scaled_quant_kernel`` of ``csrc/kernels/quant_kernels.cu``, which
``vllm.rocm_aiter_group_fp8_quant`` calls; but for its scale, ``amax * (1 / maximum)``: ``scale_rounding``."""


def _quant(
    call: OperatorCall,
    x: str,
    outputs: dict[str, Node | None],
    form: QuantFormat,
    scale: Node | None = None,
    differs: tuple[str, ...] = (),
) -> Found | None:
    if not any(outputs.values()):
        return None
    if form.dtype not in DTYPES.values():
        raise Unlike(f"the values are {form.dtype}; expected one of {', '.join(map(str, DTYPES.values()))}")
    size = activation(call, x).shape[-1]
    if form.group_size is not None and scale is None and not isinstance(size, int):
        raise Unlike(f"the size of {x}'s rows is symbolic: mark the last dimension as static")
    try:
        form = checked(form, torch.device("cpu"), "quant_fp8")
    except TilewrightError as error:
        raise Unlike(str(error)) from error
    inputs = {"x": call.given[x], "scale": scale}
    return found("quant_fp8", call, inputs, {"format": form}, outputs, differs)


def _given_scale(call: OperatorCall) -> Node:
    scale = call.given["scale"]
    held = fake(scale, "scale")
    if held.dtype != torch.float32 or not all(isinstance(size, int) and size == 1 for size in held.shape):
        raise Unlike(f"scale is {held.dtype}{list(held.shape)}; expected one float32 number for the whole tensor")
    assert isinstance(scale, Node)
    return scale


def _without(call: OperatorCall, *names: str) -> None:
    """Refuse arguments that change what is computed."""
    for name in names:
        if call.given.get(name) is not None:
            raise Unlike(f"{name} is given, which quant_fp8 has no argument for")


def ir_static(call: OperatorCall) -> Found | None:
    """``vllm_ir.static_quant_fp8(x, scale, fp8_dtype, num_token_padding=None) -> Tensor`` (``vllm/ir/ops/quant.py``).

    ``x * (1 / scale)`` in float32.
    """
    _without(call, "num_token_padding")
    form = QuantFormat(dtype=call.given["fp8_dtype"], policy="vllm_native_per_token")
    return _quant(call, "x", {"values": call.node}, form, _given_scale(call))


def ir_dynamic(call: OperatorCall) -> Found | None:
    """``vllm_ir.dynamic_quant_fp8(x, per_token, fp8_dtype, scale_ub=None, num_token_padding=None)``, the same file.

    Scales of at least ``1 / (maximum * 512)``, then as by a given one.
    """
    _without(call, "num_token_padding", "scale_ub")
    if not call.given["per_token"]:
        raise Unlike("one scale is computed for the whole tensor; expected one for each token or group")
    form = QuantFormat(None, dtype=call.given["fp8_dtype"], policy="vllm_native_per_token")
    return _quant(call, "x", {"values": call.returned(0), "scales": call.returned(1)}, form)


def ir_group(call: OperatorCall) -> Found | None:
    """``vllm_ir.dynamic_group_quant_fp8(x, group_shape, column_major, use_ue8m0, fp8_dtype, scale_alignment=1)``.

    The same file: least scales as per token, and quotients. A power of two is not rounded up again where the least
    scale takes its place, which our kernels do: ``ue8m0_floor``.
    """
    shape = list(call.given["group_shape"])
    if any(size != 1 for size in shape[:-1]):
        raise Unlike(f"groups have shape {shape}; expected parts of one row")
    powers = bool(call.given["use_ue8m0"])
    scales = call.returned(1)
    form = QuantFormat(
        shape[-1],
        "ue8m0_fp32" if powers else "fp32",
        _layout(scales),
        call.given["fp8_dtype"],
        "vllm_native",
    )
    outputs = {"values": call.returned(0), "scales": scales}
    return _quant(call, "x", outputs, form, differs=("ue8m0_floor",) if powers else ())


def c_static(call: OperatorCall) -> Found | None:
    """``_C.static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()``.

    ``csrc/libtorch_stable/quantization/w8a8/fp8/common.cu``: ``x * (1 / scale)``; one scale serves the whole tensor,
    whatever the shape of groups says.
    """
    values = filled(call, "result")
    form = QuantFormat(dtype=fake(call.given["result"], "result").dtype, policy="vllm_native_per_token")
    return _quant(call, "input", {"values": values}, form, _given_scale(call))


def per_tensor(call: OperatorCall) -> Found | None:
    """Such as ``_C.dynamic_scaled_fp8_quant``, the same file."""
    raise Unlike("one scale is computed for the whole tensor; expected one for each token or group")


def c_per_token(call: OperatorCall) -> Found | None:
    """``_C.dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()``.

    The same file: scales of at least ``1 / (maximum * 512)``; quotients (``scaled_fp8_conversion<false>`` in
    ``csrc/quantization/w8a8/fp8/common.cuh``), unlike vLLM's native definition.
    """
    _without(call, "scale_ub")
    outputs = {"values": filled(call, "result"), "scales": filled(call, "scale")}
    form = QuantFormat(None, dtype=fake(call.given["result"], "result").dtype, policy="vllm_native")
    return _quant(call, "input", outputs, form)


def _group_policy(call: OperatorCall, dtype: torch.dtype) -> QuantPolicy:
    low, high, eps = (call.given[name] for name in ("fp8_min", "fp8_max", "eps"))
    if low != -high:
        raise Unlike(f"values are clamped to {low} and {high}; expected one number")
    policy = replace(POLICIES["vllm_cuda"], amax_floor=float(eps))
    return policy if policy.maximum_of(dtype) == high else replace(policy, maximum=float(high))


def c_group(call: OperatorCall) -> Found | None:
    """``_C.per_token_group_fp8_quant(input, output_q!, output_s!, group_size, eps, fp8_min, fp8_max, scale_ue8m0)``.

    ``csrc/libtorch_stable/quantization/w8a8/fp8/per_token_group_quant.cu``: amax of at least ``eps``, then
    ``exp2(ceil(log2(max(scale, 1e-10))))`` for powers of two; quotients. Scales lie as the strides of ``output_s`` say;
    two more arguments of later versions, ``dummy_is_...``, repeat that.
    """
    outputs = {"values": filled(call, "output_q"), "scales": filled(call, "output_s")}
    dtype = fake(call.given["output_q"], "output_q").dtype
    form = QuantFormat(
        call.given["group_size"],
        "ue8m0_fp32" if call.given["scale_ue8m0"] else "fp32",
        _layout(outputs["scales"]),
        dtype,
        _group_policy(call, dtype),
    )
    return _quant(call, "input", outputs, form)


def c_group_packed(call: OperatorCall) -> Found | None:
    """``_C.per_token_group_fp8_quant_packed``, the same file: four exponents in an int32, for DeepGEMM."""
    outputs = {"values": filled(call, "output_q"), "scales": filled(call, "output_s_packed")}
    dtype = fake(call.given["output_q"], "output_q").dtype
    form = QuantFormat(call.given["group_size"], "ue8m0_packed", "tma_aligned", dtype, _group_policy(call, dtype))
    return _quant(call, "input", outputs, form)


def by_group(policy: QuantPolicy | str, *differs: str) -> Callable[[OperatorCall], Found | None]:
    """A reader of ``(x, group_size) -> (values, scales)``."""

    def read(call: OperatorCall) -> Found | None:
        outputs = {"values": call.returned(0), "scales": call.returned(1)}
        dtype = value(call.node)[0].dtype
        form = QuantFormat(call.given["group_size"], dtype=dtype, policy=policy)
        return _quant(call, "x", outputs, form, differs=differs)

    return read


def _layout(scales: Node | None) -> str:
    """How scales lie in memory, by their strides: also those of a size of one, which other kernels may look at."""
    if scales is None or value(scales).dim() < 2:
        return "row"
    (rows, groups), strides = value(scales).shape[-2:], value(scales).stride()
    if not same_size(strides[-2], 1) or (same_size(groups, 1) and same_size(strides[-1], 1)):
        return "row"
    return "column" if same_size(strides[-1], rows) else "tma_aligned"
