"""vLLM's norms, alone and of a sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tilewright.fusion.graph import same_shape, same_size, value
from tilewright.integrations.vllm_fusion.calls import Unlike, activation, fake, filled, found, updated
from tilewright.integrations.vllm_fusion.rounding import measured
from tilewright.ops.rms_norm.call import MIN_EPS

if TYPE_CHECKING:
    from tilewright.fusion.found import Found
    from tilewright.fusion.functionalized import OperatorCall


def _norm_options(call: OperatorCall, x: torch.Tensor, eps: str) -> dict[str, Any]:
    """What every norm has, once its weight fits."""
    number = call.given[eps]
    if isinstance(number, Node) or not number >= MIN_EPS:
        raise Unlike(f"{eps} is {number}; expected a number of at least {MIN_EPS:.3g}")
    weight = call.given.get("weight")
    if weight is not None:
        held = fake(weight, "weight")
        if held.dim() != 1 or not same_size(held.shape[0], x.shape[-1]):
            raise Unlike(f"weight has shape {tuple(held.shape)}; expected one number for each column of x")
    if call.given.get("variance_size") is not None:
        raise Unlike(f"the mean is of the first {call.given['variance_size']} columns alone (variance_size)")
    return {"eps": float(number), "weight_offset": 0.0}


def _defined_cast(call: OperatorCall, x: torch.Tensor, y: Node | None) -> str:
    """Where the definition of vLLM's norms rounds."""
    weight = call.given["weight"]
    dtype = x.dtype if weight is None else fake(weight, "weight").dtype
    if y is not None and value(y).dtype != x.dtype:
        raise Unlike(f"the result is {value(y).dtype} and x {x.dtype}; expected it rounded to the dtype of x")
    if dtype == x.dtype:
        return "before_weight"
    if dtype != torch.float32:
        raise Unlike(f"the norm is rounded to {dtype} before its weight multiplies, and x is {x.dtype}")
    return "after_weight"


def ir_norm(call: OperatorCall) -> Found:
    """``vllm_ir.rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor``.

    ``vllm/ir/ops/layernorm.py``: in float32; rounded to the weight's dtype before it multiplies, then to that of ``x``.
    """
    x, y = activation(call, "x"), call.node
    options = _norm_options(call, x, "epsilon") | {"cast": _defined_cast(call, x, y)}
    return found("rms_norm", call, {"x": call.given["x"], "weight": call.given["weight"]}, options, {"y": y})


def ir_add_norm(call: OperatorCall) -> Found:
    """``vllm_ir.fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size=None) -> (Tensor, Tensor)``.

    The same file: as the norm, of the sum in float32, which is rounded where it is returned alone. Its overload
    ``maybe_inplace`` may leave anything in the two inputs, which then nobody may read.
    """
    if any(written.after is not None or written.why_not for written in call.written.values()):
        raise Unlike("what is left in x or x_residual is read, and vLLM does not say what that is")
    x, y = _summand(call, "x", "x_residual"), call.returned(0)
    options = _norm_options(call, x, "epsilon") | {"cast": _defined_cast(call, x, y), "residual_rounding": "exact"}
    inputs = {"x": call.given["x"], "residual": call.given["x_residual"], "weight": call.given["weight"]}
    return found("add_rms_norm", call, inputs, options, {"y": y, "stored": call.returned(1)})


def _summand(call: OperatorCall, name: str, residual: str) -> torch.Tensor:
    for each in (name, residual):
        if each in call.written and not call.written[each].is_whole:
            raise Unlike(f"{each} is a view of the tensor that it is written into")
    x, other = activation(call, name), activation(call, residual)
    if x.dtype != other.dtype or not same_shape(x.shape, other.shape):
        raise Unlike(
            f"{name} is {x.dtype}{list(x.shape)} and {residual} {other.dtype}{list(other.shape)}; expected them alike"
        )
    return x


def _measured(call: OperatorCall, x: torch.Tensor) -> tuple[dict[str, str], tuple[str, ...]]:
    """Where a norm rounds, and how that may differ from what it does."""
    weight = call.given.get("weight")
    if weight is not None and fake(weight, "weight").dtype != x.dtype:
        raise Unlike(f"weight is {fake(weight, 'weight').dtype} and x {x.dtype}; expected one dtype")
    form = measured(call.target, x.device, x.dtype)
    cast, residual_rounding = form or ("before_weight", "rounded")
    return {"cast": cast, "residual_rounding": residual_rounding}, () if form else ("norm_rounding",)


def c_norm(call: OperatorCall) -> Found | None:
    """``_C.rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()``, or ``rms_norm_weightless``.

    ``csrc/libtorch_stable/torch_bindings.cpp``, ``layernorm_kernels.cu``; where it rounds is measured.
    """
    x, y = activation(call, "input"), filled(call, "result")
    if y is None:
        return None
    if value(y).dtype != x.dtype:
        raise Unlike(f"result is {value(y).dtype} and input {x.dtype}; expected one dtype")
    options = _norm_options(call, x, "epsilon")
    rounding, differs = _measured(call, x)
    options["cast"] = rounding["cast"]
    inputs = {"x": call.given["input"], "weight": call.given.get("weight")}
    return found("rms_norm", call, inputs, options, {"y": y}, differs)


def c_add_norm(call: OperatorCall) -> Found:
    """``_C.fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()``, or weightless.

    The norm goes into ``input``, the sum into ``residual``. The same files.
    """
    x = _summand(call, "input", "residual")
    outputs = {"y": updated(call, "input"), "stored": updated(call, "residual")}
    options = _norm_options(call, x, "epsilon")
    rounding, differs = _measured(call, x)
    inputs = {"x": call.given["input"], "residual": call.given["residual"], "weight": call.given.get("weight")}
    return found("add_rms_norm", call, inputs, options | rounding, outputs, differs)


def aiter_norm(call: OperatorCall) -> Found:
    """``vllm.rocm_aiter_rms_norm(x, weight, variance_epsilon) -> Tensor`` (``vllm/_aiter_ops.py``)."""
    x = activation(call, "x")
    options = _norm_options(call, x, "variance_epsilon")
    rounding, differs = _measured(call, x)
    options["cast"] = rounding["cast"]
    inputs = {"x": call.given["x"], "weight": call.given["weight"]}
    return found("rms_norm", call, inputs, options, {"y": call.node}, differs)


def aiter_add_norm(call: OperatorCall) -> Found:
    """``vllm.rocm_aiter_rmsnorm2d_fwd_with_add(x, residual, weight, variance_epsilon)``: the norm, the sum."""
    x = _summand(call, "x", "residual")
    options = _norm_options(call, x, "variance_epsilon")
    rounding, differs = _measured(call, x)
    inputs = {"x": call.given["x"], "residual": call.given["residual"], "weight": call.given["weight"]}
    outputs = {"y": call.returned(0), "stored": call.returned(1)}
    return found("add_rms_norm", call, inputs, options | rounding, outputs, differs)
