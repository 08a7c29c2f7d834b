"""Looking at and changing graphs of the ATen operators, as Inductor hands them to a custom pass."""

from __future__ import annotations

import operator
import re
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch.fx import Graph

aten, prims = torch.ops.aten, torch.ops.prims

RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default})
_RENAMES = frozenset(
    {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.alias.default}
)
_COPIES = frozenset({aten.clone.default})
_CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})


def value(node: Node | None) -> Any:
    """What a node holds, as a fake."""
    return None if node is None else node.meta.get("val")


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of some operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of an operator by the names of its schema, those left out with their defaults."""
    defaults, positional, _ = signature(node.target)
    return {**defaults, **dict(zip(positional, node.args, strict=False)), **node.kwargs}


@lru_cache(maxsize=1024)
def signature(target: Any) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """An operator's defaults by name, and the names of its positional arguments and of all of them."""
    declared = target._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    return defaults, tuple(a.name for a in declared if not a.kwarg_only), tuple(a.name for a in declared)


def result(node: Node, index: int) -> Node | None:
    """The node that takes one of several results of a call; None if nobody wants it."""
    for user in node.users:
        if is_call(user, operator.getitem) and user.args[1] == index:
            return user
    return None


def seen_through(node: Node) -> Node | None:
    """What a node shows in another shape with the same rows: None unless it is a view that keeps the last dimension.

    A copy and a cast to the dtype that is there already count as views: they show the same numbers.
    """
    if not isinstance(node, Node) or node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    before, after = value(source), value(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return None
    if node.target in RESHAPES or node.target in _RENAMES:
        kept = before.dim() > 0 and after.dim() > 0 and same_size(before.shape[-1], after.shape[-1])
        return source if kept else None
    return source if node.target in _COPIES or node.target in _CASTS else None


def origin(node: Node) -> Node:
    """What a node shows, seen through every view of it."""
    while (source := seen_through(node)) is not None:
        node = source
    return node


def hint(size: Any) -> int:
    """A size; of a symbolic one the value it had when the graph was traced, 1 where it had none."""
    if isinstance(size, int):
        return size
    found = size.node.hint
    return 1 if found is None else int(found)


_BY_HINT: ContextVar[bool] = ContextVar("by_hint", default=False)


@contextmanager
def taken_by_hint() -> Iterator[None]:
    """Where symbolic sizes count as equal if they were when the graph was traced: to say what is nearly something."""
    token = _BY_HINT.set(True)
    try:
        yield
    finally:
        _BY_HINT.reset(token)


def by_hint() -> bool:
    """Whether this is within :func:`taken_by_hint`."""
    return _BY_HINT.get()


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard on symbolic ones."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if by_hint():
        return hint(a) == hint(b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b)) or _same_quotients(a, b)


def _same_quotients(a: Any, b: Any) -> bool:
    """Whether two sizes are the same but for how they round quotients up: ``(n + 3) // 4``, ``-(-n // 4)``."""
    from torch.utils._sympy.functions import FloorDiv

    if isinstance(a, int) or isinstance(b, int) or not (a.node.expr.has(FloorDiv) and b.node.expr.has(FloorDiv)):
        return False

    def rounded_down(x: Any, by: Any) -> Any:
        x, by = (-x, -by) if by.is_negative else (x, by)
        negative = by.is_Integer and x.could_extract_minus_sign()
        return -FloorDiv(by - 1 - x, by) if negative else FloorDiv(x, by)

    one, other = (size.node.expr.replace(FloorDiv, rounded_down) for size in (a, b))
    return bool(one == other)


def wanted(node: Node, cut: Collection[Node], inner: Collection[Node]) -> bool:
    """Whether a graph without dead code still needs a node if some of those after it came from elsewhere.

    Args:
        node: which.
        cut: the nodes that will come from elsewhere.
        inner: nodes that exist only for them, unless somebody else uses them too.
    """
    for user in node.users:
        if user in cut:
            continue
        if (user not in inner and seen_through(user) is None) or wanted(user, cut, inner):
            return True
    return False


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(map(same_size, a, b))


