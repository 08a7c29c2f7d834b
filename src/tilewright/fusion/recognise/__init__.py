"""Who recognises operations in a graph: an adapter for each family of operators that models are written in.

``tilewright`` knows the library's own operators, ``aten`` plain PyTorch after decomposition. Others are added by
:func:`add_adapter`; the rules need no change for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from tilewright.errors import ArgumentError
from tilewright.fusion.expressions import Expressions
from tilewright.fusion.found import Found, Index, NearMiss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import Graph

    Recogniser: TypeAlias = Callable[[Graph], tuple[Sequence[Found], Sequence[NearMiss]]]

_SHIPPED = {"tilewright": "tilewright.fusion.recognise.own", "aten": "tilewright.fusion.recognise.aten"}
_ADDED: dict[str, tuple[Recogniser, str]] = {}


def add_adapter(name: str, recognise: Recogniser, *, version: str) -> None:
    """Make rules understand the operators of another namespace.

    Args:
        name: of the adapter, as reports name it.
        recognise: finds operations in a graph, as :class:`tilewright.fusion.Found`, and near misses.
        version: changes whenever what it recognises changes; it is a part of the identity of compiled code.

    Raises:
        ArgumentError: the name is taken.
    """
    if name in _SHIPPED or name in _ADDED:
        raise ArgumentError("add_adapter", "name", f"there is an adapter called '{name}' already")
    _ADDED[name] = (recognise, version)


def remove_adapter(name: str) -> None:
    """Take back :func:`add_adapter`."""
    _ADDED.pop(name, None)


def identity() -> tuple[tuple[str, str], ...]:
    """The adapters that were added, with their versions."""
    return tuple((name, version) for name, (_, version) in _ADDED.items())


def index(graph: Graph) -> Index:
    """Everything that any adapter recognises, in the order of the graph."""
    recognisers = {name: import_module(module).recognise for name, module in _SHIPPED.items()}
    recognisers |= {name: added for name, (added, _) in _ADDED.items()}
    found: list[Found] = []
    misses: list[NearMiss] = []
    failed: dict[str, str] = {}
    for name, recognise in recognisers.items():
        try:
            its_found, its_misses = recognise(graph)
        except Exception as error:  # whatever it is, the others can go on
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        found += its_found
        misses += its_misses
    order = {node: place for place, node in enumerate(graph.nodes)}
    found.sort(key=lambda each: min(order[node] for node in each.nodes))
    misses.sort(key=lambda each: order[each.node])
    return Index(found, misses, failed, Expressions(graph))
