"""What Inductor does to a graph: before the pass sees it, where supported versions of torch differ, and after it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from tilewright.fusion.graph import aten, is_call, prims, seen_through, value

_GENERATED = (
    aten.cat.default,
    aten.amax.default,
    aten.amin.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.var_mean.correction,
)
"""Operators whose kernels Inductor generates, besides those that work element by element."""


@lru_cache(maxsize=1)
def leaves_out_roundings() -> bool:
    """Whether a rounding to 16 bits is gone from a graph if nothing but a cast to a wider dtype uses it.

    Before torch 2.13, Inductor makes one cast of any two in a row, and computes with numbers that the program has
    rounded as if it had not. It is asked, not its version: a few nodes go through its own patterns.
    """
    from torch._inductor.fx_passes.joint_graph import patterns

    graph = Graph()
    nodes = [graph.placeholder("x")]
    for dtype in (torch.bfloat16, torch.float32):
        nodes.append(graph.call_function(prims.convert_element_type.default, (nodes[-1], dtype)))
    graph.output(nodes[-1])
    for node, dtype in zip(nodes, (torch.float32, torch.bfloat16, torch.float32), strict=True):
        node.meta["val"] = torch.empty(2, dtype=dtype, device="meta")
    module = GraphModule(torch.nn.Module(), graph)
    patterns.apply(module)
    return all(node.args[1:] != (torch.bfloat16,) for node in module.graph.nodes)


def unless_left_out() -> str:
    """What a reason that misses a rounding has to add: it may be in the program and not in the graph."""
    if not leaves_out_roundings():
        return ""
    return " (before 2.13, torch leaves out a rounding that only a cast to a wider dtype uses)"


def inlining(node: Node) -> Node | None:
    """The first of the operations that a node goes into, if Inductor generates the kernels of all; else None.

    What is computed element by element is computed in them, as they read it: they are needed with or without it.
    """
    first = None
    for user in node.users:
        shown = is_call(user, aten.expand.default, aten.permute.default) or seen_through(user) is node
        into = user if _is_generated(user) else inlining(user) if shown else None
        if into is None:
            return None
        first = first or into
    return first


def joining(node: Node) -> Node | None:
    """The kernel that reads what a ``cat`` joins from where it is; None if the ``cat`` has one of its own.

    Inductor leaves out a ``cat`` before kernels that it generates, but not for CPUs (``torch/_inductor/lowering.py``).
    """
    from torch._inductor import config

    leaves_out = value(node).device.type != "cpu" or config.force_pointwise_cat
    return inlining(node) if leaves_out else None


def _is_generated(node: Node) -> bool:
    """Whether Inductor computes a node in a kernel of its own making."""
    target = node.target
    its = isinstance(target, OpOverload) and target.namespace in ("aten", "prims")
    return is_call(node, *_GENERATED) or (its and torch.Tag.pointwise in target.tags)  # type: ignore[union-attr]
