"""``silu(gate) * up`` in plain PyTorch.

Known: ``gate`` and ``up`` are the first and the second half of the last dimension of one tensor, by ``chunk``,
``split`` or slices; ``gate / (1 + exp(-gate))`` in float32, as ``torch.nn.functional.silu`` decomposes, is rounded to
the dtype of ``gate`` and multiplied by ``up``. For float32 there are no casts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilewright.fusion.forms import (
    CASTS,
    DIV,
    MUL,
    As,
    Call,
    Each,
    Half,
    Match,
    OneOf,
    Rounded,
    Tensor,
    Widened,
    dtype_of,
    maybe_rounded,
    piece,
    plain,
    product,
    shape_of,
    total,
)
from tilewright.fusion.found import Found, NearMiss
from tilewright.fusion.graph import aten, is_call, same_shape
from tilewright.fusion.inductor import unless_left_out

if TYPE_CHECKING:
    from torch.fx import Graph, Node

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GATE = Widened(Tensor("gate"))
_SIGMOID = As("sigmoid", maybe_rounded(Call(aten.sigmoid.default, _GATE)))
_SILU = As(
    "silu",
    OneOf(
        Call(DIV, _GATE, total(Call(aten.exp.default, Call(aten.neg.default, _GATE)), 1)),
        product(_SIGMOID, _GATE),
    ),
)
_PRODUCT = As("product", product(Widened(As("operand", maybe_rounded(_SILU))), Widened(Tensor("up"))))
_FORM = OneOf(As("cast", Rounded(_PRODUCT)), _PRODUCT)
_BOTH = Each(Half(Tensor("packed"), 0), Half(Tensor("packed"), 1))


def recognise_activations(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """The activations of a graph, and what is nearly one."""
    found: list[Found] = []
    misses: list[NearMiss] = []
    inside: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in inside or not is_call(node, *CASTS, *MUL) or (match := _FORM.match(node)) is None:
            continue
        judged = _judge(node, match)
        if judged is None:
            continue
        inside |= match.nodes
        if isinstance(judged, Found):
            found.append(judged)
        else:
            misses.append(NearMiss("silu_mul", node, judged))
    return found, misses


def _judge(node: Node, match: Match) -> Found | str | None:
    gate, up, cast = match["gate"], match["up"], match.get("cast")
    dtype = dtype_of(gate)
    if dtype not in _DTYPES or not same_shape(shape_of(gate), shape_of(up)):
        return None
    if cast is not None and (dtype_of(match["product"]) != torch.float32 or dtype_of(cast) != dtype):
        return None  # the cast is no part of the activation
    return _difference(match, node, dtype) or _halves(node, match)


def _halves(node: Node, match: Match) -> Found | str | None:
    gate, up = match["gate"], match["up"]
    if (halves := _BOTH.match([gate, up])) is not None:
        return Found("silu_mul", "aten", {"x": halves["packed"]}, {}, {"y": node}, match.nodes | halves.nodes)
    if _BOTH.match([up, gate]) is not None:
        return "the gate is the second half of the tensor; expected the first"
    if (piece(gate) is None) != (piece(up) is None):
        return None  # such as a backward's gradient beside the gate
    return "gate and up are not the two halves of one tensor, as a merged projection gives them"


def _difference(match: Match, node: Node, dtype: torch.dtype) -> str:
    if "sigmoid" in match.bindings:
        return "silu is gate * sigmoid(gate), which rounds otherwise; expected torch.nn.functional.silu"
    if dtype_of(match["up"]) != dtype:
        return f"gate is {plain(dtype)} and up {plain(dtype_of(match['up']))}; expected one dtype"
    if dtype_of(match["silu"]) != torch.float32:
        return f"silu is computed in {plain(dtype_of(match['silu']))}; expected float32"
    if dtype_of(match["operand"]) != dtype:
        return f"silu(gate) is not rounded to {plain(dtype)} before it multiplies up{unless_left_out()}"
    if dtype_of(node) != dtype:
        return (
            f"the result stays {plain(dtype_of(node))}; expected it rounded to {plain(dtype)}, the dtype of gate and up"
        )
    return ""
