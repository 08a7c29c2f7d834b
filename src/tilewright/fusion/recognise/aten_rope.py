"""Rotary embedding in plain PyTorch.

Known:

- Hugging Face's ``x * cos + rotate_half(x) * sin``, ``rotate_half`` being ``cat((-x2, x1), -1)`` of the halves, with
  tables ``[B, S, D]`` or ``[S, D]`` that gained a dimension for the heads;
- the two members computed one by one, with a table of half width: see ``aten_rope_pairs.py``;
- DeepSeek's ``view_as_real(view_as_complex(x.float().view(..., -1, 2)) * freqs_cis).flatten(-2).to(dtype)``.

All of them also where a part of the features is rotated and put between the others by ``cat``.

Options are those of :func:`tilewright.rope`, and two more:

``table``: ``"doubled"``: the graph shows that the two halves of cos and of sin are equal; ``"unproven"``: it does not;
``"half"``: it has one entry for both; ``"complex"``: ``freqs_cis`` holds cosines and sines.

``products``: ``"exact"``: they are computed in float32, as ``rope`` does; ``"rounded"``: each is rounded to the dtype
of ``x`` before they are added, as a 16-bit ``x`` and a 16-bit table do. ``rope`` rounds once and is nearer the truth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tilewright.fusion.expressions import Expressions
from tilewright.fusion.forms import (
    ADD,
    ANYTHING,
    CASTS,
    DIV,
    MUL,
    VIEWS,
    As,
    Call,
    Each,
    Form,
    Half,
    Match,
    OneOf,
    Rounded,
    Tensor,
    Viewed,
    Widened,
    dtype_of,
    is_last,
    plain,
    product,
    shape_of,
    total,
)
from tilewright.fusion.found import Found, NearMiss
from tilewright.fusion.graph import aten, is_call, same_shape, same_size
from tilewright.fusion.graph import value as fake_of
from tilewright.fusion.recognise.aten_rope_pairs import PAIRS, ROUNDED, TERMS
from tilewright.fusion.recognise.carried import among_others

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Graph, Node

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_X = Widened(Tensor("x"))
_FIRST, _SECOND = (Widened(Half(_X, index)) for index in (0, 1))
_TURNED = Call(
    aten.cat.default,
    Each(Widened(Call(aten.neg.default, _SECOND)), _FIRST),
    ANYTHING,
    when=lambda node: is_last((*node.args, 0)[1], node),
)
_SUM = As(
    "sum",
    total(
        As("sin_term", product(Widened(_TURNED), Tensor("sin"))),
        As("cos_term", product(_X, Tensor("cos"))),
    ),
)
_HALVES = OneOf(As("cast", Rounded(_SUM)), _SUM)

_PAIRS = Call(aten.view_as_complex.default, Viewed(Rounded(Viewed(Tensor("x")))))
_PLAIN_PAIRS = Call(aten.view_as_complex.default, Viewed(Tensor("x")))
_TURN = Call(MUL, OneOf(_PAIRS, _PLAIN_PAIRS), Tensor("freqs"), commutative=True)
_COMPLEX = As("sum", Viewed(Call(aten.view_as_real.default, As("turned", _TURN))))
_COMPLEX_ROOT = OneOf(As("cast", Rounded(_COMPLEX)), _COMPLEX)
_SHOWN = (*CASTS, *VIEWS)


def recognise_rotations(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """The rotations of a graph, and what is nearly one."""
    found: list[Found] = []
    misses: list[NearMiss] = []
    readings: dict[Found, list[tuple[str, bool]]] = {}
    inside: set[Node] = set()
    for node in reversed(graph.nodes):
        form, judge = (None, None) if node in inside else _FORMS.get(_behind(node), (None, None))
        if form is None or judge is None:
            continue
        reasons: list[tuple[str, Match]] = []
        for match in form.matches(node, Match()):  # x may be any of several views, or a cast
            judged = judge(node, match)
            if isinstance(judged, Found):
                found.append(among_others(judged))
                readings[found[-1]] = _readings(*_turned(match))
                inside |= found[-1].nodes
                break
            reasons += [] if judged is None else [(judged, match)]
        if reasons and node not in inside:
            misses.append(NearMiss("rope", node, reasons[0][0]))
            inside |= reasons[0][1].nodes
    return _read_alike(found, readings, Expressions(graph)), misses


def _behind(node: Node) -> Any:
    """The operator whose result a node shows or casts."""
    while is_call(node, *_SHOWN):
        node = node.args[0]  # type: ignore[assignment]
    return node.target if node.op == "call_function" else None


def _judge_halves(node: Node, match: Match) -> Found | str | None:
    x, terms = match["x"], [match[name] for name in ("cos_term", "sin_term", "sum")]
    dtype = dtype_of(x)
    tables = [_table(match[name]) for name in ("cos", "sin")]
    shapes = [shape_of(match[name]) for name in ("cos", "sin")]
    if dtype not in _DTYPES or not same_shape(*shapes) or not same_shape(shape_of(terms[2]), shape_of(x)):
        return None
    readings = _readings(x, match["cos"])
    if not readings:
        return None
    computed = {dtype_of(term) for term in terms}
    if "cast" in match.bindings and (dtype_of(node) != dtype or computed != {torch.float32}):
        return None  # the cast is no part of the rotation
    reason = _difference(dtype, node, [table for table, _ in tables], terms)
    if reason:
        return reason
    rounded = dtype != torch.float32 and computed == {dtype}
    table = "doubled" if all(_is_doubled(table) for table, _ in tables) else "unproven"
    options = _options(readings[0], table, rounded=rounded)
    inputs = {"x": x, "cos": tables[0][0], "sin": tables[1][0]}
    nodes = match.nodes.union(*(views for _, views in tables))
    return Found("rope", "aten", inputs, options, {"y": node}, nodes)


def _difference(dtype: torch.dtype, node: Node, tables: list[Node], terms: list[Node]) -> str:
    wrong = [table for table in tables if dtype_of(table) not in (dtype, torch.float32)]
    if wrong:
        return f"the table is {plain(dtype_of(wrong[0]))}; expected {plain(dtype)}, the dtype of x, or float32"
    if len({dtype_of(term) for term in terms}) != 1:
        return "the products are rounded to different dtypes"
    if dtype_of(node) != dtype:
        return f"the result stays {plain(dtype_of(node))}; expected it rounded to {plain(dtype)}, the dtype of x"
    return ""


def _judge_complex(node: Node, match: Match) -> Found | str | None:
    x, turned, freqs = match["x"], match["turned"], match["freqs"]
    shape = shape_of(x)
    dtype = dtype_of(x)
    if not same_shape(shape_of(node), shape) or dtype not in _DTYPES or len(shape) not in (3, 4):
        return None
    wide = dtype_of(turned) == dtype_of(freqs) == torch.complex64
    if not wide or ("cast" in match.bindings and (dtype == torch.float32 or dtype_of(node) != dtype)):
        return None  # the cast is no part of the rotation
    if not same_size(2 * shape_of(turned)[-1], shape[-1]) or not same_shape(shape_of(turned)[:-1], shape[:-1]):
        return None
    readings = _readings(turned, freqs)
    if not readings:
        return None
    reason = _difference(dtype, node, [], [turned])
    if reason:
        return reason
    table, views = _table(freqs)
    options = _options(readings[0], "complex", interleaved=True)
    return Found("rope", "aten", {"x": x, "freqs_cis": table}, options, {"y": node}, match.nodes | views)


def _judge_pairs(node: Node, match: Match) -> Found | str | None:
    x, dtype = match["x"], dtype_of(match["x"])
    part, cos = _turned(match)
    readings = _readings(part, cos)
    if dtype not in _DTYPES or not readings or not same_shape(shape_of(cos), shape_of(match["sin"])):
        return None
    whole = same_shape(shape_of(node), shape_of(x))
    if not whole or not all(same_shape(shape_of(match[name]), shape_of(part)) for name in TERMS):
        return None
    stacked, others = ("stacked" in match.bindings), ("others" in match.bindings)
    if stacked and not same_size(shape_of(match["stacked"])[-1], 2):
        return None
    terms = [match[name] for name in TERMS]
    computed = {dtype_of(term) for term in terms}
    roundings = {dtype_of(match[name]) for name in ROUNDED if name in match.bindings}
    if roundings and (dtype_of(node) != dtype or roundings != {dtype} or computed != {torch.float32}):
        return None  # a cast is no part of the rotation
    tables = [_table(match[name]) for name in ("cos", "sin")]
    reason = _difference(dtype, node, [table for table, _ in tables], terms)
    if reason or stacked != others:
        return reason or "features change places: rope leaves the members of a pair where it has read them"
    rounded = dtype != torch.float32 and computed == {dtype}
    options = _options(readings[0], "half", interleaved=stacked, rounded=rounded)
    inputs = {"x": x, "cos": tables[0][0], "sin": tables[1][0]}
    return Found("rope", "aten", inputs, options, {"y": node}, match.nodes.union(*(views for _, views in tables)))


def _options(
    reading: tuple[str, bool], table: str, *, interleaved: bool = False, rounded: bool = False
) -> dict[str, Any]:
    """The options of a rotation of all features."""
    layout, batched = reading
    return {
        "layout": layout,
        "interleaved": interleaved,
        "rotary_dim": None,
        "rotary_offset": 0,
        "inverse": False,
        "numerics": "hf" if rounded else "exact",
        "table": table,
        "products": "rounded" if rounded else "exact",
        "batched": batched,
    }


def _turned(match: Match) -> tuple[Node, Node]:
    """What is multiplied by which table."""
    if "freqs" in match.bindings:
        return match["turned"], match["freqs"]
    return match[next(name for name in ("halves", "others", "x") if name in match.bindings)], match["cos"]


_FORMS: dict[Any, tuple[Form, Callable[[Node, Match], Found | str | None]]] = {
    **dict.fromkeys(ADD, (_HALVES, _judge_halves)),
    aten.view_as_real.default: (_COMPLEX_ROOT, _judge_complex),
    aten.cat.default: (PAIRS, _judge_pairs),
}
"""What a rotation may be, by the operator whose result it is, seen through casts and views."""


def _readings(x: Node, table: Node) -> list[tuple[str, bool]]:
    """Which dimensions of ``x`` may be tokens and heads, by how the table is broadcast against it.

    Where sizes are one there are several, and all of them turn the same rows by the same angles. With each goes whether
    every sequence has rows of its own: one for each token, in their order.
    """
    shape, given = shape_of(x), shape_of(table)
    if len(shape) not in (3, 4) or len(given) > len(shape) or not given or not same_size(given[-1], shape[-1]):
        return []
    wide = (1,) * (len(shape) - len(given)) + given
    same = [same_size(a, b) for a, b in zip(wide, shape, strict=True)]
    one = [same_size(a, 1) for a in wide]
    if len(shape) == 3:
        return [("thd", False)] if same[0] and one[1] else []
    batched = len(given) == len(shape) and not one[0]
    fits = {
        "bhsd": one[1] and same[2] and (one[0] or same[0]),
        "bshd": one[2] and same[1] and (one[0] or same[0]),
        "sbhd": one[1] and one[2] and same[0],
    }
    return [(layout, batched and layout != "sbhd") for layout, does in fits.items() if does]


def _read_alike(
    found: list[Found], readings: Mapping[Found, list[tuple[str, bool]]], expressions: Expressions
) -> list[Found]:
    """The same, those of one table read in one way if there is one: a single head is laid out as its neighbours are."""
    if all(len(each) == 1 for each in readings.values()):
        return found

    def tables(each: Found) -> tuple[Any, ...]:
        names = ("cos", "sin", "freqs_cis")
        return tuple(expressions.of(each.inputs.get(name), each.outputs["y"]) for name in names)

    common: dict[Any, list[tuple[str, bool]]] = {}
    for each in found:
        key = tables(each)
        common[key] = [reading for reading in common.get(key, readings[each]) if reading in readings[each]]
    alike = []
    for each in found:
        (layout, batched), *_ = common[tables(each)] or readings[each]
        way = {"layout": layout, "batched": batched}
        alone = each.alone and replace(each.alone, options={**each.alone.options, **way})
        alike.append(replace(each, options={**each.options, **way}, alone=alone))
    return alike


def _table(node: Node) -> tuple[Node, frozenset[Node]]:
    """A table before it gained dimensions, and what gave it them."""
    views = []
    while is_call(node, *VIEWS):
        behind = node.all_input_nodes[0]
        if not shape_of(behind) or not same_size(shape_of(behind)[-1], shape_of(node)[-1]):
            break
        views.append(node)
        node = behind
    return node, frozenset(views)


def _is_doubled(node: Node) -> bool:
    """Whether the graph shows that the two halves of a table's rows are equal."""
    while True:
        if is_call(node, aten.cat.default) and is_last((*node.args, 0)[1], node):
            parts = node.args[0]
            return isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] is parts[1]
        if is_call(node, *VIEWS) and _is_repeated(node):
            return True
        behind = _same_columns(node)
        if behind is None:
            return False
        node = behind


