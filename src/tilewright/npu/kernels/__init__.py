"""Ten attention kernels as operators, ``torch.ops.tilewright_npu.<name>``, made of five bodies.

A prefill reads the chunk of one sequence, whose ``block_table`` is a vector; a decode step reads a few tokens of each
of several, and ``block_table`` is a matrix. Every kernel writes the new rows into the cache and attends to all of them.
Names and arguments are those of vLLM-RBLN, which these kernels can stand in for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.npu.kernels.attention import attention
from tilewright.npu.kernels.causal_attention import causal_attention
from tilewright.npu.kernels.flash_attention import flash_attention
from tilewright.npu.kernels.flash_causal_attention import flash_causal_attention
from tilewright.npu.kernels.sliding_window_attention import sliding_window_attention
from tilewright.npu.registration import register

if TYPE_CHECKING:
    from tilewright.npu.kernel import JitFunction
    from tilewright.npu.operator import Operator

_BODIES: dict[str, JitFunction] = {
    "attention_naive": attention,
    "causal_attention_naive": causal_attention,
    "flash_attention_naive": flash_attention,
    "flash_causal_attention_naive": flash_causal_attention,
    "sliding_window_attention_naive": sliding_window_attention,
}
_TABLE_RANK = {"prefill": 1, "decode": 2}
_ALIGNED = ("query", "key", "value")
_HOST_LAYOUT = "1:2:3"  # keys, values and the cache stay as the host has them


def _operators(*, blocks_first: bool) -> dict[str, Operator]:
    suffix = "_blocks_first" if blocks_first else ""
    return {
        f"{name}_{phase}": register(
            body,
            name=f"{name}_{phase}{suffix}",
            outputs={"output": "query"},
            constexprs={"DIM_BLOCK_TABLE": rank, "BLOCKS_FIRST": int(blocks_first)},
            align=_ALIGNED,
            host_layout=_HOST_LAYOUT,
        )
        for name, body in _BODIES.items()
        for phase, rank in _TABLE_RANK.items()
    }


OPERATORS: dict[str, Operator] = _operators(blocks_first=False)
"""The operators by name; ``kv_cache`` is ``(2, blocks, ...)``."""

BLOCKS_FIRST_OPERATORS: dict[str, Operator] = _operators(blocks_first=True)
"""The same for ``kv_cache`` of ``(blocks, 2, ...)``, as later releases of vLLM-RBLN have it; ``..._blocks_first``."""
