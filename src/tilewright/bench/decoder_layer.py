"""A dense decoder layer as DeepSeek-V3.2 has it, its linear layers in FP8: what graph fusion is measured on.

It is written twice, in the library's operators and in plain PyTorch as models have it, and never calls a fused
operator: fusion has to find them. The tokens are one sequence without a cache. What an engine does around such a graph,
the choice of tokens by the indexer and the sums over several GPUs, is no part of it: the indexer's queries, keys and
weights are results.

Source of the sizes: the published configuration of DeepSeek-V3.2-Exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import tilewright
from tilewright.bench.fp8_linear import (
    E4M3_MAX,
    GROUP,
    LEAST_AMAX,
    by_rows,
    dequantised,
    fp8_linear,
    quantised_blocks,
)

EPS = 1e-6
FIRST = 1000
"""The first token's position: at 0 nothing would be rotated."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer.

    Attributes:
        hidden: of the residual stream.
        q_rank: of the latent queries.
        kv_rank: of the latent keys and values.
        heads: of attention.
        nope: features of a head that are not rotated.
        rotated: features of a head that are, and of the indexer's heads.
        value: features of a value.
        index_heads: of the indexer.
        index: features of an indexer's head.
        ffn: of the feed-forward layer.
    """

    hidden: int = 7168
    q_rank: int = 1536
    kv_rank: int = 512
    heads: int = 128
    nope: int = 128
    rotated: int = 64
    value: int = 128
    index_heads: int = 64
    index: int = 128
    ffn: int = 18432


class Results(NamedTuple):
    """What a layer returns.

    Attributes:
        y: ``[1, T, hidden]``, what the next layer adds to the residual stream.
        residual: ``[1, T, hidden]``.
        index_q: the indexer's queries ``[T * index_heads, index]`` in FP8.
        index_q_scales: their scales.
        index_k: the indexer's keys ``[T, index]`` in FP8.
        index_k_scales: their scales.
        index_weights: ``[1, T, index_heads]``, of the indexer's heads.
    """

    y: torch.Tensor
    residual: torch.Tensor
    index_q: torch.Tensor
    index_q_scales: torch.Tensor
    index_k: torch.Tensor
    index_k_scales: torch.Tensor
    index_weights: torch.Tensor


class LayerInputs(NamedTuple):
    """What a layer is called with.

    Attributes:
        x: ``[1, T, hidden]``, what the layer before returned.
        residual: ``[1, T, hidden]``.
        cos: ``[T, rotated]`` float32, both halves equal.
        sin: likewise.
    """

    x: torch.Tensor
    residual: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Parts:
    """The operations of a layer, in the library's operators."""

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of rows."""
        return tilewright.rms_norm(x, weight, eps=EPS)

    @staticmethod
    def quant(x: torch.Tensor, *, columns: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """FP8 values ``[rows, K]`` of rows, and their scales ``[rows, K / 128]``, float32, if asked by columns."""
        values, scales = tilewright.quant_fp8(x, group_size=GROUP, scale_layout="column" if columns else "row")
        return values, scales

    @staticmethod
    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The rotation of ``[1, T, heads, rotated]``."""
        return tilewright.rope(x, cos, sin)

    @classmethod
    def linear(cls, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The product of rows, quantised, and a weight in FP8, which has a scale for each of its blocks."""
        y: torch.Tensor = fp8_linear(*cls.quant(x, columns=True), weight, scales)
        return y


class PlainParts(Parts):
    """The same operations as models write them in PyTorch."""

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of rows, rounded before the weight multiplies."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * wide.to(x.dtype)

    @staticmethod
    def quant(x: torch.Tensor, *, columns: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """FP8 values of rows, and their scales."""
        groups = x.float().view(*x.shape[:-1], -1, GROUP)
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX) / E4M3_MAX
        values = (groups / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        scales = scales.squeeze(-1)
        return values.view(x.shape), scales.t().contiguous().t() if columns else scales

    @staticmethod
    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The rotation of ``[1, T, heads, rotated]``."""
        wide = x.float()
        first, second = wide.chunk(2, -1)
        return (wide * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)).to(x.dtype)


