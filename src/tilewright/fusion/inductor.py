"""What Inductor does to a graph before the pass sees it, where supported versions of torch differ."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.fx import Graph, GraphModule

from tilewright.fusion.graph import prims


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
