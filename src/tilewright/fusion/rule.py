"""What a fusion rule is: it proposes, for the operations that it is about, what to put in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tilewright.errors import TilewrightError
from tilewright.fusion.graph import hint, value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.fx import Graph, Node

    from tilewright.fusion.found import Index
    from tilewright.fusion.graph import Editor


@dataclass(frozen=True, eq=False)
class Proposal:
    """One fusion that is possible.

    Attributes:
        node: the first of the operations, which the report names.
        replaces: the nodes whose values come from the new operation.
        claims: the nodes that no other fusion may use: those of every operation that is replaced.
        build: adds the new operation and gives, for each of ``replaces``, the node that holds its value now.
        done: what is done, in words.
        moved_before: tensors that are read or written now, one entry for each time.
        moved_after: likewise afterwards.
        kernels: launches before and after.
        differences: the named differences from what is replaced; allowed under ``numerics="relaxed"`` only.
        asks: the public function that will serve, with its arguments as nodes, to ask who serves it; None if it is
            served by what served before.
    """

    node: Node
    replaces: tuple[Node, ...]
    claims: frozenset[Node]
    build: Callable[[Editor], Mapping[Node, Node]]
    done: str
    moved_before: tuple[Node, ...]
    moved_after: tuple[Node, ...]
    kernels: tuple[int, int]
    differences: tuple[str, ...] = ()
    asks: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Before and after, symbolic sizes at their hints."""
        return sum(map(size_in_bytes, self.moved_before)), sum(map(size_in_bytes, self.moved_after))

    @property
    def saved(self) -> tuple[int, int]:
        """Bytes and launches."""
        before, after = self.bytes_moved
        return before - after, self.kernels[0] - self.kernels[1]


@dataclass(frozen=True)
class Refusal:
    """A candidate that is not fused.

    Attributes:
        node: its first node.
        reason: the first thing in the way.
    """

    node: Node
    reason: str


class Rule(Protocol):
    """A fusion rule.

    Attributes:
        name: of the rule, as ``counts`` and ``expect`` have it.
        pattern: what it is about, in words.
        replacement: the public function that takes its place.
        contract: why that computes the same.
        version: of a rule that is not the library's: changes with what it does; without one nothing that it had a part
            in is cached.
        pays: the least and the most rows for which it pays, None for no limit; where the numbers come from stands
            beside them.
    """

    name: str
    pattern: str
    replacement: str
    contract: str
    pays: tuple[int | None, int | None]

    def propose(self, graph: Graph, index: Index) -> Iterator[Proposal | Refusal]:
        """Every candidate of a graph, possible or not."""
        ...


def size_in_bytes(node: Node) -> int:
    """Bytes of a tensor, symbolic sizes at their hints."""
    held = value(node)
    total = held.dtype.itemsize
    for size in held.shape:
        total *= hint(size)
    return int(total)


def unserved(proposal: Proposal, known: dict[str, str]) -> str:
    """Why nobody but the reference would serve the new operation; empty if someone does.

    Args:
        proposal: which.
        known: the answers so far, by what was asked; layers ask for the same.
    """
    if proposal.asks is None:
        return ""
    function, args, kwargs = proposal.asks
    key = f"{function} {torch.fx.map_arg((args, kwargs), _described)}"
    if key not in known:
        known[key] = _unserved(function, args, kwargs)
    return known[key]


def _unserved(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    from tilewright.ops import explain

    try:
        with FakeTensorMode():
            explanation = explain(function, *_concrete(args), **_concrete(kwargs))
    except TilewrightError as error:
        return f"{function} refuses such a call: {error}"
    if explanation.chosen in (None, "reference"):
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in explanation.candidates if c.name != "reference")
        return f"no kernel for {function}: {reasons}"
    return ""


def _described(node: Node) -> Any:
    """What the choice of a kernel may depend on."""
    held = value(node)
    if not isinstance(held, torch.Tensor):
        return held
    return held.dtype, held.device, *([hint(size) for size in of] for of in (held.shape, held.stride()))


def _concrete(spread: Any) -> Any:
    """Arguments with nodes replaced by fakes of their sizes."""

    def fake(node: Node) -> Any:
        held = value(node)
        if not isinstance(held, torch.Tensor):
            return held
        dtype, device, sizes, strides = _described(node)
        return torch.empty_strided(sizes, strides, dtype=dtype, device=device)

    return torch.fx.map_arg(spread, fake)


def unite(groups: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Consumers that ask for the same, put together, in the order of their first: each comes as (key, consumer)."""
    united: dict[Any, list[Any]] = {}
    for key, consumer in groups:
        united.setdefault(key, []).append(consumer)
    return list(united.values())


def rows_of(node: Node) -> tuple[float, float]:
    """The least and the most rows that a tensor can have."""
    low = high = 1.0
    for size in value(node).shape[:-1]:
        least, most = _bounds(size)
        low, high = low * least, high * most
    return low, high


def _bounds(size: Any) -> tuple[float, float]:
    if isinstance(size, int):
        return float(size), float(size)
    found = size.node.shape_env.bound_sympy(size.node.expr)
    return max(float(found.lower), 0.0), float(found.upper)