class ExactParts(Parts):
    """The same operations in float64, activations not quantised: what the layer approximates."""

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of rows."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight

    @staticmethod
    def quant(x: torch.Tensor, *, columns: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows, and scales of one."""
        return x, torch.ones(x.shape[0], -(-x.shape[1] // GROUP), dtype=x.dtype, device=x.device)

    @staticmethod
    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The rotation of ``[1, T, heads, rotated]``."""
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    @classmethod
    def linear(cls, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The product with the dequantised weight."""
        return x @ dequantised(weight, by_rows(scales, weight.shape[0])).T


class Fp8Linear(torch.nn.Module):
    """A linear layer from FP8 to bfloat16, a scale for each block of 128 x 128 weights.

    Args:
        n_in: features of the input.
        n_out: features of the output.
        parts: who computes it.
        generator: of the weights.
    """

    def __init__(self, n_in: int, n_out: int, parts: type[Parts], generator: torch.Generator) -> None:
        super().__init__()
        self.parts = parts
        weight = torch.randn(n_out, n_in, generator=generator, device=generator.device) * n_in**-0.5
        values, scales = quantised_blocks(weight)
        self.weight = torch.nn.Parameter(values, requires_grad=False)
        self.scales = torch.nn.Parameter(scales, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n_in]`` to ``[..., n_out]``."""
        y = self.parts.linear(x.view(-1, x.shape[-1]), self.weight, self.scales)
        return y.view(*x.shape[:-1], -1)


class DecoderLayer(torch.nn.Module):
    """The layer.

    Args:
        sizes: its sizes.
        parts: in what it is written.
        device: where.
        seed: of its weights, which are equal for equal seeds however it is written.
    """

    def __init__(self, sizes: Sizes, parts: type[Parts], *, device: torch.device | str = "cpu", seed: int = 0) -> None:
        super().__init__()
        self.sizes, self.parts = sizes, parts
        generator = torch.Generator(device).manual_seed(seed)

        def linear(n_in: int, n_out: int) -> Fp8Linear:
            return Fp8Linear(n_in, n_out, self.parts, generator)

        def weight(*shape: int, scale: float = 0.1, shift: float = 1.0) -> torch.nn.Parameter:
            drawn = torch.randn(shape, generator=generator, device=device) * scale + shift
            return torch.nn.Parameter(drawn.bfloat16(), requires_grad=False)

        s = sizes
        self.input_norm, self.ffn_norm = weight(s.hidden), weight(s.hidden)
        self.q_norm, self.kv_norm = weight(s.q_rank), weight(s.kv_rank)
        self.latents = linear(s.hidden, s.q_rank + s.kv_rank + s.rotated)
        self.q_up = linear(s.q_rank, s.heads * (s.nope + s.rotated))
        self.kv_up = linear(s.kv_rank, s.heads * (s.nope + s.value))
        self.out = linear(s.heads * s.value, s.hidden)
        self.index_q = linear(s.q_rank, s.index_heads * s.index)
        self.index_k = linear(s.hidden, s.index)
        self.index_norm, self.index_bias = weight(s.index), weight(s.index, shift=0.0)
        self.index_weights = weight(s.index_heads, s.hidden, scale=s.hidden**-0.5, shift=0.0)
        self.gate_up, self.down = linear(s.hidden, 2 * s.ffn), linear(s.ffn, s.hidden)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Results:
        """One layer; see :class:`LayerInputs`."""
        residual = x + residual
        hidden = self.parts.norm(residual, self.input_norm)
        s = self.sizes
        q_latent, kv_latent, k_rotated = torch.split(self.latents(hidden), [s.q_rank, s.kv_rank, s.rotated], -1)
        q_latent = self.parts.norm(q_latent, self.q_norm)
        index = self._index(hidden, q_latent, cos, sin)
        x = self.out(self._attention(q_latent, self.parts.norm(kv_latent, self.kv_norm), k_rotated, cos, sin))
        residual = x + residual
        gate, up = self.gate_up(self.parts.norm(residual, self.ffn_norm)).chunk(2, -1)
        return Results(self.down(F.silu(gate) * up), residual, *index)

    def _attention(
        self, q: torch.Tensor, kv: torch.Tensor, k_rotated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention ``[1, T, heads * value]`` from latents; all heads share the rotated part of the keys."""
        s = self.sizes
        q_nope, q_rotated = torch.split(_heads(self.q_up(q), s.heads), [s.nope, s.rotated], -1)
        k_nope, value = torch.split(_heads(self.kv_up(kv), s.heads), [s.nope, s.value], -1)
        q_rotated = self.parts.rope(q_rotated, cos, sin)
        k_rotated = self.parts.rope(_heads(k_rotated, 1), cos, sin)
        query = torch.cat((q_nope, q_rotated), -1)
        key = torch.cat((k_nope, k_rotated.expand(-1, -1, s.heads, -1)), -1)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).reshape(*q.shape[:-1], -1)

    def _index(
        self, hidden: torch.Tensor, q_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The indexer's queries and keys in FP8 with their scales, and its heads' weights."""
        s = self.sizes
        q = self._rotated_first(_heads(self.index_q(q_latent), s.index_heads), cos, sin)
        k = F.layer_norm(self.index_k(hidden), (s.index,), self.index_norm, self.index_bias)
        k = self._rotated_first(_heads(k, 1), cos, sin)
        weights = F.linear(hidden, self.index_weights)
        quantised = [self.parts.quant(each.view(-1, s.index)) for each in (q, k)]
        return *quantised[0], *quantised[1], weights

    def _rotated_first(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The first features rotated, the others as they are."""
        rotated, rest = torch.split(x, [self.sizes.rotated, self.sizes.index - self.sizes.rotated], -1)
        return torch.cat((self.parts.rope(rotated, cos, sin), rest), -1)


def layer_inputs(sizes: Sizes, tokens: int, device: torch.device | str = "cpu", seed: int = 1) -> LayerInputs:
    """Random inputs of a layer: ``tokens`` tokens of one sequence, the first at position ``FIRST``."""
    generator = torch.Generator(device).manual_seed(seed)
    x, residual = (
        torch.randn(1, tokens, sizes.hidden, generator=generator, device=device).bfloat16() for _ in range(2)
    )
    cos, sin = (table[FIRST:] for table in tilewright.rope_table(sizes.rotated, FIRST + tokens, device=device))
    return LayerInputs(x, residual, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))


def _heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """``[1, T, n_heads * D]`` as ``[1, T, n_heads, D]``."""
    return x.view(*x.shape[:-1], n_heads, -1)
