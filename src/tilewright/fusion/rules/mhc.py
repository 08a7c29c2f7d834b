"""Hyper-connections: a layer's end with the next one's beginning, and the norm of a layer's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.fusion.graph import depends, origin, same_shape, value, wanted
from tilewright.fusion.rule import Proposal, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.fx import Graph, Node

    from tilewright.fusion.found import Found, Index
    from tilewright.fusion.graph import Editor

_MIX = ("fn", "scale", "base", "norm_weight")
_OPTIONS = (
    "rms_eps", "pre_eps", "sinkhorn_eps", "post_mult", "sinkhorn_iters", "norm_eps", "batch_invariant", "store",
    "recompute",
)  # fmt: skip
_PRE_RESULTS = ("post_mix", "comb_mix", "layer_input", "pre_mix", "mixes", "rstd", "scalings")


class PostPre:
    """``mhc_post`` whose streams the next ``mhc_pre`` reads."""

    name = "mhc_post_pre"
    pattern = "mhc_post, and mhc_pre of the streams that it makes"
    replacement = "mhc_post_pre"
    contract = "the bits of the two calls: the new streams are rounded before they are mixed"
    pays: tuple[int | None, int | None] = (None, None)  # one call on the host, and never more work on the device

    def propose(self, graph: Graph, index: Index) -> Iterator[Proposal | Refusal]:
        """One candidate for each pair."""
        ends = {found.outputs["streams"]: found for found in index.of("mhc_post")}
        for begin in index.of("mhc_pre"):
            end = ends.get(origin(begin.tensor("residual")))
            if end is not None:
                yield self._candidate(end, begin)

    def _candidate(self, end: Found, begin: Found) -> Proposal | Refusal:
        streams = end.outputs["streams"]
        if not _same_streams(streams, begin.tensor("residual")):
            return Refusal(streams, "a view in between changes the number of streams")
        if end.options["impl"] != begin.options["impl"]:
            return Refusal(streams, "the two calls ask for different implementations")
        given = [begin.inputs[name] for name in _MIX]
        if any(depends(node, {streams}) for node in given if node is not None):
            return Refusal(streams, "the mixing weights are computed from the streams")
        replaced = (streams, *begin.outputs.values())

        def build(editor: Editor) -> Mapping[Node, Node]:
            first = [end.inputs[name] for name in ("x", "residual", "post_mix", "comb_mix")]
            options = {name: begin.options[name] for name in _OPTIONS}
            call = editor.call(
                torch.ops.tilewright.mhc_post_pre.default, *first, *given, **options, impl=begin.options["impl"]
            )
            sizes_of = [end.tensor("residual")]
            built = {streams: editor.shaped(editor.item(call, 0), streams, sizes_of)}
            for place, role in enumerate(_PRE_RESULTS):
                if role in begin.outputs:
                    old = begin.outputs[role]
                    built[old] = editor.shaped(editor.item(call, place + 1), old, sizes_of)
            return built

        moved = [n for found in (end, begin) for n in found.inputs.values() if n is not None]
        moved += replaced
        asks = {name: begin.options[name] for name in _OPTIONS if name not in ("store", "recompute")}
        return Proposal(
            node=streams,
            replaces=replaced,
            claims=end.nodes | begin.nodes,
            build=build,
            done="one call of mhc_post_pre",
            moved_before=tuple(moved),
            moved_after=tuple(moved),
            kernels=(2, 1),
            asks=("mhc_post_pre", tuple(end.inputs.values()) + tuple(given[:3]), asks | {"norm_weight": given[3]}),
        )


class PreNorm:
    """``mhc_pre`` whose layer input is normalised and used in no other way."""

    name = "mhc_pre_norm"
    pattern = "mhc_pre, and rms_norm of the layer's input"
    replacement = "mhc_pre"
    contract = "the layer's input is rounded before the norm, the norm before nothing else: cast='after_weight'"
    pays: tuple[int | None, int | None] = (None, None)  # the norm takes no launch of its own, and reads nothing again

    def propose(self, graph: Graph, index: Index) -> Iterator[Proposal | Refusal]:
        """One candidate for each norm."""
        begins = {each.outputs["layer_input"]: each for each in index.of("mhc_pre") if "layer_input" in each.outputs}
        for norm in index.of("rms_norm"):
            begin = begins.get(origin(norm.tensor("x")))
            if begin is not None:
                yield self._candidate(begin, norm)

    def _candidate(self, begin: Found, norm: Found) -> Proposal | Refusal:
        layer_input, y = begin.outputs["layer_input"], norm.outputs["y"]
        weight = norm.inputs["weight"]
        why = self._different(begin, norm, weight)
        if why:
            return Refusal(layer_input, why)
        assert weight is not None
        others = {node for role, node in begin.outputs.items() if role != "layer_input"}
        if wanted(layer_input, {y, *others}, norm.nodes):
            return Refusal(layer_input, "the layer's input is also used before its norm, which mhc_pre does not return")
        if depends(weight, {layer_input}):
            return Refusal(layer_input, "the norm's weight is computed from what it scales")
        replaced = (y, *others)

        def build(editor: Editor) -> Mapping[Node, Node]:
            tensors = [begin.inputs[name] for name in ("residual", "fn", "scale", "base")]
            options = {name: begin.options[name] for name in _OPTIONS} | {"norm_eps": norm.options["eps"]}
            call = editor.call(
                torch.ops.tilewright.mhc_pre.default, *tensors, weight, **options, impl=begin.options["impl"]
            )
            built = {y: editor.shaped(editor.item(call, 2), y, [begin.tensor("residual")])}
            for place, role in enumerate(_PRE_RESULTS):
                if role != "layer_input" and role in begin.outputs:
                    built[begin.outputs[role]] = editor.item(call, place)
            return built

        streams = begin.tensor("residual")
        asks = {name: begin.options[name] for name in _OPTIONS if name not in ("store", "recompute")}
        asks |= {"norm_eps": norm.options["eps"], "norm_weight": weight}
        tensors = tuple(begin.inputs[name] for name in ("residual", "fn", "scale", "base"))
        return Proposal(
            node=layer_input,
            replaces=replaced,
            claims=begin.nodes | norm.nodes,
            build=build,
            done="the norm in mhc_pre's own kernel",
            moved_before=(streams, layer_input, layer_input, y, weight),
            moved_after=(streams, y, weight),
            kernels=(2, 1),
            asks=("mhc_pre", tensors, asks),
        )

    @staticmethod
    def _different(begin: Found, norm: Found, weight: Node | None) -> str:
        """Why this norm is not the one that ``mhc_pre`` has; empty if it is."""
        if begin.inputs["norm_weight"] is not None:
            return "mhc_pre has a norm already"
        if weight is None:
            return "mhc_pre's norm has a weight"
        if norm.options["cast"] != "after_weight":
            return f"the norm is rounded before its weight multiplies (cast={norm.options['cast']!r}), mhc_pre's after"
        if norm.options["weight_offset"]:
            return "the norm adds a number to its weight, mhc_pre's does not"
        if norm.options.get("impl") not in (None, begin.options["impl"]):
            return "the two calls ask for different implementations"
        return ""


def _same_streams(a: Node, b: Node) -> bool:
    return same_shape(value(a).shape[-2:], value(b).shape[-2:])


RULES: tuple[Any, ...] = (PostPre(), PreNorm())
