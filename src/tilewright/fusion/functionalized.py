"""Calls of operators in a graph, whether functional or made so: what they read, and what holds what they write.

An operator that writes into its arguments stands in Inductor's graphs inside ``auto_functionalized`` or
``auto_functionalized_v2`` (``torch/_higher_order_ops/auto_functionalize.py``). Both give what the operator returns, or
one None, and behind it the new values: the first kind one for each written argument, in the order of the schema; the
second one for each *base*, the tensor whose memory an argument is a view of, with sizes and strides of the view beside.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._ops import OpOverload
from torch.fx import Node

from tilewright.fusion.graph import arguments, aten, is_call, result, same_shape, same_size, value

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
        aten.new_empty_strided.default, aten.full.default, aten.full_like.default, aten.zeros.default,
        aten.zeros_like.default, aten.new_zeros.default, aten.new_full.default,
    }
)  # fmt: skip
_SIZES = frozenset({aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default})


@dataclass(frozen=True)
class Written:
    """An argument that a call writes.

    Attributes:
        before: the node that holds its memory before; of the second kind of call its base.
        after: the node that holds it afterwards, row for row; None if nobody needs it or ``why_not`` says why there is
            none.
        nodes: those between the call and ``after``, which is among them.
        why_not: why nothing can take the place of what is written; empty if something can.
        is_whole: whether ``before`` holds what the call is given, row for row, so that it may be read in its place.
    """

    before: Node
    after: Node | None
    nodes: frozenset[Node]
    why_not: str = ""
    is_whole: bool = True


@dataclass(frozen=True)
class OperatorCall:
    """A call of an operator.

    Attributes:
        node: of the call.
        target: the operator.
        given: its arguments by their names; of those that it writes, the node that holds them before.
        written: those that it writes and that are there.
    """

    node: Node
    target: OpOverload
    given: Mapping[str, Any]
    written: Mapping[str, Written]

    def returned(self, place: int) -> Node | None:
        """The node that holds a result; None if nobody needs it."""
        alone = len(self.target._schema.returns) == 1 and self.node.target is self.target
        return self.node if alone else result(self.node, place)


def target_of(node: Node) -> OpOverload | None:
    """The operator that a node calls, by itself or inside ``auto_functionalized``; None if it calls none."""
    if node.op != "call_function":
        return None
    inner = node.args[0] if node.target in (auto_functionalized, auto_functionalized_v2) else node.target
    return inner if isinstance(inner, OpOverload) else None


def call_of(node: Node) -> OperatorCall:
    """How a node calls the operator of :func:`target_of`."""
    target = target_of(node)
    assert target is not None
    if node.target is target:
        return OperatorCall(node, target, arguments(node), {})
    schema = target._schema
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    first = max(1, len(schema.returns))
    read = {name: given for name, given in node.kwargs.items() if not name.startswith("_")}
    given: dict[str, Any] = defaults | read
    written: dict[str, Written] = {}
    if node.target is auto_functionalized:
        for place, name in enumerate(names):
            before = given.get(name)
            if isinstance(before, Node):
                written[name] = _taken(node, first + place, before)
        return OperatorCall(node, target, given, written)
    bases: Any = node.kwargs["_all_bases"]
    indices = [node.kwargs[f"_{name}_base_index"] for name in names]
    for name, index in zip(names, indices, strict=True):
        given[name] = None
        if isinstance(index, int):
            given[name] = bases[index]
            written[name] = _taken_from_base(node, first + index, bases[index], name, shared=indices.count(index) > 1)
    return OperatorCall(node, target, given, written)


def _taken(node: Node, place: int, before: Node) -> Written:
    """What the first kind of call writes: a tensor with the argument's sizes and strides."""
    after = result(node, place)
    return Written(before, after, frozenset() if after is None else frozenset({after}))


def _taken_from_base(node: Node, place: int, base: Node, name: str, *, shared: bool) -> Written:
    """What the second kind of call writes: its base whole, of which the argument may be a view."""
    after = result(node, place)
    is_whole = not shared and _shows_all(node, base, name)
    if after is None:
        return Written(base, None, frozenset(), is_whole=is_whole)
    if is_whole:
        return Written(base, after, frozenset({after}))
    shown, why_not = None, f"{name} and another argument are written through views of one tensor"
    if not shared:
        shown, why_not = _seen_as_argument(node, after, name)
    if shown is None:
        return Written(base, None, frozenset(), why_not, is_whole=False)
    return Written(base, shown, frozenset({after, shown}), is_whole=False)


