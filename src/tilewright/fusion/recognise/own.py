"""The library's own operators in a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tilewright.fusion.found import Found, NearMiss
from tilewright.fusion.graph import arguments, result, value
from tilewright.fusion.recognise.carried import among_others
from tilewright.ops.quant_fp8.format import decoded
from tilewright.ops.rope.call import default_rotary_dim

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Graph, Node


def recognise(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """Every call of an operator that some rule is about."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            read = READERS.get(str(node.target))
            if read is not None:
                found.append(read(node))
    return found, []


def _reader(kind: str, inputs: tuple[str, ...], results: tuple[str, ...]) -> Callable[[Node], Found]:
    """A function that reads a call of an operator.

    Args:
        kind: of what is found.
        inputs: the arguments that are tensors; all others are options.
        results: the roles of the results; a single one is the call itself.
    """

    def read(node: Node) -> Found:
        given = arguments(node)
        tensors = {name: given.pop(name) for name in inputs}
        outputs = _outputs(node, results)
        return Found(kind, "tilewright", tensors, given, outputs, frozenset({node, *outputs.values()}))

    return read


def _outputs(node: Node, roles: tuple[str, ...]) -> Mapping[str, Node]:
    if len(roles) == 1:
        return {roles[0]: node}
    taken = {role: result(node, index) for index, role in enumerate(roles)}
    return {role: each for role, each in taken.items() if each is not None}


def _quant(node: Node) -> Found:
    given = arguments(node)
    (text,) = given["formats"]
    options: dict[str, Any] = {"format": decoded(text), "impl": given["impl"]}
    outputs = _outputs(node, ("values", "scales"))
    inputs = {"x": given["x"], "scale": given["scale"]}
    if given["scale"] is not None:  # the list of results has one element
        outputs = {role: each for role, each in outputs.items() if role == "values"}
    return Found("quant_fp8", "tilewright", inputs, options, outputs, frozenset({node, *outputs.values()}))


def _rope(node: Node) -> Found:
    """A rotation, with the features that are put beside it again; the number of those that are rotated is said."""
    found = _ROPE(node)
    features, columns = value(found.tensor("x")).shape[-1], value(found.tensor("cos")).shape[-1]
    if not isinstance(features, int) or not isinstance(columns, int):
        return found
    rotated = found.options["rotary_dim"] or default_rotary_dim(columns, features)
    return among_others(replace(found, options={**found.options, "rotary_dim": rotated}))


_MIXES = ("fn", "scale", "base", "norm_weight")
_PRE = ("post_mix", "comb_mix", "layer_input", "pre_mix", "mixes", "rstd", "scalings")
_TABLE = ("cos", "sin", "position_ids", "offsets", "cu_seqlens")

_ROPE = _reader("rope", ("x", *_TABLE), ("y",))

READERS: dict[str, Callable[[Node], Found]] = {
    "tilewright.rms_norm.default": _reader("rms_norm", ("x", "weight"), ("y",)),
    "tilewright.add_rms_norm.default": _reader("add_rms_norm", ("x", "residual", "weight"), ("y", "stored")),
    "tilewright.quant_fp8.default": _quant,
    "tilewright.rope.default": _rope,
    "tilewright.mhc_pre.default": _reader("mhc_pre", ("residual", *_MIXES), _PRE),
    "tilewright.mhc_post.default": _reader("mhc_post", ("x", "residual", "post_mix", "comb_mix"), ("streams",)),
}
"""By the operator's name, as its text."""