def needed(nodes: Iterable[Node], within: Callable[[Node], bool] = lambda node: True) -> Iterator[Node]:
    """Some nodes and all that they are computed from, each once, except what is not ``within`` and what that needs."""
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen and within(node):
            seen.add(node)
            yield node
            waiting.extend(node.all_input_nodes)


def depends(node: Node, on: Collection[Node]) -> bool:
    """Whether a node needs one of some others, in a graph whose nodes are in their order."""
    if not on:
        return False
    first = min(each._sort_key for each in on)
    return not set(on).isdisjoint(needed([node], lambda each: each._sort_key >= first))


class Order:
    """Who can need whom while a graph is changed, told by where nodes stood before.

    A walk back from a node need not go on behind what stands in front of all that is looked for, unless a fusion has
    tied that to something later: its results are needed from the first of the replaced nodes on, and need what is in
    front of the last one.

    Args:
        graph: its nodes in their order.
    """

    def __init__(self, graph: Graph) -> None:
        self._places: dict[Node, float] = {node: place for place, node in enumerate(graph.nodes)}
        self._spans: list[tuple[float, float]] = []

    def replaced(self, old: Collection[Node], new: Collection[Node]) -> None:
        """Take note of a fusion."""
        places = [self._places[node] for node in old]
        self._spans.append((min(places), max(places)))
        self._places |= dict.fromkeys(new, max(places))

    def depends(self, node: Node, on: Collection[Node]) -> bool:
        """Whether a node needs one of some others that stood in the graph; it may be new itself."""
        first = min(self._places[each] for each in on)
        while (tied := min((low for low, high in self._spans if high >= first), default=first)) < first:
            first = tied
        return not set(on).isdisjoint(needed([node], lambda each: self._places.get(each, inf) >= first))


_NOT_THE_USERS = (str(Path(__file__).parents[1] / "ops"), str(Path(torch.__file__).parent))


def where(node: Node) -> str:
    """The line of the user's source that a node comes from, as ``file:line: code``; empty if it is not known.

    It is the innermost one that is neither in the library's operations nor in torch.
    """
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n\s+([^\n]*))?', trace)
    outside = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    if not outside:
        return ""
    file, line, code = outside[-1]
    return f"{file}:{line}: {code.strip()}" if code else f"{file}:{line}"


class CannotBuild(Exception):
    """A proposal turns out not to be possible; its message is the reason that the report gives."""


@dataclass
class Changes:
    """What is known of a graph since it was looked at.

    Attributes:
        moved: which nodes have been replaced by which.
        layouts: those of the results of operators that gave lists of new tensors, by what :func:`_question` asks.
    """

    moved: dict[Node, Node] = field(default_factory=dict)
    layouts: dict[Any, list[_Layout]] = field(default_factory=dict)


