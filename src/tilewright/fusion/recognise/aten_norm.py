"""RMSNorm in plain PyTorch.

Known, with ``xf`` the float32 ``x`` and ``r = rsqrt(mean(xf^2) + eps)``::

    weight * (xf * r).to(dtype)                     cast="before_weight"      Llama and most of Hugging Face
    (xf * r * weight).to(dtype)                     cast="after_weight"       torch.nn.functional.rms_norm, DeepSeek
    (xf * r * (weight.float() + offset)).to(dtype)  likewise                  Gemma
    (xf * r).to(dtype)                              no weight

The weight may have another dtype, if the product is then rounded to that of ``x``. The square is a power or a product;
``r`` is ``rsqrt``, or ``pow(-0.5)`` or ``1 / sqrt``, which may differ from it in the last bit of float32. For float32
``x`` there are no casts, and ``cast`` has its default. A weight that is computed, such as ``1 + weight`` rounded to 16
bits, is a weight like any other.

A sum of two tensors that the norm is taken of is an ``"add"``. One that is summed in float32, normalised before it is
rounded and stored in the dtype of the summands, as DeepSeek-V3.2 does, makes an ``"add_rms_norm"`` with
``residual_rounding="exact"``; one with a float32 residual stream, an ``"add_rms_norm"`` with ``"rounded"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.fusion.forms import (
    ANYTHING,
    CASTS,
    DIV,
    MUL,
    As,
    Call,
    Match,
    Number,
    OneOf,
    Rounded,
    Tensor,
    Viewed,
    Widened,
    cast_source,
    dtype_of,
    inverse,
    maybe_rounded,
    over_last,
    plain,
    product,
    shape_of,
    total,
)
from tilewright.fusion.found import Found, NearMiss
from tilewright.fusion.graph import aten, is_call, origin, same_shape, same_size
from tilewright.fusion.inductor import unless_left_out
from tilewright.ops.rms_norm.call import MIN_EPS

if TYPE_CHECKING:
    from torch.fx import Graph, Node

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_X = Widened(Tensor("x"))
_SQUARE = As("square", OneOf(Call(aten.pow.Tensor_Scalar, _X, 2), Call(MUL, _X, _X)))
_MEAN = As("mean", Call(aten.mean.dim, _SQUARE, ANYTHING, ANYTHING, when=over_last))
_SHIFTED = As("shifted", total(Viewed(_MEAN), Number("eps")))
_ROOT = As("root", Call(aten.sqrt.default, _SHIFTED))
_INVERSE_ROOT = OneOf(Call(aten.rsqrt.default, _SHIFTED), Call(aten.pow.Tensor_Scalar, _SHIFTED, -0.5), inverse(_ROOT))
_INVERSE_RMS = As("used", maybe_rounded(As("inverse", Viewed(_INVERSE_ROOT))))
_NORM = As("norm", OneOf(product(_INVERSE_RMS, _X), Call(DIV, _X, As("divisor", maybe_rounded(_ROOT)))))
_WEIGHT = Widened(Tensor("weight", when=lambda fake: fake.dim() == 1))
_FACTOR = As("factor", OneOf(total(_WEIGHT, Number("offset")), _WEIGHT))
_PRODUCT = As("product", product(Widened(As("operand", maybe_rounded(_NORM))), _FACTOR))
_WEIGHTED = OneOf(As("cast", Rounded(_PRODUCT)), _PRODUCT)
_PLAIN = OneOf(As("cast", Rounded(_NORM)), _NORM)
_SUM = OneOf(
    Call(aten.add.Tensor, Rounded(Tensor("x")), Rounded(Tensor("residual"))),
    Call(aten.add.Tensor, Widened(Tensor("x")), Widened(Tensor("residual")), commutative=True),
)
_STORED_SUM = OneOf(
    Call(aten.add.Tensor, Tensor("x"), Tensor("residual")),
    Rounded(Call(aten.add.Tensor, Rounded(Tensor("x")), Rounded(Tensor("residual")))),
)
_STEPS = {
    "square": "the square of x",
    "mean": "the mean of squares",
    "shifted": "the mean of squares plus eps",
    "inverse": "1 / rms",
    "used": "1 / rms",
    "divisor": "the root of the mean of squares",
    "norm": "the norm, before its weight,",
}


def recognise_norms(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """The norms of a graph, the sums that they are taken of, and what is nearly a norm."""
    found: list[Found] = []
    misses: dict[Node, NearMiss] = {}  # by the norm before its weight
    inside: set[Node] = set()
    candidates = [node for node in reversed(graph.nodes) if is_call(node, *CASTS, *MUL, *DIV)]
    for form in (_WEIGHTED, _PLAIN):
        settled = inside.union(misses)
        for node in candidates:
            if node in inside:
                continue
            for match in form.matches(node, Match()):  # x may be what a cast shows, or the cast
                norm = match["norm"]
                judged = None if norm in settled else _judge(node, match)
                if isinstance(judged, Found):
                    found.append(judged)
                    inside |= judged.nodes
                    misses.pop(norm, None)
                    break
                if judged is not None and norm not in inside:
                    misses.setdefault(norm, NearMiss("rms_norm", node, judged))
    return found + _sums(found), list(misses.values())


def _judge(node: Node, match: Match) -> Found | str | None:
    """What a form that fits amounts to: the operation, what is different, or nothing of ours."""
    x, weight = match["x"], match.get("weight")
    shape = shape_of(x)
    if dtype_of(x) not in _DTYPES or not shape or not same_shape(shape_of(match["norm"]), shape):
        return None
    if weight is not None and (dtype_of(weight) not in _DTYPES or not same_size(shape_of(weight)[0], shape[-1])):
        return None
    summed = _summed(node, match)
    if summed is not None:
        return summed
    judged = _rounding(match, dtype_of(x))
    if judged is None or judged in ("before_weight", "after_weight"):
        return None if judged is None else _found(match, node, {"x": x}, {"cast": judged})
    return judged


def _rounding(match: Match, dtype: torch.dtype) -> str | None:
    """What ``cast`` is, for a norm whose result has a dtype; else what is different, or None."""
    cast, product_, operand = match.get("cast"), match.get("product"), match.get("operand")
    last = match["norm"] if product_ is None else product_
    if cast is not None and (dtype_of(last) != torch.float32 or dtype_of(cast) != dtype or dtype == torch.float32):
        return None  # the cast is no part of the norm
    reason = _difference(match, dtype)
    if reason:
        return reason
    rounded = operand is not None and operand is not match["norm"]
    if rounded and dtype_of(operand) != dtype:
        return (
            f"the norm is rounded to {plain(dtype_of(operand))} before its weight multiplies, "
            f"and x is {plain(dtype)}{unless_left_out()}"
        )
    if match.get("offset") is not None and dtype_of(match["factor"]) != torch.float32:
        return f"weight + {match['offset']:g} is rounded to {plain(dtype_of(match['factor']))}; expected float32"
    if cast is None and dtype_of(last) != dtype:
        return f"the result stays {plain(dtype_of(last))}; expected it rounded to {plain(dtype)}, the dtype of x"
    return "before_weight" if rounded or dtype == torch.float32 or operand is None else "after_weight"


def _difference(match: Match, dtype: torch.dtype) -> str:
    for name, what in _STEPS.items():
        step = match.get(name)
        if step is not None and dtype_of(step) != torch.float32:
            return f"{what} is rounded to {plain(dtype_of(step))}; expected float32"
    if "divisor" in match.bindings:
        return "x is divided by the root of the mean of squares; expected a multiplication by its rounded reciprocal"
    if not match["eps"] >= MIN_EPS:
        return f"eps is {match['eps']:g}; expected at least {MIN_EPS:.3g}"
    if not same_shape(shape_of(match["used"]), (*shape_of(match["norm"])[:-1], 1)):
        return "the mean of squares is not that of each row"
    return ""


def _found(match: Match, y: Node, inputs: dict[str, Node | None], options: dict[str, Any]) -> Found:
    return Found(
        kind="add_rms_norm" if "residual" in inputs else "rms_norm",
        source="aten",
        inputs={**inputs, "weight": match.get("weight")},
        options={"eps": float(match["eps"]), "weight_offset": float(match.get("offset", 0.0)), **options},
        outputs={"y": y},
        nodes=match.nodes,
    )


def _summed(node: Node, match: Match) -> Found | None:
    """The norm together with the sum in float32 that it is taken of, if it is rounded to less."""
    total_ = match["x"]
    if dtype_of(total_) != torch.float32 or dtype_of(node) == torch.float32:
        return None
    for terms in _SUM.matches(total_, Match()):
        x, residual = terms["x"], terms["residual"]
        dtypes = dtype_of(x), dtype_of(residual)
        fits = dtypes[0] == dtype_of(node) and dtypes[1] in (dtypes[0], torch.float32)
        if not fits or not all(same_shape(shape_of(n), shape_of(total_)) for n in (x, residual)):
            continue
        cast = _rounding(match, dtypes[0])
        if cast not in ("before_weight", "after_weight"):
            continue
        inner = match.nodes | terms.nodes
        stored = [n for n in total_.users if cast_source(n) is not None and dtype_of(n) == dtypes[1]]
        if dtypes[1] == torch.float32:
            stored = [total_] if any(user not in inner for user in total_.users) else []
        options = {"cast": cast, "residual_rounding": "rounded" if dtypes[1] == torch.float32 else "exact"}
        whole = _found(match, node, {"x": x, "residual": residual}, options)
        outputs = {"y": node, **({"stored": stored[0]} if stored else {})}
        nodes = inner.union(stored)
        return Found(whole.kind, whole.source, whole.inputs, whole.options, outputs, nodes)
    return None


def _sums(norms: list[Found]) -> list[Found]:
    """The sums that norms are taken of."""
    found: dict[Node, Found] = {}
    for norm in norms:
        if norm.kind != "rms_norm":
            continue
        node = origin(norm.tensor("x"))
        terms = _STORED_SUM.match(node)
        if terms is None or node in found:
            continue
        x, residual = terms["x"], terms["residual"]
        alike = dtype_of(x) == dtype_of(residual) == dtype_of(node)
        if alike and same_shape(shape_of(x), shape_of(residual)):
            inputs = {"x": x, "residual": residual}
            found[node] = Found("add", "aten", inputs, {}, {"y": node}, terms.nodes)
    return list(found.values())