def _shows_all(node: Node, base: Node, name: str) -> bool:
    """Whether an argument is its base, or a view that shows the base row for row."""
    given = node.kwargs
    if f"_{name}_slice_dim" in given:
        return False
    if f"_{name}_size" not in given:
        return True
    sizes, strides, offset = _view_of(node, name)
    held = value(base)
    return same_size(offset[0], held.storage_offset()) and _row_for_row(held, sizes, strides)


def _view_of(node: Node, name: str) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Sizes, strides and offset of an argument that is a view of its base."""
    sizes, strides, offset = (_numbers(node.kwargs[f"_{name}_{what}"]) for what in ("size", "stride", "storage_offset"))
    return sizes, strides, offset


def _seen_as_argument(node: Node, after: Node, name: str) -> tuple[Node | None, str]:
    """The node that shows a written base as its argument does; None, with the reason, if there is none."""
    if f"_{name}_slice_dim" in node.kwargs:
        return None, f"{name} is a part of the tensor that it is written into"
    sizes, strides, offset = _view_of(node, name)
    users = [user for user in after.users if not is_call(user, *_SIZES)]
    if len(users) == 1 and users[0].all_input_nodes[0] is after and isinstance(seen := value(users[0]), torch.Tensor):
        layout = same_shape(seen.shape, sizes) and same_shape(seen.stride(), strides)
        if layout and same_size(seen.storage_offset(), offset[0]):
            return users[0], ""
    return None, f"{name} is a view of the tensor that it is written into"


def _numbers(given: Any) -> tuple[Any, ...]:
    each = given if isinstance(given, list | tuple | torch.Size) else (given,)
    return tuple(value(size) if isinstance(size, Node) else size for size in each)


def _row_for_row(base: torch.Tensor, sizes: tuple[Any, ...], strides: tuple[Any, ...]) -> bool:
    """Whether a view shows all of a contiguous base in other leading dimensions."""
    if not sizes or base.dim() == 0 or not same_size(base.shape[-1], sizes[-1]):
        return False
    whole = 1
    for size in sizes:
        whole = whole * size
    return same_size(base.numel(), whole) and _is_dense(base.shape, base.stride()) and _is_dense(sizes, strides)


def _is_dense(sizes: Any, strides: Any) -> bool:
    step: Any = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if not same_size(size, 1) and not same_size(stride, step):
            return False
        step = step * size
    return True


def memory_of(node: Node) -> Node:
    """The node whose memory a node shows or, before calls were made functional, was written into."""
    while True:
        source = _shown(node)
        if source is None:
            return node
        node = source


def _shown(node: Node) -> Node | None:
    if not is_call(node, operator.getitem):
        return node.all_input_nodes[0] if _is_view(node) else None
    call: Any = node.args[0]
    place: Any = node.args[1]
    if not is_call(call, auto_functionalized, auto_functionalized_v2):
        return None
    schema = call.args[0]._schema
    at = place - max(1, len(schema.returns))
    if at < 0:
        return None
    if call.target is auto_functionalized_v2:
        before = call.kwargs["_all_bases"][at]
    else:
        names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        before = call.kwargs.get(names[at])
    return before if isinstance(before, Node) else None


def _is_view(node: Node) -> bool:
    """Whether a call shows the memory of its first argument."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or not node.all_input_nodes:
        return False
    returned = node.target._schema.returns
    aliased = len(returned) == 1 and returned[0].alias_info is not None and not returned[0].alias_info.is_write
    return aliased or is_call(node, aten.reshape.default, aten._unsafe_view.default)


def not_fresh(node: Node) -> str:
    """Why what a call fills is not memory that is only there for that; empty if it is."""
    start = memory_of(node)
    if start.op == "placeholder":
        return f"{start.name} is an input of the graph"
    if not is_call(start, *_ALLOCATIONS):
        return f"{start.name} holds something already"
    reader = _reader(start)
    return "" if reader is None else f"{reader.name} reads the same memory"


def _reader(node: Node) -> Node | None:
    """Who else reads what was allocated: neither a call that writes it nor a view for one."""
    for user in node.users:
        if is_call(user, *_SIZES):
            continue
        if _is_view(user):
            found = _reader(user)
            if found is not None:
                return found
        elif not _only_writes(user, node):
            return user
    return None


def _only_writes(call: Node, node: Node) -> bool:
    if call.target is auto_functionalized_v2:
        return not any(node is given for name, given in call.kwargs.items() if name != "_all_bases")
    if call.target is not auto_functionalized:
        return False
    schema = call.args[0]._schema  # type: ignore[union-attr]
    read = [a.name for a in schema.arguments if a.alias_info is None or not a.alias_info.is_write]
    return not any(call.kwargs.get(name) is node for name in read)