def _same_columns(node: Node) -> Node | None:
    """What a node is made of, each column of one column alone and all in the same way."""
    elementwise = (aten.cos.default, aten.sin.default, aten.clone.default, *CASTS)
    scaled = is_call(node, *MUL, *DIV) and len(node.all_input_nodes) == 1 and isinstance(node.args[1], int | float)
    kept = is_call(node, *VIEWS, aten.expand.default) or (
        is_call(node, aten.slice.Tensor, aten.index_select.default) and not is_last((*node.args, 0)[1], node)
    )
    gathered = is_call(node, aten.index.Tensor, aten.embedding.default)
    if not (is_call(node, *elementwise) or scaled or kept or gathered):
        return None
    source = node.args[0]
    assert hasattr(source, "meta")
    before, after = fake_of(source), fake_of(node)  # type: ignore[arg-type]
    if is_call(node, aten.index.Tensor) and len(node.args[1]) >= before.dim():  # type: ignore[arg-type]
        return None
    fits = before.dim() and after.dim() and same_size(before.shape[-1], after.shape[-1])
    return source if fits else None  # type: ignore[return-value]


def _is_repeated(node: Node) -> bool:
    """Whether a view lays two equal rows behind one another: ``[.., 1, n]`` expanded to 2, seen as ``[.., 2 n]``."""
    inner = node.all_input_nodes[0]
    while is_call(inner, aten.clone.default):
        inner = inner.all_input_nodes[0]
    if not is_call(inner, aten.expand.default):
        return False
    before, between, after = shape_of(inner.all_input_nodes[0]), shape_of(inner), shape_of(node)
    return (
        len(before) == len(between) >= 2
        and same_size(before[-2], 1)
        and same_size(between[-2], 2)
        and same_size(before[-1], between[-1])
        and same_size(after[-1], 2 * between[-1])
    )
