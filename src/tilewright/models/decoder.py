"""A small decoder in the manner of Llama, over bytes: RMS norm, grouped-query attention, RoPE, SwiGLU.

With hyper-connections it has several residual streams, as DeepSeek-V4 has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.errors import ArgumentError
from tilewright.nn import HyperMixes
from tilewright.ops.mhc.call import MAX_STREAMS

if TYPE_CHECKING:
    from tilewright.models.parts import Parts


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's sizes.

    Attributes:
        layers: blocks of attention and feed-forward.
        width: size of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; each serves ``heads / kv_heads`` query heads.
        head_dim: size of a head, even.
        ffn_width: size of the feed-forward's middle.
        context: bytes that a prediction can see.
        rope_base: the base of RoPE's angles.
        vocab: how many tokens there are: one per byte value.
        hc_mult: how many residual streams hyper-connections keep; 0 or 1 for the plain residual stream.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    context: int
    rope_base: float = 10000.0
    vocab: int = 256
    hc_mult: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.hc_mult <= MAX_STREAMS:
            message = f"got {self.hc_mult}, expected a number of streams up to {MAX_STREAMS}"
            raise ArgumentError("DecoderConfig", "hc_mult", message)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            message = f"got {self.kv_heads}, expected a divisor of the {self.heads} query heads"
            raise ArgumentError("DecoderConfig", "kv_heads", message)
        if self.head_dim < 2 or self.head_dim % 2:
            message = f"got {self.head_dim}, expected an even number: RoPE turns pairs"
            raise ArgumentError("DecoderConfig", "head_dim", message)


class Cache(Protocol):
    """What remembers the bytes read so far, and attends to them.

    Attributes:
        length: how many there are.
    """

    length: int

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention of the next bytes, which are remembered.

        Args:
            layer: index of the layer.
            q: queries, [batch, seq, heads, head_dim].
            k: keys, [batch, seq, kv_heads, head_dim].
            v: values, as ``k``.

        Returns:
            As ``q``.
        """


