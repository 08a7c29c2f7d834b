"""vLLM's operators for tests: its schemas, and what each computes, in plain PyTorch.

Schemas: vllm-project/vllm, ``csrc/libtorch_stable/torch_bindings.cpp`` for ``_C``; ``vllm/ir/ops/layernorm.py``,
``quant.py`` and ``activation.py`` for ``vllm_ir``, by ``torch.library.infer_schema``; ``vllm/_aiter_ops.py`` and
``vllm/model_executor/layers/quantization/utils/fp8_utils.py`` for ``vllm``. Computations are written from the formulas.
"""

import torch

FP8 = torch.float8_e4m3fn
MAX = 448.0
LEAST = 1.0 / (MAX * 512.0)

SCHEMAS = {
    "vllm_ir": {
        "rms_norm": "(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor",
        "fused_add_rms_norm": "(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None)"
        " -> (Tensor, Tensor)",
        "fused_add_rms_norm.maybe_inplace": "(Tensor(a0!) x, Tensor(a1!) x_residual, Tensor? weight, float epsilon, "
        "SymInt? variance_size=None) -> (Tensor, Tensor)",
        "static_quant_fp8": "(Tensor x, Tensor scale, ScalarType fp8_dtype, SymInt? num_token_padding=None) -> Tensor",
        "dynamic_quant_fp8": "(Tensor x, bool per_token, ScalarType fp8_dtype, Tensor? scale_ub=None, "
        "SymInt? num_token_padding=None) -> (Tensor, Tensor)",
        "dynamic_group_quant_fp8": "(Tensor x, SymInt[] group_shape, bool column_major, bool use_ue8m0, "
        "ScalarType fp8_dtype, SymInt scale_alignment=1) -> (Tensor, Tensor)",
        "silu_and_mul": "(Tensor x) -> Tensor",
    },
    "_C": {
        "rms_norm": "(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()",
        "fused_add_rms_norm": "(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
        "rms_norm_weightless": "(Tensor! result, Tensor input, float epsilon) -> ()",
        "fused_add_rms_norm_weightless": "(Tensor! input, Tensor! residual, float epsilon) -> ()",
        "static_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
        "dynamic_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor! scale) -> ()",
        "dynamic_per_token_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        "per_token_group_fp8_quant": "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
        "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned )"
        " -> ()",
        "per_token_group_fp8_quant_packed": "(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, "
        "float eps, float fp8_min, float fp8_max) -> ()",
        "silu_and_mul": "(Tensor! result, Tensor input) -> ()",
        "rotary_embedding": "(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
        "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
    },
    "vllm": {
        "triton_per_token_group_quant_fp8": "(Tensor x, SymInt group_size) -> (Tensor, Tensor)",
        "rocm_aiter_group_fp8_quant": "(Tensor x, SymInt group_size) -> (Tensor, Tensor)",
        "rocm_aiter_per_token_quant": "(Tensor x, ScalarType quant_dtype, Tensor? scale=None) -> (Tensor, Tensor)",
        "rocm_aiter_rms_norm": "(Tensor x, Tensor weight, float variance_epsilon) -> Tensor",
        "rocm_aiter_rmsnorm2d_fwd_with_add": "(Tensor x, Tensor residual, Tensor weight, float variance_epsilon) -> "
        "(Tensor, Tensor)",
    },
}

# What the norms of _C do, which has changed.
ROUNDING = {"cast": "before_weight", "sum": "rounded"}


def norm(z, weight, epsilon, dtype, cast):
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + epsilon)
    if weight is None:
        return y.to(dtype)
    return y.to(dtype) * weight if cast == "before_weight" else (y * weight.float()).to(dtype)


def ir_rms_norm(x, weight, epsilon, variance_size=None):
    z = x.float()
    part = z if variance_size is None else z[..., :variance_size]
    y = z * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + epsilon)
    return (y if weight is None else y.to(weight.dtype) * weight).to(x.dtype)


def ir_fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size=None):
    z = x.float() + x_residual.float()
    y = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + epsilon)
    return (y if weight is None else y.to(weight.dtype) * weight).to(x.dtype), z.to(x.dtype)


def by_reciprocal(x, scale, dtype=FP8):
    return (x.float() * scale.reciprocal()).clamp(-MAX, MAX).to(dtype)


def by_division(x, scale, dtype=FP8):
    return (x.float() / scale).clamp(-MAX, MAX).to(dtype)


def ir_static_quant_fp8(x, scale, fp8_dtype, num_token_padding=None):
    return by_reciprocal(x, scale, fp8_dtype)


def token_scale(x):
    return (x.abs().amax(-1, keepdim=True).float() / MAX).clamp(min=LEAST)


def ir_dynamic_quant_fp8(x, per_token, fp8_dtype, scale_ub=None, num_token_padding=None):
    scale = token_scale(x if per_token else x.flatten())
    return by_reciprocal(x, scale, fp8_dtype), scale


def ir_dynamic_group_quant_fp8(x, group_shape, column_major, use_ue8m0, fp8_dtype, scale_alignment=1):
    grouped = x.unflatten(-1, (-1, group_shape[-1]))
    scale = grouped.abs().amax(-1, keepdim=True).float() / MAX
    if use_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.clamp(min=LEAST)
    scales = scale.squeeze(-1)
    if column_major:
        scales = scales.transpose(-2, -1).contiguous().transpose(-1, -2)
    return by_division(grouped, scale, fp8_dtype).flatten(-2), scales


