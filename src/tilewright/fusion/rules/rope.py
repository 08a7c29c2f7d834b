"""Rotary embedding of queries and keys by one table: one launch for both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.fusion.graph import aten, depends, same_size, value
from tilewright.fusion.rule import Proposal, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.fx import Graph, Node

    from tilewright.fusion.found import Found, Index
    from tilewright.fusion.graph import Editor

_TABLE = ("cos", "sin", "freqs_cis", "position_ids", "offsets", "cu_seqlens")
_ONE_AT_A_TIME = ("strides",)
_OF_THE_FORM = ("table", "products")


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
        """Pairs in the order of the graph; what is left over has no partner."""
        waiting: dict[Any, Found] = {}
        for found in index.of("rope"):
            options = {name: given for name, given in found.options.items() if name not in _ONE_AT_A_TIME}
            key = tuple(found.inputs.get(name) for name in _TABLE), str(sorted(options.items(), key=str))
            first = waiting.pop(key, None)
            if first is None:
                waiting[key] = found
            elif depends(found.tensor("x"), {first.outputs["y"]}):
                yield Refusal(found.outputs["y"], "the second tensor is computed from the first one's rotation")
                waiting[key] = found
            else:
                yield self._proposal(first, found)

    def _proposal(self, q: Found, k: Found) -> Proposal:
        tensors, results = (q.tensor("x"), k.tensor("x")), (q.outputs["y"], k.outputs["y"])
        once = tuple(node for node in map(q.inputs.get, _TABLE) if node is not None)
        options = {name: v for name, v in q.options.items() if name not in (*_ONE_AT_A_TIME, *_OF_THE_FORM)}

        def build(editor: Editor) -> Mapping[Node, Node]:
            table = _table(editor, q, tensors[0])
            strides = {"q_strides": _strides(q), "k_strides": _strides(k)}
            call = editor.call(torch.ops.tilewright.rope_qk.default, *tensors, **table, **options, **strides)
            return {old: editor.item(call, place) for place, old in enumerate(results)}

        return Proposal(
            node=results[0],
            replaces=results,
            claims=q.nodes | k.nodes,
            build=build,
            done="one launch for both",
            moved_before=(*tensors, *results, *once, *once),
            moved_after=(*tensors, *results, *once),
            kernels=(2, 1),  # whoever serves the two serves the pair
            differences=("rope_products",) if q.options.get("products") == "rounded" else (),
        )


def _strides(found: Found) -> list[int] | None:
    """In which order the result lies: as its form has it, where the operator would choose otherwise."""
    if "strides" in found.options:
        given: list[int] | None = found.options["strides"]
        return given
    strides = value(found.outputs["y"]).stride()
    return list(strides) if all(isinstance(stride, int) for stride in strides) else None


def _table(editor: Editor, found: Found, x: Node) -> dict[str, Any]:
    """The arguments of the operator that say how far each token is turned."""
    if found.source == "tilewright":
        return {name: found.inputs[name] for name in _TABLE if name in found.inputs}
    if found.options["table"] == "complex":
        pairs = editor.call(aten.view_as_real.default, found.tensor("freqs_cis"))
        cos, sin = (editor.call(aten.select.int, pairs, -1, part) for part in (0, 1))
    else:
        cos, sin = found.tensor("cos"), found.tensor("sin")
    rows, positions = value(cos).shape[:-1], None
    if len(rows) == 2 and not any(same_size(size, 1) for size in rows):
        positions = _counted(editor, cos)
    if len(rows) > 1:
        flat = [-1, editor.size(cos, -1)]
        cos, sin = (editor.call(aten.reshape.default, each, flat) for each in (cos, sin))
    return {"cos": cos, "sin": sin, "position_ids": positions}


def _counted(editor: Editor, table: Node) -> Node:
    """The row of a table ``[B, S, D]``, counted over both dimensions, for each token: ``[B, S]``."""
    sizes = [editor.size(table, dim) for dim in (0, 1)]
    filled = editor.call(aten.full.default, sizes, 1, dtype=torch.int64, device=value(table).device, pin_memory=False)
    flat = editor.call(aten.reshape.default, filled, [-1])
    counted = editor.call(aten.sub.Tensor, editor.call(aten.cumsum.default, flat, 0), 1)
    return editor.call(aten.reshape.default, counted, sizes)


RULES: tuple[Any, ...] = (RopePair(),)