class KeyValueCache:
    """The keys and values of the bytes read so far, rotated already, for every layer."""

    def __init__(self, model: Decoder, batch: int, dtype: torch.dtype) -> None:
        config = model.config
        shape = (config.layers, batch, config.context, config.kv_heads, config.head_dim)
        self.length = 0
        self.keys = torch.empty(shape, device=model.device, dtype=dtype)
        self.values = torch.empty(shape, device=model.device, dtype=dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See :meth:`Cache.attend`."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return attention(q, self.keys[layer, :, :end], self.values[layer, :, :end])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last rows of a sequence to all of it.

    Args:
        q: queries, [batch, seq, heads, head_dim].
        k: keys of the sequence, [batch, rows, kv_heads, head_dim].
        v: values, as ``k``.

    Returns:
        As ``q``.
    """
    seq, rows = q.shape[1], k.shape[1]
    # Behind a filled cache the queries are the last rows of a square, of which is_causal would take the first.
    mask = torch.ones(seq, rows, dtype=torch.bool, device=q.device).tril(rows - seq) if rows > seq else None
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


class Streams(NamedTuple):
    """Residual streams between two layers of hyper-connections.

    Attributes:
        streams: as they were before the layer that ran last, [batch, seq, hc_mult, width].
        post_mix: how much of that layer's output each stream gets, [batch, seq, hc_mult, 1].
        comb_mix: how the streams are mixed, [batch, seq, hc_mult, hc_mult].
    """

    streams: torch.Tensor
    post_mix: torch.Tensor
    comb_mix: torch.Tensor


Residual: TypeAlias = "torch.Tensor | Streams | None"
"""What passes by a layer: the residual stream, the streams of hyper-connections, or nothing yet."""


class Norm(nn.Module):
    """RMSNorm in front of a layer, fused with the residual add behind the layer before."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.empty(config.width, device="meta"))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``x`` to the residual stream, which it begins if there is none, and normalise the sum.

        Args:
            x: what the layer before computed, [batch, seq, width].
            residual: the stream so far, as ``x``.

        Returns:
            The norm and the stream, as ``x``.
        """
        if residual is None:
            return self.parts.norm.compute(x, self.weight, self.eps), x
        return self.parts.add_norm.compute(x, residual, self.weight, self.eps)


class HyperNorm(HyperMixes):
    """In the place of a :class:`Norm` where there are hyper-connections: RMSNorm of what a layer takes of the streams.

    Fused with the add of the layer before. It has the weights of :class:`tilewright.nn.HyperConnection`.
    """

    def __init__(self, config: DecoderConfig, parts: Parts, place: int) -> None:
        stream = place % config.hc_mult
        super().__init__(config.width, config.hc_mult, stream=stream, device="meta", dtype=torch.float32)
        self.parts = parts
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.empty(config.width, device="meta"))

    def forward(self, x: torch.Tensor, residual: Streams | None) -> tuple[torch.Tensor, Streams]:
        """Put ``x`` into the streams, or make them all of it if there are none; take an input out and normalise it.

        Args:
            x: what the layer before computed, [batch, seq, width].
            residual: the streams before that layer, and its mixes.

        Returns:
            The norm, as ``x``, and the streams with the next layer's mixes.
        """
        weights = (self.fn, self.scale, self.base, self.weight)
        with torch.autocast(x.device.type, enabled=False):  # mixes are computed in float32
            if residual is None:
                streams = self.parts.expand.compute(x, self.hc_mult)
                y, post_mix, comb_mix = self.parts.pre.compute(streams, *weights, self.eps)
            else:
                given = (x.to(residual.streams.dtype), *residual)
                streams, y, post_mix, comb_mix = self.parts.post_pre.compute(*given, *weights, self.eps)
        return y, Streams(streams, post_mix, comb_mix)


class HyperExit(HyperMixes):
    """In the place of the last :class:`Norm` where there are hyper-connections: RMSNorm of the collapsed streams."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        super().__init__(config.width, config.hc_mult, head=True, device="meta", dtype=torch.float32)
        self.parts = parts
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.empty(config.width, device="meta"))

    def forward(self, x: torch.Tensor, residual: Streams) -> tuple[torch.Tensor, torch.Tensor]:
        """Put ``x`` into the streams and collapse them.

        Args:
            x: what the last layer computed, [batch, seq, width].
            residual: the streams before that layer, and its mixes.

        Returns:
            The norm of what the streams collapse to, and that itself, as ``x``.
        """
        with torch.autocast(x.device.type, enabled=False):
            streams = self.parts.post.compute(x.to(residual.streams.dtype), *residual)
            collapsed = self.parts.head.compute(streams, self.fn, self.scale, self.base)
        return self.parts.norm.compute(collapsed, self.weight, self.eps), collapsed


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    def __init__(self, config: DecoderConfig, parts: Parts, layer: int) -> None:
        super().__init__()
        self.config = config
        self.parts = parts
        self.layer = layer
        self.heads = (config.heads, config.kv_heads, config.kv_heads)
        self.qkv = _linear(config.width, sum(self.heads) * config.head_dim)
        self.out = _linear(config.heads * config.head_dim, config.width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """[batch, seq, width] to the same."""
        out: torch.Tensor = self.out(self.attend(self.qkv(x), cos, sin, cache))
        return out

    def attend(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """What lies between the projections: [batch, seq, all heads * head_dim] to [batch, seq, heads * head_dim]."""
        batch, seq, _ = qkv.shape
        start = cache.length if cache else 0
        q, k, v = qkv.view(batch, seq, -1, self.config.head_dim).split(self.heads, dim=2)  # type: ignore[no-untyped-call]
        q, k = self.parts.rope.compute(q, k, cos, sin, start)  # [batch, seq, heads, head_dim]
        y = cache.attend(self.layer, q, k, v) if cache else attention(q, k, v)
        return y.reshape(batch, seq, -1)


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate) * up)``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = _linear(config.width, 2 * config.ffn_width)
        self.down = _linear(config.ffn_width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, width] to the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm. What a block computes is added by the norm that follows it."""

    def __init__(self, config: DecoderConfig, parts: Parts, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config, parts, 2 * layer)
        self.attention = Attention(config, parts, layer)
        self.ffn_norm = _norm(config, parts, 2 * layer + 1)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: torch.Tensor,
        residual: Residual,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, Residual]:
        """What is to be added, [batch, seq, width], and the residual stream or streams, to the same."""
        x, residual = self.attention_norm(x, residual)
        x, residual = self.ffn_norm(self.attention(x, cos, sin, cache), residual)
        return self.ffn(x), residual


class Decoder(nn.Module):
    """The decoder. Its weights depend on ``config`` and ``seed`` alone.

    They are drawn in float32 on the CPU and then cast, so that models in different dtypes, on different devices and
    with different parts start from the same numbers. Set dtype and device here and not with ``to``: a float64 model
    has RoPE tables computed in float64, every other model has float32 tables.

    Args:
        config: the sizes.
        parts: who computes the swappable parts.
        seed: draws the weights.
        device: where the model lies.
        dtype: the dtype of its weights.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        config: DecoderConfig,
        parts: Parts,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        import tilewright

        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width, device="meta")
        self.blocks = nn.ModuleList(Block(config, parts, layer) for layer in range(config.layers))
        self.norm = HyperExit(config, parts) if config.hc_mult > 1 else Norm(config, parts)
        self.head = _linear(config.width, config.vocab)
        self._draw_weights(seed)
        table_dtype = torch.promote_types(dtype, torch.float32)
        table = tilewright.rope_table(config.head_dim, config.context, base=config.rope_base, dtype=table_dtype)
        self.to(device=device, dtype=dtype)
        self.register_buffer("cos", table.cos.to(device), persistent=False)
        self.register_buffer("sin", table.sin.to(device), persistent=False)

    @torch.no_grad()
    def _draw_weights(self, seed: int) -> None:
        self.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        connections = [module for module in self.modules() if isinstance(module, HyperMixes)]
        of_connections = {id(weight) for each in connections for weight in (each.fn, each.scale, each.base)}
        for name, weight in self.named_parameters():
            if id(weight) in of_connections:
                continue
            if weight.ndim == 1:  # a norm
                weight.fill_(1.0)
                continue
            std = weight.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):  # what is added up in the residual stream
                std /= math.sqrt(2 * self.config.layers)
            weight.normal_(std=0.02 if name.startswith(("embedding", "head")) else std, generator=generator)
        for connection in connections:  # behind all others, which are the same with and without connections
            connection.reset_parameters(generator)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.head.weight.device

    @property
    def n_parameters(self) -> int:
        """How many weights the model has."""
        return sum(weight.numel() for weight in self.parameters())

    def forward(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Predict the byte behind each byte.

        Args:
            tokens: [batch, seq] int64, those behind the cached ones if there is a cache.
            cache: the bytes read before; extended by ``tokens``.

        Returns:
            Logits, [batch, seq, vocab].

        Raises:
            ArgumentError: ``tokens`` reach past the context.
        """
        end = tokens.shape[1] + (cache.length if cache else 0)
        if end > self.config.context:
            raise ArgumentError("Decoder", "tokens", f"reach to {end}, past the context of {self.config.context}")
        x, residual = self.embedding(tokens), cast("Residual", None)
        for block in self.blocks:
            x, residual = block(x, residual, self.cos, self.sin, cache)
        if cache:
            cache.length = end
        y, _ = self.norm(x, residual)
        logits: torch.Tensor = self.head(y)
        return logits

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy in nats per byte, in float32 at least; both arguments [batch, seq] int64."""
        logits = self(tokens).flatten(0, 1)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: torch.Tensor,
    n_bytes: int,
    *,
    temperature: float = 0.7,
    seed: int = 0,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Continue a text, byte by byte, with a cache of keys and values.

    When the context is full, its last half is read again and becomes the beginning of a fresh one.

    Args:
        model: the decoder.
        prompt: the text to continue, [n] uint8, not empty.
        n_bytes: how many bytes to add.
        temperature: divides the logits before a byte is drawn; 0 takes the likeliest.
        seed: draws the bytes.
        cache: what remembers the bytes and attends to them; by default plain PyTorch does.

    Returns:
        The prompt and what follows it, [n + n_bytes] uint8 on the CPU.

    Raises:
        ArgumentError: the prompt is empty or longer than the context.
    """
    if not 0 < len(prompt) <= model.config.context:
        message = f"got {len(prompt)} bytes, expected between 1 and the context of {model.config.context}"
        raise ArgumentError("generate", "prompt", message)
    generator = torch.Generator().manual_seed(seed)
    text = prompt.long().cpu()
    if cache is None:
        cache = KeyValueCache(model, 1, _compute_dtype(model))
    unread = text
    for _ in range(n_bytes):
        if cache.length + len(unread) > model.config.context:
            cache.length = 0
            unread = text[-(model.config.context // 2 + 1) :]
        logits = model(unread[None].to(model.device), cache)[0, -1]
        if temperature == 0:
            unread = logits.argmax().cpu()[None]
        else:  # drawn in float64 on the CPU, so that the device does not change what a seed means
            chances = (logits.cpu().double() / temperature).softmax(0)
            unread = torch.multinomial(chances, 1, generator=generator)
        text = torch.cat((text, unread))
    return text.to(torch.uint8)


def _compute_dtype(model: Decoder) -> torch.dtype:
    """The dtype of keys and values: autocast's, where it is on."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.head.weight.dtype


def _norm(config: DecoderConfig, parts: Parts, place: int) -> Norm | HyperNorm:
    """What stands in front of a layer; ``place`` counts the layers."""
    return HyperNorm(config, parts, place) if config.hc_mult > 1 else Norm(config, parts)


def _linear(n_in: int, n_out: int) -> nn.Linear:
    # Weights get their values, and their memory, when all of them are drawn.
    return nn.Linear(n_in, n_out, bias=False, device="meta")
