"""The decoder's attention through kernels for NPUs: keys and values in blocks, and the operators that read them.

A trained decoder decodes the same text through these kernels, run on a CPU, as through its own attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tilewright.errors import ArgumentError
from tilewright.models.decoder import generate
from tilewright.npu.kernels import OPERATORS
from tilewright.npu.rounding import compute_dtype_of

if TYPE_CHECKING:
    from tilewright.models.decoder import Decoder

KERNELS = ("flash_causal_attention_naive", "flash_attention_naive", "causal_attention_naive", "attention_naive")
"""What can attend: causal by themselves, or with a mask; in several partitions, or in one."""


class BlockCache:
    """Keys and values of one sequence in blocks, for every layer, as an NPU has them.

    Args:
        model: the decoder.
        kernels: which kernels attend, one of :data:`KERNELS`.
        partition: rows of a block (default: a quarter of the context); with the kernels of one partition it is the
            whole context.
        compute_dtype: what each operation's result is rounded to.
        seed: draws the order of the blocks.

    Attributes:
        length: how many rows there are.
        calls: how often a kernel was run.

    Raises:
        ArgumentError: there are no such kernels, or the partition does not divide the context.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        kernels: str = KERNELS[0],
        partition: int | None = None,
        compute_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        if kernels not in KERNELS:
            raise ArgumentError("BlockCache", "kernels", f"got {kernels!r}, expected one of {', '.join(KERNELS)}")
        config = model.config
        self.kernels = kernels
        self.in_partitions = kernels.startswith("flash")
        whole = config.context
        self.partition = (whole // 4 if partition is None else partition) if self.in_partitions else whole
        if self.partition < 1 or config.context % self.partition:
            message = f"got {self.partition}, which does not divide the context of {config.context}"
            raise ArgumentError("BlockCache", "partition", message)
        self.partitions = config.context // self.partition
        self.compute_dtype = compute_dtype_of(compute_dtype)
        self.length = 0
        self.calls = 0
        self.scale = torch.tensor(config.head_dim**-0.5)
        blocks = self.partitions + 1  # block 0 belongs to nobody, as in a server
        order = 1 + torch.randperm(self.partitions, generator=torch.Generator().manual_seed(seed))
        self.table = order.to(torch.int32)
        shape = (config.layers, 2, blocks, config.kv_heads, 1, self.partition, config.head_dim)
        self.rows = torch.zeros(shape)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See :meth:`tilewright.models.decoder.Cache.attend`. A chunk ends where a partition does."""
        done, results = 0, []
        while done < q.shape[1]:
            position = self.length + done
            rows = min(q.shape[1] - done, self.partition - position % self.partition)
            chunk = slice(done, done + rows)
            results.append(self._chunk(layer, position, q[:, chunk], k[:, chunk], v[:, chunk]))
            done += rows
        return torch.cat(results, 1)

    def _chunk(self, layer: int, position: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, seq, heads, head_dim = q.shape
        kv_heads = k.shape[2]
        query = q.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads, seq, head_dim)
        key, value = (each.transpose(1, 2).unsqueeze(2).contiguous() for each in (k, v))
        phase = "decode" if seq == 1 else "prefill"
        starts = torch.arange(self.partitions) * self.partition
        tensors = {
            "query": query.contiguous(),
            "key": key,
            "value": value,
            "kv_cache": self.rows[layer],
            "mask": self._mask(position, seq),
            "seq_idx": (position - starts).clamp(0, self.partition).to(torch.int32)[None],
            "qk_scale": self.scale,
            "block_table": self.table if phase == "prefill" else self.table[None],
            "dummy": self.scale,
        }
        operator = OPERATORS[f"{self.kernels}_{phase}"]
        arguments = [tensors[name] for name in (*operator.inputs[:-1], "dummy")]
        if self.compute_dtype == "float32":
            result = getattr(torch.ops.tilewright_npu, operator.name)(*arguments)
        else:
            result = operator(*arguments, compute_dtype=self.compute_dtype)
        self.calls += 1
        return result.flatten(1, 2).transpose(1, 2)  # type: ignore[no-any-return]

    def _mask(self, position: int, seq: int) -> torch.Tensor:
        """Which rows of the context each query sees, [1, 1, 1, seq, context] of ones and zeros."""
        rows = self.partition * self.partitions
        seen = torch.arange(rows)[None, :] <= position + torch.arange(seq)[:, None]
        return seen.to(torch.float32)[None, None, None]


@dataclass(frozen=True)
class Decoded:
    """A text that was continued through NPU kernels.

    Attributes:
        text: the prompt and what follows it, uint8.
        expected: what the decoder's own attention continues it with.
        kernel_calls: how often a kernel was run.
    """

    text: torch.Tensor
    expected: torch.Tensor
    kernel_calls: int

    @property
    def agrees(self) -> bool:
        """Whether the two are one text."""
        return torch.equal(self.text, self.expected)


def decode_through_kernels(
    model: Decoder,
    prompt: torch.Tensor,
    n_bytes: int,
    *,
    kernels: str = KERNELS[0],
    partition: int | None = None,
    temperature: float = 0.7,
    seed: int = 0,
) -> Decoded:
    """Continue a text twice: through NPU kernels, and as the decoder does.

    Args:
        model: a decoder on the CPU, in float32.
        prompt: the text to continue, [n] uint8.
        n_bytes: how many bytes to add.
        kernels: which kernels attend, one of :data:`KERNELS`.
        partition: rows of a block (default: a quarter of the context).
        temperature: see :func:`tilewright.models.decoder.generate`.
        seed: draws the bytes, the same ones for the same chances.
    """
    cache = BlockCache(model, kernels=kernels, partition=partition)
    text = generate(model, prompt, n_bytes, temperature=temperature, seed=seed, cache=cache)
    return Decoded(text, generate(model, prompt, n_bytes, temperature=temperature, seed=seed), cache.calls)
