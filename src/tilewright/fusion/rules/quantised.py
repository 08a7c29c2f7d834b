"""Something that is quantised to FP8, once or several times, and may be used otherwise too: one kernel for all of it.

The producer is a norm, a norm of a sum, a gated SiLU or a rotation. Whoever else uses what it computes gets it from
the same kernel, which writes it only then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tilewright.fusion.graph import aten, depends, is_call, origin, same_shape, value, wanted
from tilewright.fusion.rule import Proposal, Refusal, unite
from tilewright.ops.quant_fp8.call import EMITS, MAX_FORMATS
from tilewright.ops.quant_fp8.format import QuantFormat, encoded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.fx import Graph

    from tilewright.fusion.found import Found, Index
    from tilewright.fusion.graph import Editor

_NORM_OPTIONS = ("eps", "weight_offset", "cast")
_ROPE_OPTIONS = ("layout", "interleaved", "rotary_dim", "rotary_offset", "numerics")
_PLAIN_ROPE = {
    "offset": 0,
    "context_parallel": None,
    "mrope_section": None,
    "mrope_interleaved": False,
    "inverse": False,
    "transpose": False,
}
"""What a rotation that is quantised in the same launch does not do."""


@dataclass(frozen=True)
class Producer:
    """What is quantised.

    Attributes:
        found: the operation that computes it.
        y: the node that holds it.
        tensors: the new operation's tensors, as its arguments before ``scale``.
        options: its arguments after ``emit``, as its schema names them.
        stored: the node that holds the sum, where the new operation returns one.
        nodes: what is replaced.
    """

    found: Found
    y: Node
    tensors: tuple[Node | None, ...]
    options: dict[str, Any]
    stored: Node | None
    nodes: frozenset[Node]

    @property
    def moved(self) -> tuple[Node, ...]:
        """What is read, and the sum that is written."""
        return (*(t for t in self.tensors if t is not None), *(() if self.stored is None else (self.stored,)))


def norms(index: Index) -> Iterator[Producer]:
    """Every RMSNorm."""
    for found in index.of("rms_norm"):
        options = {name: found.options[name] for name in _NORM_OPTIONS}
        tensors = (found.tensor("x"), found.inputs["weight"])
        yield Producer(found, found.outputs["y"], tensors, options, None, found.nodes)


def norms_of_sums(index: Index) -> Iterator[Producer]:
    """Every RMSNorm of a sum, whether the sum is its own or an addition before it."""
    for found in index.of("add_rms_norm"):
        if "y" in found.outputs:
            options = {name: found.options[name] for name in (*_NORM_OPTIONS, "residual_rounding")}
            tensors = (found.tensor("x"), found.tensor("residual"), found.inputs["weight"])
            yield Producer(found, found.outputs["y"], tensors, options, found.outputs.get("stored"), found.nodes)
    for found in index.of("rms_norm"):
        total = origin(found.tensor("x"))
        if is_sum(total):
            options = {name: found.options[name] for name in _NORM_OPTIONS} | {"residual_rounding": "rounded"}
            x, residual = total.args
            assert isinstance(x, Node)
            assert isinstance(residual, Node)
            tensors = (x, residual, found.inputs["weight"])
            yield Producer(found, found.outputs["y"], tensors, options, total, found.nodes | {total})


def activations(index: Index) -> Iterator[Producer]:
    """Every gated SiLU."""
    for found in index.of("silu_mul"):
        yield Producer(found, found.outputs["y"], (found.tensor("x"),), {}, None, found.nodes)


def rotations(index: Index) -> Iterator[Producer]:
    """Every rotation of the library's own by counted or given positions, with the features that it carries along.

    In plain PyTorch Inductor makes one kernel of a rotation and its quantisation.
    """
    for found in index.of("rope"):
        if found.source == "tilewright" and _is_plain(found):
            options = {name: found.options[name] for name in _ROPE_OPTIONS}
            tensors = (*map(found.tensor, ("x", "cos", "sin")), found.inputs["position_ids"])
            yield Producer(found, found.outputs["y"], tensors, options, None, found.nodes)


def _is_plain(found: Found) -> bool:
    """Whether one call rotates and quantises so."""
    placed = found.inputs["offsets"] is not None or found.inputs["cu_seqlens"] is not None
    return not placed and all(found.options[name] == plain for name, plain in _PLAIN_ROPE.items())


def is_sum(node: Node) -> bool:
    """Whether a node is the sum of two tensors of one shape and dtype."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return False
    a, b = (value(n) if isinstance(n, Node) else None for n in node.args)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


