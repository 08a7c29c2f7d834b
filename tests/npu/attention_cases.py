"""Cases for the attention kernels: tensors, and dense attention over the gathered cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from tilewright.npu import rblib
from tilewright.npu.kernel import JitFunction
from tilewright.npu.program import Program
from tilewright.numerics import Agreement, compare

NOT_WRITTEN = float("nan")
"""What stands in the cache behind the rows that a sequence has, and in outputs."""


@dataclass(frozen=True)
class Case:
    """A step of one or several sequences.

    Attributes:
        positions: how many rows each sequence has in the cache.
        query_len: new rows of each.
        prefill: whether the block table has one dimension.
        heads: heads of keys and values.
        groups: query heads for each of them.
        head_dim: as the cache has it.
        partition: rows of a partition.
        partitions: how many a sequence may have.
    """

    positions: tuple[int, ...]
    query_len: int = 1
    prefill: bool = False
    heads: int = 2
    groups: int = 3
    head_dim: int = 64
    partition: int = 64
    partitions: int = 3

    @property
    def batch(self) -> int:
        return len(self.positions)

    @property
    def keys(self) -> int:
        """How many keys the last query sees at most."""
        return max(self.positions) + self.query_len


def tensors(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """What all kernels take, by the names of their parameters, before anything is aligned."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, rows, width = case.batch, case.heads, case.query_len, case.head_dim
    blocks = batch * case.partitions + 2
    table = torch.randperm(blocks - 1, generator=g)[: batch * case.partitions].reshape(batch, -1) + 1
    cache = torch.randn(2, blocks, heads, 1, case.partition, width, generator=g)
    counts = torch.zeros(batch, case.partitions, dtype=torch.int32)
    for b, position in enumerate(case.positions):
        for p in range(case.partitions):
            counts[b, p] = min(max(position - p * case.partition, 0), case.partition)
            cache[:, table[b, p], :, :, counts[b, p] :] = NOT_WRITTEN
    query = torch.randn(batch, heads, case.groups, rows, width, generator=g)
    return {
        "query": query,
        "key": torch.randn(batch, heads, 1, rows, width, generator=g),
        "value": torch.randn(batch, heads, 1, rows, width, generator=g),
        "kv_cache": cache,
        "mask": random_mask(case, g),
        "output": torch.full_like(query, NOT_WRITTEN),
        "qk_scale": torch.tensor(width**-0.5),
        "seq_idx": counts,
        "block_table": (table[0] if case.prefill else table).to(torch.int32),
        "dummy": torch.tensor(1.0),
    }


def random_mask(case: Case, g: torch.Generator) -> torch.Tensor:
    """Some of what a causal mask shows, and the first key always. Behind the last row anything may stand: ones do."""
    columns = case.partitions * case.partition
    mask = torch.ones(case.batch, 1, 1, case.query_len, columns)
    for b, position in enumerate(case.positions):
        until = (position // case.partition + 1) * case.partition  # partitions behind this are skipped
        shown = causal(case.query_len, until, position) & (torch.rand(case.query_len, until, generator=g) < 0.7)
        shown[:, 0] = True
        mask[b, 0, 0, :, :until] = shown.float()
    return mask


def causal(rows: int, columns: int, position: int) -> torch.Tensor:
    """Row ``i`` sees the columns up to ``position + i``."""
    return torch.ones(rows, columns, dtype=torch.bool).tril(position)


def dense(case: Case, given: dict[str, torch.Tensor], dtype: torch.dtype, masked: bool = False) -> torch.Tensor:
    """Attention over the gathered cache, all keys at once."""
    table = given["block_table"].reshape(case.batch, case.partitions).long()
    results = []
    for b, position in enumerate(case.positions):
        end = position + case.query_len
        both = given["kv_cache"][:, table[b]].to(dtype)  # [2, partitions, heads, 1, rows, width]
        keys, values = both.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[..., :end, :].clone()
        keys[..., position:, :], values[..., position:, :] = given["key"][b], given["value"][b]
        seen = given["mask"][b, 0, 0, :, :end] > 0 if masked else causal(case.query_len, end, position)
        results.append(attend(given["query"][b].to(dtype), keys, values, given["qk_scale"].to(dtype), seen))
    return torch.stack(results)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Softmax of the scores that are seen, times the values."""
    scores = (query @ keys.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ values


def cache_after(case: Case, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The cache with the new rows, and nothing else changed."""
    cache = given["kv_cache"].clone()
    table = given["block_table"].reshape(case.batch, case.partitions).long()
    for b, position in enumerate(case.positions):
        block, first = table[b, position // case.partition], position % case.partition
        cache[0, block, :, :, first : first + case.query_len] = given["key"][b]
        cache[1, block, :, :, first : first + case.query_len] = given["value"][b]
    return cache


def prepared(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a kernel is called with: queries, keys and values aligned, everything else as it is, the cache a copy."""
    aligned = {name: rblib.align_tensor_last_dim_to_64(given[name]) for name in ("query", "key", "value")}
    return {**given, **aligned, "kv_cache": given["kv_cache"].clone(), "output": given["output"].clone()}


def sizes(given: dict[str, torch.Tensor]) -> dict[str, int]:
    """The constexprs of tensors as a kernel is called with them, by name."""
    batch, heads, groups, rows, width = given["query"].shape
    _, blocks, _, _, partition, _ = given["kv_cache"].shape
    return {
        "NUM_BATCH": batch,
        "NUM_HEAD": heads,
        "NUM_GROUP": groups,
        "QUERY_LEN": rows,
        "HEAD_DIM": width,
        "NUM_BLOCK": blocks,
        "PARTITION_SIZE": partition,
        "WINDOW_SIZE": partition,
        "NUM_PARTITION": given["block_table"].shape[-1],
        "DIM_BLOCK_TABLE": given["block_table"].dim(),
        "BLOCKS_FIRST": 0,
    }


def compiled(kernel: JitFunction, given: dict[str, torch.Tensor], **options: Any) -> Program:
    """A kernel's program for tensors as it is called with them."""
    values: dict[str, Any] = {**sizes(given), **given}
    arguments = {name: values[name] for name in kernel.arg_names}
    return kernel.warmup(**arguments, grid=(1,), host_layout="1:2:3", **options)


@lru_cache(maxsize=64)
def _program(kernel: JitFunction, key: tuple[tuple[str, tuple[int, ...]], ...]) -> Program:
    index = {"seq_idx", "block_table", "cache_seq_len", "cache_offset"}
    types = {name: torch.int32 if name in index else torch.float32 for name, _ in key}
    return compiled(kernel, {name: torch.empty(shape, dtype=types[name], device="meta") for name, shape in key})


def run(kernel: JitFunction, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a kernel; the tensors afterwards. It is compiled once for each set of shapes."""
    values = prepared(given)
    program = _program(kernel, tuple((name, tuple(each.shape)) for name, each in values.items()))
    program.run(*(values[name] for name in kernel.arg_names if name in values))
    return values


def judged(result: torch.Tensor, reference: Callable[[torch.dtype], torch.Tensor], keys: int) -> Agreement:
    """A float32 result that sums over keys, against a reference that computes in any dtype."""
    return compare(result, reference(torch.float32), reference(torch.float64), reduced=keys)


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, and NaN where NaN is expected."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
