"""Other libraries' kernels for RMSNorm and FP8 quantisation, measured where they are installed and never required.

Each is called the way its own users call it. Memory that a kernel overwrites is a copy of its own.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from tilewright.bench.providers import FunctionProvider, peer_missing, records_gradients
from tilewright.ops.quant_fp8.format import QuantFormat
from tilewright.ops.rms_norm.call import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.bench.providers import Formulation, Task, Tensors

LIGER = "liger_kernel.ops.rms_norm"
LIGER_SUM = "liger_kernel.ops.fused_add_rms_norm"
FLASH_ATTENTION = "flash_attn.ops.triton.layer_norm"
FLASHINFER = "flashinfer.norm"
QUACK = "quack"
TORCHAO = "torchao.kernel.blockwise_quantization"
TORCHAO_TRAINING = "torchao.prototype.blockwise_fp8_training.kernels"

EPS = Options().eps
"""Added to the mean of squares where a task does not say."""

_LIGER_MAX_COLS = 65536
_FLASH_ATTENTION_MAX_BYTES = 65536
_BLOCK = 128
_BLOCK_MAX_COLS = 16384
_HALVES = (torch.float16, torch.bfloat16)


def norm_providers(exact_sum: Formulation) -> tuple[FunctionProvider, ...]:
    """The peers that compute RMSNorm.

    Args:
        exact_sum: what a peer that rounds after the weight and normalises the exact sum is judged against.
    """
    return (
        FunctionProvider(
            "liger",
            "Liger Kernel's Triton kernels, casting mode 'llama'; without a residual its backward works in place",
            _liger,
            translate=lambda task: task.twin(),  # it overwrites the incoming gradient
            missing=peer_missing(LIGER, "LigerRMSNormFunction"),
            refuses=_liger_refuses,
        ),
        FunctionProvider(
            "flash_attn",
            "flash-attention's Triton kernels",
            _flash_attention,
            formulation=lambda task: exact_sum,
            missing=peer_missing(FLASH_ATTENTION, "rms_norm_fn"),
            refuses=_flash_attention_refuses,
        ),
        *(
            FunctionProvider(
                name,
                f"FlashInfer's kernels, {how} programmatic dependent launch, a residual in place, forward only",
                partial(_flashinfer, pdl),
                translate=lambda task: task.twin(),  # it overwrites x and the residual
                formulation=lambda task: exact_sum,
                missing=peer_missing(FLASHINFER, "rmsnorm"),
                refuses=_flashinfer_refuses,
            )
            for name, how, pdl in (("flashinfer", "without", False), ("flashinfer_pdl", "with", True))
        ),
        FunctionProvider(
            "quack",
            "QuACK's CuTe kernels",
            _quack,
            formulation=lambda task: exact_sum,
            missing=peer_missing(QUACK, "rmsnorm"),
            refuses=_only_up_to_32_bits,
        ),
    )


def quant_providers(block: Formulation, reciprocal: Formulation) -> tuple[FunctionProvider, ...]:
    """The peers that quantise to FP8, alone or behind a norm.

    Args:
        block: what a peer that multiplies the norm of the exact sum by a reciprocal is judged against.
        reciprocal: likewise, of one that quantises alone.
    """
    return (
        FunctionProvider(
            "flashinfer",
            "FlashInfer's fused kernel, without programmatic dependent launch, the residual in place; it writes the "
            "norm too, and scales by columns",
            _flashinfer_block,
            translate=lambda task: task.twin(),  # it overwrites the residual
            formulation=lambda task: block,
            missing=peer_missing(FLASHINFER, "fused_add_rmsnorm_fp8_block_quant"),
            refuses=_flashinfer_block_refuses,
        ),
        FunctionProvider(
            "torchao",
            "torchao's Triton kernel of DeepSeek-V3's act_quant",
            _torchao,
            missing=peer_missing(TORCHAO, "fp8_blockwise_act_quant"),
            refuses=_torchao_refuses,
        ),
        FunctionProvider(
            "torchao_training",
            "torchao's Triton kernel for blockwise FP8 training, scales by columns",
            _torchao_training,
            formulation=lambda task: reciprocal,
            missing=peer_missing(TORCHAO_TRAINING, "triton_fp8_blockwise_act_quant_lhs"),
            refuses=_torchao_refuses,
        ),
    )


def _has_sum(task: Task) -> bool:
    return task.function.startswith("add_")


def _liger(task: Task) -> Callable[..., Any]:
    if _has_sum(task):
        summing = import_module(LIGER_SUM).LigerFusedAddRMSNormFunction
        return lambda x, residual, weight, eps=EPS: summing.apply(x, residual, weight, eps, 0.0, "llama", False)
    function = import_module(LIGER).LigerRMSNormFunction
    return lambda x, weight, eps=EPS: function.apply(x, weight, eps, 0.0, "llama", True, None)


def _only_up_to_32_bits(task: Task) -> str | None:
    return "has no float64" if task.dtype == torch.float64 else None


def _liger_refuses(task: Task) -> str | None:
    if task.args[0].shape[-1] > _LIGER_MAX_COLS:
        return f"takes at most {_LIGER_MAX_COLS} columns"
    return _only_up_to_32_bits(task)


def _flash_attention(task: Task) -> Callable[..., Any]:
    function = import_module(FLASH_ATTENTION).rms_norm_fn
    if _has_sum(task):
        return lambda x, residual, weight, eps=EPS: function(
            x, weight, None, residual=residual, eps=eps, prenorm=True, residual_in_fp32=False
        )
    return lambda x, weight, eps=EPS: function(x, weight, None, eps=eps)


def _flash_attention_refuses(task: Task) -> str | None:
    if task.args[0].shape[-1] * task.dtype.itemsize > _FLASH_ATTENTION_MAX_BYTES:
        return f"takes rows of at most {_FLASH_ATTENTION_MAX_BYTES} bytes"
    return _only_up_to_32_bits(task)


def _flashinfer(pdl: bool, task: Task) -> Callable[..., Any]:
    module = import_module(FLASHINFER)
    if not _has_sum(task):
        return lambda x, weight, eps=EPS: module.rmsnorm(x, weight, eps=eps, enable_pdl=pdl)

    def add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> Tensors:
        module.fused_add_rmsnorm(x, residual, weight, eps, enable_pdl=pdl)
        return x, residual

    return add


def _flashinfer_refuses(task: Task) -> str | None:
    if task.dtype not in _HALVES:
        return "takes float16 and bfloat16 only"
    return "has no backward" if records_gradients(task) else None


def _quack(task: Task) -> Callable[..., Any]:
    function = import_module(QUACK).rmsnorm
    if _has_sum(task):
        return lambda x, residual, weight, eps=EPS: function(x, weight, residual=residual, eps=eps, prenorm=True)
    return lambda x, weight, eps=EPS: function(x, weight, eps=eps)


def _flashinfer_block(task: Task) -> Callable[..., Any]:
    function = import_module(FLASHINFER).fused_add_rmsnorm_fp8_block_quant

    def add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, **_options: Any) -> Tensors:
        rows, cols = x.shape
        values = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(cols // _BLOCK, -(-rows // 4) * 4, dtype=torch.float32, device=x.device)
        function(values, scales, torch.empty_like(x), x, residual, weight, EPS, enable_pdl=False)
        return values, scales.T[:rows], residual

    return add


def _flashinfer_block_refuses(task: Task) -> str | None:
    if not _has_sum(task):
        return "fuses the sum with a residual, the norm and the quantisation"
    if task.dtype not in _HALVES:
        return "takes float16 and bfloat16 only"
    cols = task.args[0].shape[-1]
    step = 256 if cols <= _BLOCK_MAX_COLS // 2 else 512
    if cols > _BLOCK_MAX_COLS or cols % step:
        return f"takes multiples of {step} columns, up to {_BLOCK_MAX_COLS}"
    return _other_format(task)


def _other_format(task: Task) -> str | None:
    """Why a task does not ask for what these peers give: e4m3fn, one fp32 scale for each 128 neighbours."""
    own = QuantFormat()
    options = ("group_size", "scale_format")
    same = all(task.kwargs.get(name, getattr(own, name)) == getattr(own, name) for name in options)
    if not same or "scale" in task.kwargs or task.kwargs.get("also") or task.kwargs.get("return_norm"):
        return "gives one fp32 scale for each 128 neighbours and nothing else"
    if task.kwargs.get("dtype") not in (None, torch.float8_e4m3fn):
        return "gives e4m3fn"
    return None


def _torchao(task: Task) -> Callable[..., Any]:
    function = import_module(TORCHAO).fp8_blockwise_act_quant
    return lambda x, **_options: function(x, _BLOCK, torch.float8_e4m3fn)


def _torchao_training(task: Task) -> Callable[..., Any]:
    function = import_module(TORCHAO_TRAINING).triton_fp8_blockwise_act_quant_lhs
    return lambda x, **_options: function(x, _BLOCK)


def _torchao_refuses(task: Task) -> str | None:
    if task.function != "quant_fp8":
        return "quantises alone, without a norm or an activation"
    if task.args[0].shape[-1] % _BLOCK:
        return f"takes multiples of {_BLOCK} columns"
    return _other_format(task)