class _Layout(NamedTuple):
    """How a tensor lies in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _layout(fake: torch.Tensor) -> _Layout:
    return _Layout(tuple(fake.shape), fake.stride(), fake.dtype, fake.device)


def _empty(mode: FakeTensorMode, layout: _Layout) -> FakeTensor:
    """A fake of new memory, made as its mode makes those that it has the layouts of."""
    size, stride, dtype, device = layout
    return FakeTensor(mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)


class Editor:
    """Adds nodes to a graph, each with the fake that it will hold.

    Args:
        graph: the graph.
        anchor: the node whose source lines the new nodes get.
        first: in front of which nothing is put, so that what is written in between is still read at the same time.
        changes: what has been changed so far.
    """

    def __init__(self, graph: torch.fx.Graph, anchor: Node, first: Node, changes: Changes) -> None:
        self.graph, self.anchor, self._after, self._changes = graph, anchor, first.prev, changes
        self._mode = detect_fake_mode([value(anchor)])
        self.added: list[Node] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call, right behind the last of its arguments."""
        args, kwargs = torch.fx.map_arg((args, kwargs), self._now)
        before = [self._after]

        def held(node: Node) -> Any:
            before.append(node)
            return value(node)

        fakes = torch.fx.map_arg((args, kwargs), held)
        with self.graph.inserting_after(max(before, key=lambda n: n._sort_key)):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self._result(target, *fakes)
        for name in ("stack_trace", "nn_module_stack", "original_aten", "from_node"):
            if name in self.anchor.meta:
                node.meta[name] = self.anchor.meta[name]
        self.added.append(node)
        return node

    def _result(self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call gives, as fakes; of an operator that has been asked the same before, by the layouts it gave."""
        if target is operator.getitem or self._mode is None:
            return target(*args, **kwargs)
        key = _question(target, args, kwargs)
        if (known := self._changes.layouts.get(key)) is not None:
            return [_empty(self._mode, layout) for layout in known]
        with self._mode:
            results = target(*args, **kwargs)
        if key is not None:
            self._changes.layouts[key] = [_layout(each) for each in results]
        return results

    def _now(self, node: Node) -> Node:
        while node in self._changes.moved:
            node = self._changes.moved[node]
        return node

    def item(self, node: Node, index: int) -> Node:
        """One of several results of a call."""
        return self.call(operator.getitem, node, index)

    def size(self, node: Node, dim: int) -> int | Node:
        """A size of a tensor, as an argument of a call."""
        size = value(node).shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    def shaped(self, node: Node, like: Node, sizes_of: Iterable[Node]) -> Node:
        """A node in the shape of another.

        Args:
            node: what is to be seen.
            like: the shape.
            sizes_of: nodes whose sizes may be asked for where a size is symbolic.

        Raises:
            CannotBuild: two symbolic sizes are none of theirs.
        """
        want = value(like).shape
        if same_shape(want, value(node).shape):
            return node
        sizes: list[int | Node] = []
        sources, inferred = [node, *sizes_of], False
        for size in want:
            if isinstance(size, int):
                sizes.append(size)
                continue
            known = self._size(size, sources)
            if known is None and inferred:
                raise CannotBuild("more than one symbolic size of the result is no size of an input")
            inferred |= known is None
            sizes.append(-1 if known is None else known)
        return self.call(aten.reshape.default, node, sizes)

    def _size(self, size: Any, sources: Iterable[Node]) -> int | Node | None:
        for source in sources:
            for dim, its in enumerate(value(source).shape):
                if not isinstance(its, int) and same_size(its, size):
                    return self.size(source, dim)
        return None


_FIXED = (int, float, str, torch.dtype, torch.device, type(None))


def _question(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the layouts of a list of new tensors depend on: the operator, its options and the layouts of its inputs.

    None for another operator, where a size is symbolic, and for lists that hold more than plain values.
    """
    if not isinstance(target, OpOverload):
        return None
    returned = target._schema.returns
    if len(returned) != 1 or str(returned[0].type) != "List[Tensor]" or returned[0].alias_info is not None:
        return None
    given: list[Any] = []
    for each in (*args, *kwargs, *kwargs.values()):
        parts = (*each.shape, *each.stride()) if isinstance(each, torch.Tensor) else each
        parts = parts if isinstance(parts, list | tuple) else (parts,)
        if not all(isinstance(part, _FIXED) for part in parts):
            return None
        given.append(_layout(each) if isinstance(each, torch.Tensor) else tuple(parts))
    return target, *given


def finish(graph: torch.fx.Graph) -> None:
    """Put nodes into an order in which they can run, and drop those that nobody needs."""
    in_order(graph)
    drop_unused(graph)


def in_order(graph: torch.fx.Graph) -> None:
    """Put nodes into an order in which they can run, if they are not."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    if not all(needs < node for node in graph.nodes for needs in node.all_input_nodes):
        stable_topological_sort(graph)


def drop_unused(graph: torch.fx.Graph) -> None:
    """Drop the nodes that nobody needs, and those that only they needed.

    As ``Graph.eliminate_dead_code`` does, which asks every node of a graph whether it has side effects.
    """
    waiting = [node for node in graph.nodes if not node.users]
    while waiting:
        node = waiting.pop()
        if not node.users and not node._erased and not node.is_impure():
            inputs = node.all_input_nodes
            graph.erase_node(node)
            waiting += inputs
