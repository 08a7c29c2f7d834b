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
_HOST_LAYOUT = "1:2:3"  # keys, values and the cache stay as the host has them


def _operator(body: JitFunction, name: str, rank: int) -> Operator:
    constexprs = {"DIM_BLOCK_TABLE": rank}
    return register(body, name=name, outputs={"output": "query"}, constexprs=constexprs, host_layout=_HOST_LAYOUT)


OPERATORS: dict[str, Operator] = {
    f"{name}_{phase}": _operator(body, f"{name}_{phase}", rank)
    for name, body in _BODIES.items()
    for phase, rank in _TABLE_RANK.items()
}
"""The operators by name."""
