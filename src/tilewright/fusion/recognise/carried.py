"""Rotations of a part of the features, and the ``cat`` that puts the others beside them again."""

from __future__ import annotations

from typing import Any

from tilewright.fusion.forms import Piece, is_last, piece, shape_of
from tilewright.fusion.found import Found
from tilewright.fusion.graph import aten, is_call, same_shape, same_size
from tilewright.ops.rope.call import MAX_HEAD_DIM


def among_others(found: Found) -> Found:
    """A rotation with the features that are not rotated, where a ``cat`` puts all together again; else itself.

    ``rotary_dim`` is a number or, where all features of ``x`` are rotated, None.
    """
    part, y = piece(found.tensor("x")), found.outputs["y"]
    if part is None or len(y.users) != 1:
        return found
    joined = next(iter(y.users))
    if not is_call(joined, aten.cat.default) or not is_last((*joined.args, 0)[1], joined):
        return found
    if not same_shape(shape_of(joined), shape_of(part.source)) or not _is_head(shape_of(joined)[-1]):
        return found
    start: Any = 0
    nodes = [*part.nodes, joined]
    for each in joined.args[0]:  # type: ignore[union-attr]
        own = part if each is y else piece(each)
        if not isinstance(own, Piece) or own.source is not part.source or not same_size(own.start, start):
            return found
        nodes += own.nodes
        start = start + shape_of(each)[-1]  # type: ignore[arg-type]
    width = found.options["rotary_dim"] or shape_of(y)[-1]
    if not isinstance(width, int) or not isinstance(part.start, int):
        return found
    options = {name: given for name, given in found.options.items() if name != "strides"}  # those of a part
    options |= {"rotary_dim": width, "rotary_offset": part.start + options["rotary_offset"]}
    inputs = {**found.inputs, "x": part.source}
    return Found(found.kind, found.source, inputs, options, {"y": joined}, found.nodes.union(nodes), alone=found)


def _is_head(features: Any) -> bool:
    """Whether one call takes heads of so many features."""
    return isinstance(features, int) and features % 2 == 0 and features <= MAX_HEAD_DIM
