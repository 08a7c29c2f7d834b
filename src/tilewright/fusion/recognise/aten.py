"""Operations that a graph computes in plain PyTorch, as models are written; see the modules beside for the forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.fusion.recognise.aten_activation import recognise_activations
from tilewright.fusion.recognise.aten_norm import recognise_norms
from tilewright.fusion.recognise.aten_quant import recognise_quantisations
from tilewright.fusion.recognise.aten_rope import recognise_rotations

if TYPE_CHECKING:
    from torch.fx import Graph

    from tilewright.fusion.found import Found, NearMiss


def recognise(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """What a graph computes in plain PyTorch, and what is nearly such an operation, each in the order of the graph."""
    found: list[Found] = []
    misses: list[NearMiss] = []
    for each in (recognise_norms, recognise_quantisations, recognise_activations, recognise_rotations):
        its_found, its_misses = each(graph)
        found += its_found
        misses += its_misses
    position = {node: index for index, node in enumerate(graph.nodes)}
    found.sort(key=lambda f: max(position[node] for node in f.nodes))
    misses.sort(key=lambda miss: position[miss.node])
    return found, misses
