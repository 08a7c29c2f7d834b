"""vLLM's own operators in a graph, read as what the rules of graph fusion understand.

What each does was read in vllm-project/vllm; the readers name the files. Schemas are those of
``csrc/libtorch_stable/torch_bindings.cpp`` and, before it, ``csrc/torch_bindings.cpp``; those of ``vllm_ir`` follow
from the signatures of their definitions (``infer_schema`` in ``vllm/ir/op.py``), and those of ``vllm`` from the
functions given to ``direct_register_custom_op``. Operators of ``vllm_ir`` are read as their definition, whichever
kernel vLLM would put in their place later.

``log2`` may round the logarithm of a number barely above a power of two down to the power's, as in plain PyTorch (see
``fusion/recognise/aten_quant.py``): there an operator that rounds scales up by it has half of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright.errors import TilewrightError
from tilewright.fusion.found import Found, NearMiss
from tilewright.fusion.functionalized import call_of, target_of
from tilewright.fusion.graph import value
from tilewright.integrations.vllm_fusion.calls import Unlike, activation, filled, found
from tilewright.integrations.vllm_fusion.norms import (
    aiter_add_norm,
    aiter_norm,
    c_add_norm,
    c_norm,
    ir_add_norm,
    ir_norm,
)
from tilewright.integrations.vllm_fusion.quantisations import (
    AITER_GROUPS,
    by_group,
    c_group,
    c_group_packed,
    c_per_token,
    c_static,
    ir_dynamic,
    ir_group,
    ir_static,
    per_tensor,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload
    from torch.fx import Graph, Node

    from tilewright.fusion.functionalized import OperatorCall

_NAMESPACES = ("vllm_ir", "_C", "vllm")


def recognise(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """Every call of an operator of vLLM's that some rule is about, and those that no rule can take, with the reason.

    Args:
        graph: as Inductor hands it to a custom pass: calls that write are inside ``auto_functionalized`` or
            ``auto_functionalized_v2``.
    """
    known: list[Found] = []
    misses: list[NearMiss] = []
    for node in graph.nodes:
        target = target_of(node)
        if target is None or target.namespace not in _NAMESPACES:
            continue
        operator = OPERATORS.get(target._schema.name.replace("::", "."))
        if operator is None:
            continue
        try:
            each = _read(node, target, operator)
        except Unlike as reason:
            misses.append(NearMiss(operator.kind, node, str(reason)))
        except (TilewrightError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            misses.append(NearMiss(operator.kind, node, f"cannot be read: {type(error).__name__}: {error}"))
        else:
            known += [] if each is None else [each]
    return known, misses


def _read(node: Node, target: OpOverload, operator: _Operator) -> Found | None:
    name = target._schema.name
    if target._schema.is_mutable and node.target is target:
        raise Unlike("it writes into its arguments, and the graph is not functional")
    if target._overloadname not in operator.overloads:
        raise Unlike(f"the overload '{target._overloadname}' of {name} is not known")
    arguments = " ".join(argument.name for argument in target._schema.arguments)
    if arguments not in operator.arguments:
        raise Unlike(f"{name} has arguments that are not known: {arguments}; expected {operator.arguments[0]}")
    return operator.read(call_of(node))


def _ir_silu(call: OperatorCall) -> Found:
    """``vllm_ir.silu_and_mul(Tensor x) -> Tensor`` (``vllm/ir/ops/activation.py``)."""
    activation(call, "x")
    return found("silu_mul", call, {"x": call.given["x"]}, {}, {"y": call.node})


def _c_silu(call: OperatorCall) -> Found | None:
    """``_C.silu_and_mul(Tensor! result, Tensor input) -> ()``: silu is rounded, and so is the product.

    ``csrc/libtorch_stable/activation_kernels.cu``.
    """
    x, y = activation(call, "input"), filled(call, "result")
    if y is not None and value(y).dtype != x.dtype:
        raise Unlike(f"result is {value(y).dtype} and input {x.dtype}; expected one dtype")
    return None if y is None else found("silu_mul", call, {"x": call.given["input"]}, {}, {"y": y})


def _unlike(reason: str) -> Callable[[OperatorCall], Found | None]:
    def read(call: OperatorCall) -> Found | None:
        raise Unlike(reason)

    return read


_ROPE = _unlike(
    "one launch turns query and key already, in place and by rows of cosines beside sines; no rule takes that together "
    "with what comes before it"
)
_UNKNOWN_SCALE = "how it computes its scale is not known to be what a policy can say"


@dataclass(frozen=True)
class _Operator:
    """What is known of an operator.

    Attributes:
        kind: of what is found.
        read: reads a call; gives None where nobody needs what it computes.
        arguments: their names, of each schema that the operator has had.
        overloads: those that are read.
    """

    kind: str
    read: Callable[[OperatorCall], Found | None]
    arguments: tuple[str, ...]
    overloads: tuple[str, ...]


def _known(
    kind: str,
    read: Callable[[OperatorCall], Found | None],
    *arguments: str,
    overloads: tuple[str, ...] = ("default",),
) -> _Operator:
    return _Operator(kind, read, arguments, overloads)


_BY_GROUP = "input output_q output_s group_size eps fp8_min fp8_max scale_ue8m0"
_ROTATED = "positions query key head_size"
OPERATORS = {
    "vllm_ir.rms_norm": _known("rms_norm", ir_norm, "x weight epsilon variance_size"),
    "vllm_ir.fused_add_rms_norm": _known(
        "add_rms_norm",
        ir_add_norm,
        "x x_residual weight epsilon variance_size",
        overloads=("default", "maybe_inplace"),
    ),
    "vllm_ir.static_quant_fp8": _known("quant_fp8", ir_static, "x scale fp8_dtype num_token_padding"),
    "vllm_ir.dynamic_quant_fp8": _known("quant_fp8", ir_dynamic, "x per_token fp8_dtype scale_ub num_token_padding"),
    "vllm_ir.dynamic_group_quant_fp8": _known(
        "quant_fp8", ir_group, "x group_shape column_major use_ue8m0 fp8_dtype scale_alignment"
    ),
    "vllm_ir.silu_and_mul": _known("silu_mul", _ir_silu, "x"),
    "vllm_ir.rotary_embedding": _known(
        "rope", _ROPE, f"{_ROTATED} rotary_dim cos_sin_cache is_neox_style offsets cos_sin_format"
    ),
    "_C.rms_norm": _known("rms_norm", c_norm, "result input weight epsilon"),
    "_C.rms_norm_weightless": _known("rms_norm", c_norm, "result input epsilon"),
    "_C.fused_add_rms_norm": _known("add_rms_norm", c_add_norm, "input residual weight epsilon"),
    "_C.fused_add_rms_norm_weightless": _known("add_rms_norm", c_add_norm, "input residual epsilon"),
    "_C.static_scaled_fp8_quant": _known("quant_fp8", c_static, "result input scale group_shape", "result input scale"),
    "_C.dynamic_scaled_fp8_quant": _known("quant_fp8", per_tensor, "result input scale"),
    "_C.dynamic_per_token_scaled_fp8_quant": _known("quant_fp8", c_per_token, "result input scale scale_ub"),
    "_C.per_token_group_fp8_quant": _known(
        "quant_fp8", c_group, f"{_BY_GROUP} dummy_is_scale_transposed dummy_is_tma_aligned", _BY_GROUP
    ),
    "_C.per_token_group_fp8_quant_packed": _known(
        "quant_fp8", c_group_packed, "input output_q output_s_packed group_size eps fp8_min fp8_max"
    ),
    "_C.silu_and_mul": _known("silu_mul", _c_silu, "result input"),
    "_C.rotary_embedding": _known(
        "rope",
        _ROPE,
        f"{_ROTATED} cos_sin_cache is_neox rope_dim_offset inverse",
        f"{_ROTATED} cos_sin_cache is_neox",
    ),
    "vllm.triton_per_token_group_quant_fp8": _known("quant_fp8", by_group("vllm_cuda"), "x group_size"),
    "vllm.rocm_aiter_rms_norm": _known("rms_norm", aiter_norm, "x weight variance_epsilon"),
    "vllm.rocm_aiter_rmsnorm2d_fwd_with_add": _known(
        "add_rms_norm", aiter_add_norm, "x residual weight variance_epsilon"
    ),
    "vllm.rocm_aiter_group_fp8_quant": _known("quant_fp8", by_group(AITER_GROUPS, "scale_rounding"), "x group_size"),
    "vllm.rocm_aiter_per_token_quant": _known("quant_fp8", _unlike(_UNKNOWN_SCALE), "x quant_dtype scale"),
    "vllm.rocm_aiter_per_tensor_quant": _known("quant_fp8", per_tensor, "x quant_dtype scale"),
}
"""By name, without the overload's."""