class QuantisedRule:
    """Producers of one kind with everyone who quantises them."""

    pays: tuple[int | None, int | None] = (None, None)
    """At every size: one launch fewer at least, and nothing is read again (the quant_fp8 records, from 64 rows on)."""

    def __init__(self, name: str, pattern: str, replacement: str, contract: str, producers: Any) -> None:
        self.name, self.pattern, self.replacement, self.contract = name, pattern, replacement, contract
        self._producers = producers

    def propose(self, graph: Graph, index: Index) -> Iterator[Proposal | Refusal]:
        """One candidate for each producer that somebody quantises."""
        quants: dict[Node, list[Found]] = {}
        for found in index.of("quant_fp8"):
            quants.setdefault(origin(found.tensor("x")), []).append(found)
        for producer in self._producers(index):
            consumers = quants.get(producer.y)
            if consumers:
                yield self._candidate(producer, consumers, index)

    def _candidate(self, producer: Producer, consumers: list[Found], index: Index) -> Proposal | Refusal:
        start = producer.y
        asked = {c.options.get("impl") for c in consumers} | {producer.found.options.get("impl")}
        if len(asked) > 1:
            names = ", ".join(sorted(str(name) for name in asked))
            return Refusal(start, f"the operations ask for different implementations: {names}")
        united = unite(((_format(c), index.held(c, "scale")), c) for c in consumers)
        group = _one_launch(united, index)
        if depends_on_itself(producer, group):
            return Refusal(start, "a given scale is computed from what it scales")
        return self._proposal(producer, group, len(consumers), asked.pop())

    def _proposal(self, producer: Producer, group: list[list[Found]], n_consumers: int, impl: str | None) -> Proposal:
        taken = [found for same in group for found in same]
        replaced = [node for found in taken for node in found.outputs.values()]
        claims = frozenset(producer.nodes.union(*(found.nodes for found in taken)))
        emits = wanted(producer.y, replaced, claims)
        stored = producer.stored
        if stored is not None and not wanted(stored, {*replaced, producer.y}, claims):
            stored = None
        if emits:
            replaced.append(producer.y)
        if stored is not None:
            replaced.append(stored)
        scale = group[0][0].inputs["scale"]
        formats = [_format(same[0]) for same in group]
        operator = getattr(torch.ops.tilewright, self.replacement).default

        def build(editor: Editor) -> Mapping[Node, Node]:
            texts = [encoded(f) for f in formats]
            args = (*producer.tensors, scale, texts, emits, *producer.options.values(), impl)
            results = editor.call(operator, *args)
            each = 1 if scale is not None else 2
            built: dict[Node, Node] = {}
            sizes_of = [t for t in producer.tensors if t is not None]
            for place, same in enumerate(group):
                for role, at in (("values", 0), ("scales", 1)):
                    wanted = [found.outputs[role] for found in same if role in found.outputs]
                    if wanted:
                        held = editor.item(results, each * place + at)
                        built |= {old: editor.shaped(held, old, sizes_of) for old in wanted}
            rest = each * len(group)
            if producer.stored is not None:
                if stored is not None:
                    built[stored] = editor.shaped(editor.item(results, rest), stored, sizes_of)
                rest += 1
            elif "residual_rounding" in producer.options:
                rest += 1  # a sum that nobody uses
            if emits:
                built[producer.y] = editor.shaped(editor.item(results, rest), producer.y, sizes_of)
            return built

        results = [node for same in group for node in same[0].outputs.values()]
        before = [*producer.moved, producer.y, *_joined(producer)]
        for found in taken:
            before += [producer.y, *found.outputs.values()]
        after = [*producer.moved, *results, *([producer.y] if emits else [])]
        return Proposal(
            node=producer.y,
            replaces=tuple(replaced),
            claims=claims,
            build=build,
            done=_told(taken, group, n_consumers, emits=emits),
            moved_before=tuple(before),
            moved_after=tuple(after),
            kernels=(1 + len(taken) + _is_made_of_two(producer), 1),
            differences=("ue8m0_log2",) if any(found.options.get("powers") == "log2" for found in taken) else (),
            asks=self._asks(producer, formats, scale, emits, impl),
        )

    def _asks(
        self, producer: Producer, formats: list[QuantFormat], scale: Node | None, emits: bool, impl: str | None
    ) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        first, *also = formats
        options = dict(producer.options)
        keywords: dict[str, Any] = {"scale": scale, "dtype": first.dtype, "policy": first.policy, "also": also}
        if scale is None:
            keywords |= {
                "group_size": first.group_size,
                "scale_format": first.scale_format,
                "scale_layout": first.scale_layout,
            }
        keywords |= {EMITS[self.replacement]: emits, "impl": impl}
        tensors = producer.tensors
        if producer.found.kind == "rope":
            tensors, keywords["position_ids"] = tensors[:3], tensors[3]
        return self.replacement, tensors, options | keywords


