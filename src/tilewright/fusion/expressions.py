"""Which nodes of a graph hold the same numbers, as far as what they are made of shows."""

from __future__ import annotations

import operator
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from tilewright.fusion.graph import aten, needed, value

if TYPE_CHECKING:
    from torch.fx import Graph

_NAMESPACES = ("aten", "prims", "tilewright")
_UNFILLED = frozenset(
    {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
    | {aten.empty_permuted.default, aten.new_empty_strided.default}
)


def writes(node: Node) -> bool:
    """Whether a node may write to memory that it was given.

    Graphs are functional when a custom pass sees them, but for copies into inputs at their end; a graph of another
    origin, or an operator that was not functionalised, may do otherwise.
    """
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    if isinstance(node.target, HigherOrderOperator):
        return "mutation" in str(node.target)  # by a Triton kernel; the others are functional
    return node.op in ("call_method", "call_module")


class Expressions:
    """The nodes of a graph by what they compute.

    Two are equal that call the same pure operator with equal arguments: tensors by their own expressions, symbolic
    sizes by their formulas. Nothing behind the first node that writes to memory equals anything but itself.

    Args:
        graph: which must not change while something is asked.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._readable: set[Node] | None = None
        self._numbers: dict[Node, int] = {}
        self._known: dict[Any, int] = {}

    def of(self, node: Node | None, user: Node) -> Any:
        """What is equal for nodes that hold the same numbers, as a user of theirs reads them: a key of dictionaries.

        Args:
            node: which; None equals None.
            user: the node that reads it, directly or through others.
        """
        if node is None:
            return None
        if self._readable is None:
            self._readable = set(takewhile(lambda each: not writes(each), self._graph.nodes))
        return self._number(node) if node in self._readable and user in self._readable else node

    def _number(self, node: Node) -> int:
        """The number of an expression, after those of all that it is made of."""
        new = needed([node], lambda each: each not in self._numbers)
        for each in sorted(new, key=lambda each: each._sort_key):
            self._numbers[each] = self._known.setdefault(self._key(each, self._numbers), len(self._known))
        return self._numbers[node]

    def _key(self, node: Node, numbers: dict[Node, int]) -> Any:
        held = value(node)
        if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
            return type(held), str(held)
        if node.op == "get_attr":
            return node.op, node.target
        if node.op != "call_function" or not _is_pure(node.target):
            return node
        arguments = [_plain(given, numbers) for given in (node.args, tuple(sorted(node.kwargs.items())))]
        return node.target, *arguments


def _is_pure(target: Any) -> bool:
    """Whether an operator gives the same whenever it is given the same."""
    if target is operator.getitem:
        return True
    return (
        isinstance(target, OpOverload)
        and target.namespace in _NAMESPACES
        and target not in _UNFILLED
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _plain(given: Any, numbers: dict[Node, int]) -> Any:
    """An argument as a key: 1, 1.0 and True are three."""
    if isinstance(given, Node):
        return "node", numbers[given]
    if isinstance(given, list | tuple):
        return tuple(_plain(each, numbers) for each in given)
    if isinstance(given, slice):
        return "slice", _plain((given.start, given.stop, given.step), numbers)
    return type(given), repr(given)
