"""A trained decoder whose blocks compute their linear layers from FP8: for evaluation, as an inference engine does it.

Weights are quantised once, inputs as they come. Where a norm or the gated activation stands in front of a layer, it
quantises its result in the same launch: by a call of the fused function or, in blocks written step by step, by graph
fusion under ``torch.compile``.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn

import tilewright
from tilewright.models.decoder import HyperNorm
from tilewright.models.training import validation_loss

if TYPE_CHECKING:
    from tilewright.fusion import FusionReport
    from tilewright.models.decoder import Block, Cache, Decoder, Norm, Residual, Streams
    from tilewright.models.text import Corpus
    from tilewright.models.training import TrainingRun
    from tilewright.ops.quant_fp8.api import ScaleFormat

SCALE_FORMATS: tuple[ScaleFormat, ...] = ("fp32", "ue8m0")
"""The formats of scales that the demo evaluates."""


def fp8_validation_loss(run: TrainingRun, corpus: Corpus, scale_format: ScaleFormat) -> float:
    """What :func:`tilewright.models.training.validation_loss` says of the same training, its blocks in FP8.

    Args:
        run: a training in float32 or bfloat16.
        corpus: what it learnt from.
        scale_format: of all scales, as in :func:`tilewright.quant_fp8`.
    """
    return validation_loss(replace(run, model=quantised(run.model, run.dtype, scale_format)), corpus)


def compiled_validation_loss(run: TrainingRun, corpus: Corpus, scale_format: ScaleFormat) -> tuple[float, FusionReport]:
    """The same of blocks written step by step and compiled, and what graph fusion made of them.

    Args:
        run: as in :func:`fp8_validation_loss`.
        corpus: as in :func:`fp8_validation_loss`.
        scale_format: as in :func:`fp8_validation_loss`.
    """
    model = quantised(run.model, run.dtype, scale_format, fused=False)
    layers = model.config.layers
    expect = {"rms_norm_quant": 1, "add_rms_norm_quant": 2 * layers - 1, "silu_mul_quant": layers}
    compiled = tilewright.compile(model.loss, expect=expect)
    model.loss = compiled  # type: ignore[method-assign]
    with torch.no_grad():
        loss = validation_loss(replace(run, model=model), corpus)
    return loss, compiled.fusion_report


def quantised(model: Decoder, dtype: torch.dtype, scale_format: ScaleFormat, *, fused: bool = True) -> Decoder:
    """A copy of a decoder that computes the linear layers of its blocks from FP8. It has no gradients.

    Args:
        model: a decoder with float32 weights.
        dtype: of what the layers return: float32, or bfloat16 for a decoder that runs under autocast.
        scale_format: of all scales, as in :func:`tilewright.quant_fp8`.
        fused: whether blocks call the fused functions; else they are written step by step, with the same results.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    blocks = (cast("Block", block) for block in model.blocks)
    model.blocks = nn.ModuleList(Fp8Block(block, dtype, scale_format, fused=fused) for block in blocks)
    return model


class Fp8Linear(nn.Module):
    """A linear layer from FP8. In weight and input 128 neighbours along the input dimension share a scale."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, scale_format: ScaleFormat) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = tilewright.quant_fp8(linear.weight.detach(), scale_format=scale_format)

    def forward(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """[..., n_in] in FP8 and its scales to [..., n_out]."""
        with torch.autocast(values.device.type, enabled=False):  # the product is defined in float32
            return tilewright.scaled_mm_fp8((values, scales), self.weight, dtype=self.dtype)


class Fp8Block(nn.Module):
    """Stands in for a :class:`tilewright.models.decoder.Block`."""

    def __init__(self, block: Block, dtype: torch.dtype, scale_format: ScaleFormat, *, fused: bool = True) -> None:
        super().__init__()
        self.scale_format, self.fused = scale_format, fused
        self.attention_norm, self.attention, self.ffn_norm = block.attention_norm, block.attention, block.ffn_norm
        self.qkv, self.out, self.gate_up, self.down = (
            Fp8Linear(linear, dtype, scale_format)
            for linear in (block.attention.qkv, block.attention.out, block.ffn.gate_up, block.ffn.down)
        )

    def forward(
        self,
        x: torch.Tensor,
        residual: Residual,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, Residual]:
        """As the block it stands for."""
        normed, residual = self._norm(self.attention_norm, x, residual)
        y = self.attention.attend(self.qkv(*normed), cos, sin, cache)
        x = self.out(*tilewright.quant_fp8(y, scale_format=self.scale_format))
        normed, residual = self._norm(self.ffn_norm, x, residual)
        return self.down(*self._activated(self.gate_up(*normed))), residual

    def _activated(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and scales of the gated activation."""
        if self.fused:
            activated = tilewright.silu_mul_quant_fp8(gate_up, scale_format=self.scale_format)
            return activated.values, activated.scales
        gate, up = gate_up.chunk(2, dim=-1)
        return tilewright.quant_fp8(F.silu(gate) * up, scale_format=self.scale_format)

    def _norm(
        self, norm: Norm | HyperNorm, x: torch.Tensor, residual: Residual
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Residual]:
        """Values and scales of the norm, and the residual stream or streams."""
        if isinstance(norm, HyperNorm):  # whose norm is fused with the streams instead
            y, streams = norm(x, cast("Streams | None", residual))
            normed = tilewright.quant_fp8(y, scale_format=self.scale_format)
            return (normed.values, normed.scales), streams
        if not self.fused:
            return self._norm_by_steps(norm, x, cast("torch.Tensor | None", residual))
        if residual is None:
            first = tilewright.rms_norm_quant_fp8(x, norm.weight, norm.eps, scale_format=self.scale_format)
            return (first.values, first.scales), x
        stream = cast("torch.Tensor", residual)
        added = tilewright.add_rms_norm_quant_fp8(x, stream, norm.weight, norm.eps, scale_format=self.scale_format)
        return (added.values, added.scales), added.residual

    def _norm_by_steps(
        self, norm: Norm, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        if residual is None:
            y, stream = tilewright.rms_norm(x, norm.weight, norm.eps), x
        else:
            y, stream = tilewright.add_rms_norm(x, residual, norm.weight, norm.eps)
        return tilewright.quant_fp8(y, scale_format=self.scale_format), stream
