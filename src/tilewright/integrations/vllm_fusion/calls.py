"""What reading calls of vLLM's operators has in common, whatever they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tilewright.fusion.found import Found
from tilewright.fusion.functionalized import memory_of, not_fresh
from tilewright.fusion.graph import value

if TYPE_CHECKING:
    from tilewright.fusion.functionalized import OperatorCall

_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


class Unlike(Exception):
    """What a call does is not what any public function does; its message is the reason that the report gives."""


def filled(call: OperatorCall, name: str) -> Node | None:
    """The node that holds what a call fills an output with; None if nobody needs it."""
    written = call.written[name]
    if written.why_not:
        raise Unlike(written.why_not)
    if why := not_fresh(written.before):
        raise Unlike(f"{name} is not memory of its own: {why}")
    return written.after


def updated(call: OperatorCall, name: str) -> Node | None:
    """The node that holds what a call changes an input to; None if nobody needs it."""
    written = call.written[name]
    if written.why_not:
        raise Unlike(written.why_not)
    memory = memory_of(written.before)
    if memory.op == "placeholder":
        raise Unlike(f"{name} is written back into {memory.name}, an input of the graph")
    return written.after


def found(
    kind: str,
    call: OperatorCall,
    inputs: dict[str, Node | None],
    options: dict[str, Any],
    outputs: dict[str, Node | None],
    differs: tuple[str, ...] = (),
) -> Found:
    """What a call amounts to, with every node that is there for it; outputs that nobody needs are None."""
    held = {role: node for role, node in outputs.items() if node is not None}
    between = frozenset().union(*(written.nodes for written in call.written.values()))
    nodes = between.union({call.node}, held.values())
    return Found(kind, "vllm", inputs, options, held, nodes, differs=differs)


def fake(node: Any, name: str) -> torch.Tensor:
    """What an argument holds, as a fake."""
    held = value(node) if isinstance(node, Node) else None
    if not isinstance(held, torch.Tensor):
        raise Unlike(f"{name} is no tensor")
    return held


def activation(call: OperatorCall, name: str) -> torch.Tensor:
    """The fake of an input that kernels read."""
    held = fake(call.given[name], name)
    if held.dtype not in _INPUTS or held.dim() == 0:
        raise Unlike(f"{name} is {held.dtype} of {held.dim()} dimensions; expected 16 bits or float32 of one at least")
    return held