def _joined(producer: Producer) -> tuple[Node, ...]:
    """What a kernel reads, and what is written for it, that puts other features beside those that are rotated."""
    alone = producer.found.alone
    return () if alone is None else (alone.outputs["y"], producer.y)


def _is_made_of_two(producer: Producer) -> bool:
    """Whether two kernels compute what is quantised: a sum and its norm, or a rotation and the features beside it."""
    sums = producer.stored is not None and producer.found.kind == "rms_norm"
    return sums or producer.found.alone is not None


def _format(found: Found) -> QuantFormat:
    """The format in which the new operation is to quantise.

    A quantisation sees what was rounded before, whatever its policy says of a norm that it would be fused with.
    """
    given: QuantFormat = found.options["format"]
    return replace(given, policy=replace(given.arithmetic, round_input=True))


def _one_launch(united: list[list[Found]], index: Index) -> list[list[Found]]:
    """The most consumers that one launch serves: those without a given scale, or those with one and the same."""
    by_scale = unite((index.held(same[0], "scale"), same) for same in united)
    return max(by_scale, key=lambda group: min(len(group), MAX_FORMATS))[:MAX_FORMATS]


def depends_on_itself(producer: Producer, group: list[list[Found]]) -> bool:
    """Whether a given scale needs what it is to scale."""
    scale = group[0][0].inputs["scale"]
    return scale is not None and depends(scale, producer.nodes)


def _told(taken: list[Found], group: list[list[Found]], n_consumers: int, *, emits: bool) -> str:
    parts = [f"{len(taken)} quantisation{'s' if len(taken) > 1 else ''} in one kernel"]
    if len(group) < len(taken):
        parts.append(f"{len(taken) - len(group)} equal to another merged with it")
    if emits:
        parts.append("with what is quantised written for others")
    if n_consumers > len(taken):
        left = n_consumers - len(taken)
        parts.append(f"{left} left: a launch takes {MAX_FORMATS} formats, and given scales need one of their own")
    return ", ".join(parts)


RULES = (
    QuantisedRule(
        "rms_norm_quant",
        "rms_norm, quantised to FP8 at least once, and any other users of it",
        "rms_norm_quant_fp8",
        "the values and scales of quant_fp8 on rms_norm bit for bit: what is quantised is rounded first",
        norms,
    ),
    QuantisedRule(
        "add_rms_norm_quant",
        "a sum, its rms_norm, quantised to FP8 at least once, and any other users of either",
        "add_rms_norm_quant_fp8",
        "the values and scales of quant_fp8 on add_rms_norm bit for bit, the sum rounded before the norm",
        norms_of_sums,
    ),
    QuantisedRule(
        "silu_mul_quant",
        "silu(gate) * up of the halves of one tensor, quantised to FP8 at least once, and any other users of it",
        "silu_mul_quant_fp8",
        "silu rounded before it multiplies and the product before it is quantised, as the operators do one by one",
        activations,
    ),
    QuantisedRule(
        "rope_quant",
        "a rotation of each head, quantised to FP8 at least once, and any other users of it",
        "rope_quant_fp8",
        "the values and scales of quant_fp8 on rope bit for bit: what is quantised is rounded first",
        rotations,
    ),
)
