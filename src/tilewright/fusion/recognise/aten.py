"""Operations that a graph computes in plain PyTorch, as models are written; see the modules beside for the forms."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch

from tilewright.fusion.forms import symbolic_number
from tilewright.fusion.found import NearMiss
from tilewright.fusion.graph import needed, taken_by_hint, value
from tilewright.fusion.recognise.aten_activation import recognise_activations
from tilewright.fusion.recognise.aten_norm import recognise_norms
from tilewright.fusion.recognise.aten_quant import recognise_quantisations
from tilewright.fusion.recognise.aten_rope import recognise_rotations

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch.fx import Graph, Node

    from tilewright.fusion.found import Found


_NEAR = 32
"""How many nodes in front of a near miss are taken for its own."""


def recognise(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """What a graph computes in plain PyTorch, and what is nearly such an operation, each in the order of the graph."""
    found, misses = _all(graph)
    if _is_symbolic(graph):
        misses += _undecided(graph, found, misses)
    position = {node: index for index, node in enumerate(graph.nodes)}
    found.sort(key=lambda f: max(position[node] for node in f.nodes))
    misses.sort(key=lambda miss: position[miss.node])
    return found, misses


def _all(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    found: list[Found] = []
    misses: list[NearMiss] = []
    for each in (recognise_norms, recognise_quantisations, recognise_activations, recognise_rotations):
        its_found, its_misses = each(graph)
        found += its_found
        misses += its_misses
    return found, misses


def _is_symbolic(graph: Graph) -> bool:
    """Whether a number, or the last dimension of a tensor, varies from call to call. Symbols are inputs then."""
    given = (value(node) for node in graph.nodes if node.op == "placeholder")
    return any(isinstance(each, torch.SymInt | torch.SymFloat) for each in given) and any(
        symbolic_number(node) or _columns(node) for node in graph.nodes
    )


def _columns(node: Node) -> str:
    """The formula of a symbolic last dimension; empty if there is none."""
    held = value(node)
    is_wide = isinstance(held, torch.Tensor) and held.dim() > 0
    return "" if not is_wide or isinstance(held.shape[-1], int) else str(held.shape[-1])


def _undecided(graph: Graph, found: Sequence[Found], misses: Sequence[NearMiss]) -> list[NearMiss]:
    """What would be an operation if symbolic sizes were those of the first call, and numbers constants."""
    with taken_by_hint():
        near, nearly = _all(graph)
    told = {node for each in found for node in each.nodes} | {miss.node for miss in misses}
    kinds = {each.outputs["y" if "y" in each.outputs else "values"]: (each.kind, each.nodes) for each in near}
    kinds |= {miss.node: (miss.kind, frozenset(islice(needed([miss.node]), _NEAR))) for miss in nearly}
    undecided = []
    for node, (kind, nodes) in kinds.items():
        if kind == "add" or node in told:
            continue
        undecided.append(NearMiss(kind, node, f"{_why(nodes)}, and so does compiling without dynamic=True"))
    return undecided


def _why(nodes: Collection[Node]) -> str:
    """What is symbolic in some nodes, and what makes it a number."""
    sizes = sorted(filter(None, map(_columns, nodes)), key=len)
    if sizes:
        return f"the last dimension is symbolic ({sizes[0]}): torch._dynamo.mark_static(x, -1) makes it a number"
    if any(symbolic_number(given) for node in nodes for given in node.all_input_nodes):
        return "a Python number in it is symbolic: torch._dynamo.config.specialize_float makes it a constant"
    return "symbolic sizes are not known to be equal: torch._dynamo.mark_static makes them numbers"