def silu_and_mul(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def group_scale(x, group_size, eps, maximum, ue8m0):
    scale = x.float().unflatten(-1, (-1, group_size)).abs().amax(-1, keepdim=True).clamp(min=eps) / maximum
    return torch.exp2(torch.ceil(torch.log2(scale.clamp(min=1e-10)))) if ue8m0 else scale


def c_silu_and_mul(result, input):
    result.copy_(silu_and_mul(input))


def c_rms_norm(result, input, weight, epsilon):
    result.copy_(norm(input.float(), weight, epsilon, input.dtype, ROUNDING["cast"]))


def c_fused_add_rms_norm(input, residual, weight, epsilon):
    z = input.float() + residual.float()
    residual.copy_(z)
    taken = z.to(input.dtype).float() if ROUNDING["sum"] == "rounded" else z
    input.copy_(norm(taken, weight, epsilon, input.dtype, ROUNDING["cast"]))


def c_static_scaled_fp8_quant(result, input, scale, group_shape=None):
    result.copy_(by_reciprocal(input, scale, result.dtype))


def c_dynamic_scaled_fp8_quant(result, input, scale):
    scale.copy_(token_scale(input.flatten()))
    result.copy_(by_reciprocal(input, scale))


def c_dynamic_per_token_scaled_fp8_quant(result, input, scale, scale_ub=None):
    computed = token_scale(input)
    scale.copy_(computed)
    result.copy_(by_division(input, computed))


def c_per_token_group_fp8_quant(
    input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, transposed=False, aligned=False
):
    scale = group_scale(input, group_size, eps, fp8_max, scale_ue8m0)
    output_s.copy_(scale.squeeze(-1))
    values = (input.float().unflatten(-1, (-1, group_size)) / scale).clamp(fp8_min, fp8_max)
    output_q.copy_(values.flatten(-2).to(output_q.dtype))


def c_per_token_group_fp8_quant_packed(input, output_q, output_s_packed, group_size, eps, fp8_min, fp8_max):
    scale = group_scale(input, group_size, eps, fp8_max, True)
    exponents = (scale.squeeze(-1).view(torch.int32) >> 23).to(torch.uint8)
    words = torch.nn.functional.pad(exponents, (0, -exponents.shape[-1] % 4)).contiguous().view(torch.int32)
    output_s_packed.copy_(words)
    values = (input.float().unflatten(-1, (-1, group_size)) / scale).clamp(fp8_min, fp8_max)
    output_q.copy_(values.flatten(-2).to(output_q.dtype))


def triton_per_token_group_quant_fp8(x, group_size):
    scale = group_scale(x, group_size, 1e-10, MAX, False)
    return by_division(x.unflatten(-1, (-1, group_size)), scale).flatten(-2), scale.squeeze(-1)


def rocm_aiter_group_fp8_quant(x, group_size):
    amax = x.float().unflatten(-1, (-1, group_size)).abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = amax * torch.tensor(1.0 / MAX)
    return by_reciprocal(x.unflatten(-1, (-1, group_size)), scale).flatten(-2), scale.squeeze(-1)


IMPLEMENTATIONS = {
    "vllm_ir": {
        "rms_norm": ir_rms_norm,
        "fused_add_rms_norm": ir_fused_add_rms_norm,
        "fused_add_rms_norm.maybe_inplace": ir_fused_add_rms_norm,
        "static_quant_fp8": ir_static_quant_fp8,
        "dynamic_quant_fp8": ir_dynamic_quant_fp8,
        "dynamic_group_quant_fp8": ir_dynamic_group_quant_fp8,
        "silu_and_mul": silu_and_mul,
    },
    "_C": {
        "rms_norm": c_rms_norm,
        "fused_add_rms_norm": c_fused_add_rms_norm,
        "rms_norm_weightless": lambda result, input, epsilon: c_rms_norm(result, input, None, epsilon),
        "fused_add_rms_norm_weightless": lambda input, residual, epsilon: c_fused_add_rms_norm(
            input, residual, None, epsilon
        ),
        "static_scaled_fp8_quant": c_static_scaled_fp8_quant,
        "dynamic_scaled_fp8_quant": c_dynamic_scaled_fp8_quant,
        "dynamic_per_token_scaled_fp8_quant": c_dynamic_per_token_scaled_fp8_quant,
        "per_token_group_fp8_quant": c_per_token_group_fp8_quant,
        "per_token_group_fp8_quant_packed": c_per_token_group_fp8_quant_packed,
        "silu_and_mul": c_silu_and_mul,
        "rotary_embedding": lambda *args: None,
    },
    "vllm": {
        "triton_per_token_group_quant_fp8": triton_per_token_group_quant_fp8,
        "rocm_aiter_group_fp8_quant": rocm_aiter_group_fp8_quant,
        "rocm_aiter_per_token_quant": lambda x, quant_dtype, scale=None: ir_dynamic_quant_fp8(x, True, quant_dtype),
        "rocm_aiter_rms_norm": lambda x, weight, eps: norm(x.float(), weight, eps, x.dtype, ROUNDING["cast"]),
        "rocm_aiter_rmsnorm2d_fwd_with_add": ir_fused_add_rms_norm,
    },
}


_LIBRARIES = []
"""What has been defined, for as long as the process lives: torch does not take it well if operators go away."""


def define(namespace, name, schema, function):
    """One operator; a second time, nothing happens."""
    operator = getattr(getattr(torch.ops, namespace), name.partition(".")[0], None)
    if operator is not None and (name.partition(".")[2] or "default") in operator.overloads():
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    library.define(name + schema)
    library.impl(name, function, "CPU")
    if namespace != "_C":
        torch.library.register_fake(f"{namespace}::{name}", function, lib=library)


def define_all():
    for namespace, each in SCHEMAS.items():
        for name, schema in each.items():
            define(namespace, name, schema, IMPLEMENTATIONS[namespace][name])
