"""Rotary embedding: one launch for queries and keys, for the norms of their heads, and for what is put beside it."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tilewright.fusion.graph import (
    RESHAPES,
    CannotBuild,
    aten,
    depends,
    hint,
    is_call,
    same_size,
    seen_through,
    value,
    wanted,
)
from tilewright.fusion.inductor import inlining, joining
from tilewright.fusion.rule import Proposal, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.fx import Graph

    from tilewright.fusion.found import Found, Index
    from tilewright.fusion.graph import Editor

_TABLE = ("cos", "sin", "freqs_cis", "position_ids", "offsets", "cu_seqlens")
_NORM = ("eps", "weight_offset", "cast")
_ONE_AT_A_TIME = ("strides",)
_NOT_WITH_NORMS = ("strides", "inverse", "transpose", "numerics")
_OF_THE_FORM = ("table", "products", "batched")


class RopePair:
    """Two rotations by one table and the same options."""

    name = "rope_qk"
    pattern = "rope of two tensors, q and k, by the same table with the same options"
    replacement = "rope_qk"
    contract = (
        "the bits of the two calls: one kernel body serves both functions; of plain PyTorch where products are not "
        "rounded before they are added, which 'rope_products' names"
    )
    pays: tuple[int | None, int | None] = (None, None)  # one launch for two at every size, the table read once

    def propose(self, graph: Graph, index: Index) -> Iterator[Proposal | Refusal]:
        """Pairs in the order of the graph, then those that would be pairs without what they carry along."""
        left: list[Found] = []
        for pair in self._free_pairs(index, [_kept(found) for found in index.of("rope")], left):
            yield self._proposal(*pair)
            parts = [found.alone for found in pair if found.alone is not None]
            for part in self._free_pairs(index, parts, []):  # which save less: for where the whole cannot be made
                yield self._proposal(*part)
        last: list[Found] = []
        for pair in self._free_pairs(index, [found.alone or found for found in left], last):
            yield self._proposal(*pair)
        single: list[Found] = []
        for pair in pairs(index, last, single):  # of which Inductor rotates one at least
            yield _not_worth(pair)
        for found in _followers(index, single):
            yield Refusal(found.outputs["y"], "the second tensor is computed from the first one's rotation")

    def _free_pairs(self, index: Index, rotations: Sequence[Found], left: list[Found]) -> Iterator[tuple[Found, Found]]:
        """The pairs of those that nobody inlines; all others are put into ``left``, in their order."""
        single: list[Found] = []
        yield from pairs(index, [found for found in rotations if _inlining(found) is None], single)
        left += [found for found in rotations if found in single or _inlining(found) is not None]

    def _proposal(self, q: Found, k: Found) -> Proposal:
        tensors, results = (q.tensor("x"), k.tensor("x")), (q.outputs["y"], k.outputs["y"])
        once = tuple(node for node in map(q.inputs.get, _TABLE) if node is not None)
        options = {name: v for name, v in q.options.items() if name not in (*_ONE_AT_A_TIME, *_OF_THE_FORM)}

        def build(editor: Editor) -> Mapping[Node, Node]:
            table = _table(editor, q, tensors[0])
            strides = {"q_strides": _strides(editor, q), "k_strides": _strides(editor, k)}
            call = editor.call(torch.ops.tilewright.rope_qk.default, *tensors, **table, **options, **strides)
            return {old: editor.item(call, place) for place, old in enumerate(results)}

        return Proposal(
            node=results[0],
            replaces=results,
            claims=q.nodes | k.nodes,
            build=build,
            done="one launch for both",
            moved_before=(*_moved(q), *_moved(k), *once, *once),
            moved_after=(*tensors, *results, *once),
            kernels=(2 + _is_joined(q) + _is_joined(k), 1),  # whoever serves the two serves the pair
            differences=("rope_products",) if q.options.get("products") == "rounded" else (),
        )


def pairs(index: Index, rotations: Sequence[Found], left: list[Found]) -> Iterator[tuple[Found, Found]]:
    """Every two rotations that one call can make, in their order; those without a partner are put into ``left``."""
    waiting: dict[Any, Found] = {}
    single: set[Found] = set()
    for found in rotations:
        key = _key(index, found)
        first = waiting.pop(key, None)
        if first is not None and not _follows(found, first):
            yield first, found
            continue
        waiting[key] = found
        single |= set() if first is None else {first}
    single.update(waiting.values())
    left += [found for found in rotations if found in single]


def _followers(index: Index, rotations: Sequence[Found]) -> Iterator[Found]:
    """Those that would make a pair with one before, if they were not computed from it."""
    last: dict[Any, Found] = {}
    for found in rotations:
        before = last.get(_key(index, found))
        if before is not None and _follows(found, before):
            yield found
        last[_key(index, found)] = found


def _follows(found: Found, before: Found) -> bool:
    return depends(found.tensor("x"), {before.outputs["y"]})


def _key(index: Index, found: Found) -> Any:
    """What rotations have in common that one call can make."""
    if found not in index.paired:
        options = {name: given for name, given in found.options.items() if name not in _ONE_AT_A_TIME}
        table = tuple(index.held(found, name) for name in _TABLE)
        index.paired[found] = table, _alike(found), str(sorted(options.items(), key=str))
    return index.paired[found]


def _alike(found: Found) -> tuple[Any, ...]:
    """What two tensors of one call have in common: all but the number of heads."""
    x = value(found.tensor("x"))
    heads = found.options["layout"].find("h")
    return x.dtype, x.device, *(str(size) for dim, size in enumerate(x.shape) if dim != heads)


def _is_joined(found: Found) -> bool:
    """Whether a kernel of its own puts the features that are not rotated beside the others."""
    return found.alone is not None and found.source != "aten"


def _moved(found: Found) -> tuple[Node, ...]:
    """What a rotation reads and writes."""
    x, y = found.tensor("x"), found.outputs["y"]
    return (*_moved(found.alone), y, y) if found.alone is not None and _is_joined(found) else (x, y)


def _kept(found: Found) -> Found:
    """A rotation; without the other features where Inductor puts them beside it in a kernel that is needed anyway."""
    return found.alone if found.alone is not None and _joining(found) is not None else found


def _joining(found: Found) -> Node | None:
    """The kernel that reads what is rotated and what is not from two places; None if they are joined before it."""
    return joining(found.outputs["y"]) if _is_joined(found) else None


def _inlining(found: Found) -> Node | None:
    """The kernel that computes a rotation in plain PyTorch as it reads it; None if none does."""
    return inlining(found.outputs["y"]) if found.source == "aten" else None


def _not_worth(pair: tuple[Found, Found]) -> Refusal:
    found, user = next((each, user) for each in pair if (user := _inlining(each)) is not None)
    why = f"Inductor rotates it in the kernel of {user.name}; a launch for both would save none"
    return Refusal(pair[0].outputs["y"], f"{found.outputs['y'].name}: {why}")


class PartialRope:
    """One rotation of a part of each head, and the kernel that puts the other features beside it."""

    name = "partial_rope"
    pattern = "rope of a slice of the features, and the cat that puts the others in their places again"
    replacement = "rope"
    contract = "the bits of the two steps: features that are not rotated are copied"
    pays: tuple[int | None, int | None] = (None, None)  # what is rotated is not written and read in between

    def propose(self, graph: Graph, index: Index) -> Iterator[Proposal | Refusal]:
        """One candidate for each; in plain PyTorch Inductor makes one kernel of it."""
        for found in filter(_is_joined, index.of("rope")):
            user = _joining(found)
            if user is None:
                yield self._proposal(found)
            else:
                why = f"Inductor puts the other features beside it in the kernel of {user.name}"
                yield Refusal(found.outputs["y"], f"{why}; no launch would be saved")

    def _proposal(self, found: Found) -> Proposal:
        x, y = found.tensor("x"), found.outputs["y"]
        table = tuple(node for node in map(found.inputs.get, _TABLE) if node is not None)

        def build(editor: Editor) -> Mapping[Node, Node]:
            given = {**found.options, **_table(editor, found, x), "strides": _strides(editor, found)}
            return {y: editor.call(torch.ops.tilewright.rope.default, x, **given)}

        return Proposal(
            node=y,
            replaces=(y,),
            claims=found.nodes,
            build=build,
            done="the other features copied in the same launch",
            moved_before=(*_moved(found), *table),
            moved_after=(x, y, *table),
            kernels=(2, 1),
        )


class QkNormRope:
    """Norms of the heads of q and k, and their rotation."""

    name = "qk_norm_rope"
    pattern = "rms_norm of each head of q and of k, and rope of both by the same table"
    replacement = "qk_norm_rope"
    contract = "the bits of the steps: the norm is rounded before it is rotated; in plain PyTorch as rope_qk"
    pays: tuple[int | None, int | None] = (None, None)  # the norms are neither written nor read

    def propose(self, graph: Graph, index: Index) -> Iterator[Proposal | Refusal]:
        """One candidate for each pair of rotations of which one at least is of a norm."""
        norms = {found.outputs["y"]: found for found in index.of("rms_norm")}
        for pair in pairs(index, index.of("rope"), []):
            before = [_normalised(rotation, norms) for rotation in pair]
            if any(before):
                yield self._candidate(pair, before)

    def _candidate(
        self, pair: tuple[Found, Found], before: list[tuple[Found, list[Node]] | None]
    ) -> Proposal | Refusal:
        start = pair[0].outputs["y"]
        first, second = before
        if first is None or second is None:
            return Refusal(start, "only one of the two is normalised")
        why = _different((first[0], second[0]), pair)
        if why:
            return Refusal(start, why)
        for (norm, path), rotation in zip((first, second), pair, strict=True):
            if wanted(norm.outputs["y"], {rotation.outputs["y"]}, rotation.nodes | set(path)):
                return Refusal(start, "a norm is also used before its rotation, and the kernel does not return it")
        return self._proposal(pair, (first, second))

    def _proposal(
        self, pair: tuple[Found, Found], before: tuple[tuple[Found, list[Node]], tuple[Found, list[Node]]]
    ) -> Proposal:
        q, k = pair
        norms = [norm for norm, _ in before]
        weights = [norm.inputs["weight"] for norm in norms]
        results = tuple(rotation.outputs["y"] for rotation in pair)
        options = {name: norms[0].options[name] for name in _NORM}
        options |= {name: v for name, v in q.options.items() if name not in (*_NOT_WITH_NORMS, *_OF_THE_FORM)}

        def build(editor: Editor) -> Mapping[Node, Node]:
            heads = [_replayed(editor, norm.tensor("x"), path) for norm, path in before]
            table = _table(editor, q, heads[0])
            call = editor.call(torch.ops.tilewright.qk_norm_rope.default, *heads, *weights, **table, **options)
            return {old: editor.item(call, place) for place, old in enumerate(results)}

        read = [norm.tensor("x") for norm in norms]
        table = tuple(node for node in map(q.inputs.get, _TABLE) if node is not None)
        between = [norm.outputs["y"] for norm in norms]
        return Proposal(
            node=results[0],
            replaces=results,
            claims=frozenset().union(q.nodes, k.nodes, *(norm.nodes for norm in norms)),
            build=build,
            done="the norms of both and their rotation in one launch",
            moved_before=(*read, *between, *between, *results, *table, *table),
            moved_after=(*read, *results, *table),
            kernels=(4, 1),
            differences=("rope_products",) if q.options.get("products") == "rounded" else (),
        )


def _normalised(rotation: Found, norms: Mapping[Node, Found]) -> tuple[Found, list[Node]] | None:
    """The norm that a rotation is of, and the views from it to what is rotated; None if there is none."""
    node, path = rotation.tensor("x"), []
    while node not in norms:
        source = _permuted(node) or seen_through(node)
        if source is None:
            return None
        path.append(node)
        node = source
    return norms[node], path[::-1]


def _permuted(node: Node) -> Node | None:
    """What a node shows with other dimensions first, its last one in place; None if it is no such view."""
    if not is_call(node, aten.permute.default):
        return None
    source, order = node.args
    assert isinstance(source, Node)
    assert isinstance(order, list | tuple)
    return source if order[-1] in (-1, len(order) - 1) else None


def _replayed(editor: Editor, node: Node, path: list[Node]) -> Node:
    """What views of one tensor would be of another of its shape, which may lie otherwise in memory.

    Raises:
        CannotBuild: one of them would be a copy.
    """
    for view in _last_shapes(path):
        target = aten.reshape.default if is_call(view, *RESHAPES) else view.target
        seen = editor.call(target, node, *view.args[1:], **view.kwargs)  # type: ignore[arg-type]
        if is_call(seen, aten.reshape.default) and not _in_memory_of(seen, node):
            raise CannotBuild("what is normalised would have to be copied into the shape that is rotated")
        node = seen
    return node


def _last_shapes(path: list[Node]) -> list[Node]:
    """The views that decide: those before a reshape, up to a permutation or a copy, it makes up for."""
    left: list[Node] = []
    for view in path:
        while is_call(view, *RESHAPES) and left and not is_call(left[-1], aten.permute.default, aten.clone.default):
            left.pop()
        left.append(view)
    return left


def _in_memory_of(node: Node, other: Node) -> bool:
    a, b = (value(each).untyped_storage() for each in (node, other))
    return bool(a._cdata == b._cdata)


def _different(norms: tuple[Found, Found], pair: tuple[Found, Found]) -> str:
    """Why one call cannot make these steps; empty if it can."""
    first, second = norms
    for name in _NORM:
        if first.options[name] != second.options[name]:
            return f"the norms have different {name}: {first.options[name]} and {second.options[name]}"
    if first.options["weight_offset"] and any(norm.inputs["weight"] is None for norm in norms):
        return "a norm adds a number to a weight that it does not have"
    options = pair[0].options
    for name in ("inverse", "transpose"):
        if options.get(name):
            return f"the rotation is {name}, which qk_norm_rope is not"
    table = pair[0].inputs.get("cos")
    if options["numerics"] != "exact" and table is not None and value(table).dtype != value(pair[0].tensor("x")).dtype:
        return "the rotation rounds its table first, which qk_norm_rope does not"
    asked = {found.options.get("impl") for found in (*norms, *pair)}
    return "the operations ask for different implementations" if len(asked) > 1 else ""


def _strides(editor: Editor, found: Found) -> list[int | Node] | None:
    """In which order the result lies: as its form has it, where the operator would choose otherwise."""
    if "strides" in found.options:
        given: list[int | Node] | None = found.options["strides"]
        return given
    y, x = value(found.outputs["y"]), found.tensor("x")
    strides = list(y.stride())
    if all(isinstance(stride, int) for stride in strides):
        return strides
    # Some size is symbolic: strides are products of sizes, if there are no gaps.
    running: int | Node = 1
    given = [1] * len(strides)
    for dim in sorted(range(len(strides)), key=lambda dim: hint(strides[dim])):
        so_far = value(running) if isinstance(running, Node) else running
        if not same_size(strides[dim], so_far):
            return None
        given[dim] = running
        size = editor.size(x, dim)
        both_numbers = isinstance(running, int) and isinstance(size, int)
        running = running * size if both_numbers else editor.call(operator.mul, running, size)  # type: ignore[operator]
    return given


def _table(editor: Editor, found: Found, x: Node) -> dict[str, Any]:
    """The arguments of the operator that say how far each token is turned."""
    if found.source == "tilewright":
        return {name: found.inputs[name] for name in _TABLE if name in found.inputs}
    if found.options["table"] == "complex":
        pairs = editor.call(aten.view_as_real.default, found.tensor("freqs_cis"))
        cos, sin = (editor.call(aten.select.int, pairs, -1, part) for part in (0, 1))
    else:
        cos, sin = found.tensor("cos"), found.tensor("sin")
    positions = None
    if found.options["batched"]:
        tokens = (0, 1 if found.options["layout"] == "bshd" else 2)
        positions = _counted(editor, [editor.size(x, dim) for dim in tokens], value(cos).device)
    if value(cos).dim() != 2:
        flat = [-1, editor.size(cos, -1)]
        cos, sin = (editor.call(aten.reshape.default, each, flat) for each in (cos, sin))
    return {"cos": cos, "sin": sin, "position_ids": positions}


def _counted(editor: Editor, sizes: list[int | Node], device: torch.device) -> Node:
    """The row of a table for each token, where the tokens' rows follow one another: ``[B, S]``."""
    filled = editor.call(aten.full.default, sizes, 1, dtype=torch.int64, device=device, pin_memory=False)
    flat = editor.call(aten.reshape.default, filled, [-1])
    counted = editor.call(aten.sub.Tensor, editor.call(aten.cumsum.default, flat, 0), 1)
    return editor.call(aten.reshape.default, counted, sizes)


RULES: tuple[Any, ...] = (RopePair(), PartialRope(), QkNormRope())
