"""FP8 quantisation in plain PyTorch.

Known, for 16-bit and float32 ``x``, with all arithmetic in float32::

    group  = x.view(..., -1, G)                     G 128, 64 or 32; by view, reshape or unflatten; or x: per token
    amax   = group.abs().amax(-1)                   or max(-1)[0]; keepdim or unsqueezed later; in x's dtype or float32
    scale  = max(max(amax, floor) / F, floor)       floors by clamp, clamp_min or maximum, either, both; by division, or
                                                    by a multiplication where 1 / F is a power of two
    scale  = exp2(ceil(log2(scale)))                or 2.0 ** ceil(log2(abs(scale))): scale_format "ue8m0_fp32"; then
                                                    cast to float8_e8m0fnu "ue8m0"
    values = (group / scale).clamp(-F, F).to(fp8)   or group * (1 / scale); then views

and, with a float32 ``scale`` of one element that something else gives, ``(x / scale).clamp(-F, F).to(fp8)`` or
``x * (1 / scale)``. ``scale_layout`` is what the scales' strides show, ``"column"`` through ``t().contiguous().t()``.
Where no tensor whose rows hold the groups is in sight, the grouped tensor is one to be quantised per token.

``log2`` rounds the logarithm of a number barely above a power of two down to the power's: there, at a few mantissas of
2^23, these forms give half the scale that tilewright's exact rounding gives. Where ``x`` has 16 bits no scale lies
there (see :mod:`tilewright.fusion.recognise.powers`); then a multiplication by a rounded ``1 / F`` gives the same
scales too, and no scaled value needs a clamp. Elsewhere an option that :func:`tilewright.quant_fp8` does not have,
``powers="log2"``, says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tilewright.errors import TilewrightError
from tilewright.fusion.forms import (
    ANYTHING,
    DIV,
    VIEWS,
    As,
    Call,
    Form,
    Item,
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
)
from tilewright.fusion.found import Found, NearMiss
from tilewright.fusion.graph import aten, is_call, same_shape, same_size
from tilewright.fusion.graph import value as fake_of
from tilewright.fusion.recognise.powers import powers_are_exact
from tilewright.ops.quant_fp8.format import DTYPES, GROUP_SIZES, QuantFormat, QuantPolicy, checked

if TYPE_CHECKING:
    from torch.fx import Graph, Node

_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


def _at_least(form: Form, floor: str) -> Form:
    """``max(form, floor)``, or the form itself, in any shape."""
    low = Number(floor)
    return Viewed(
        OneOf(
            Call(aten.clamp_min.default, form, low),
            Call(aten.clamp.default, form, low),
            Call(aten.maximum.default, form, low, commutative=True),
            form,
        )
    )


_MAGNITUDE = As("reduced", Widened(Viewed(Widened(Call(aten.abs.default, Tensor("of"))))))
_AMAX = Widened(
    OneOf(
        Call(aten.amax.default, _MAGNITUDE, ANYTHING, ANYTHING, when=over_last),
        Item(Call(aten.max.dim, _MAGNITUDE, ANYTHING, ANYTHING, when=over_last), 0),
    )
)
_CLAMPED = _at_least(_AMAX, "amax_floor")
_FLOORED = OneOf(_CLAMPED, Viewed(Widened(As("narrow", Rounded(_CLAMPED)))))  # 16 bits are clamped in float32
_QUOTIENT = OneOf(Call(DIV, _FLOORED, Number("maximum")), product(_FLOORED, Number("factor")))
_RAW = _at_least(_QUOTIENT, "scale_floor")
_LOG = Call(aten.ceil.default, Call(aten.log2.default, OneOf(_RAW, Call(aten.abs.default, _RAW))))
_POWER = As("power", OneOf(Call(aten.exp2.default, _LOG), Call(aten.pow.Scalar, 2, _LOG)))
_SCALE = As("scale", OneOf(_POWER, _RAW))
_COMPUTED = As("column", Viewed(OneOf(_SCALE, Rounded(As("exponents", Viewed(Rounded(Viewed(_SCALE))))))))
_GIVEN = Tensor("scale")


def _applied(scale: Form) -> Form:
    """The end of a quantisation: the scale applied, clamp, cast."""
    source = Tensor("source")
    by_reciprocal = As("reciprocal", product(inverse(scale), source))
    quotient = As("quotient", OneOf(Call(DIV, source, scale), by_reciprocal))
    scaled = As("scaled", maybe_rounded(quotient))
    low, high = Number("low"), Number("high")
    clamped = OneOf(
        Call(aten.clamp_max.default, Call(aten.clamp_min.default, scaled, low), high),
        Call(aten.clamp_min.default, Call(aten.clamp_max.default, scaled, high), low),
        Call(aten.clamp.default, scaled, low, high),
        scaled,
    )
    return Rounded(As("clamped", maybe_rounded(clamped)))


_DYNAMIC, _STATIC = _applied(_COMPUTED), _applied(_GIVEN)


class _Differs(Exception):
    """What looks like a quantisation is not one that a policy can express."""


@dataclass(frozen=True)
class _Rows:
    """What is quantised: the tensor, the size of its groups, and the nodes between it and the grouped tensor."""

    x: Node
    group_size: int | None
    nodes: frozenset[Node]


def recognise_quantisations(graph: Graph) -> tuple[list[Found], list[NearMiss]]:
    """The quantisations of a graph, and what is nearly one."""
    found: list[Found] = []
    misses: list[NearMiss] = []
    for node in graph.nodes:
        if cast_source(node) is None or dtype_of(node) not in DTYPES.values():
            continue
        try:
            if (match := _DYNAMIC.match(node)) is not None:
                each = _dynamic(node, match)
            else:
                each = _static(node, match) if (match := _STATIC.match(node)) is not None else None
        except _Differs as reason:
            misses.append(NearMiss("quant_fp8", node, str(reason)))
        else:
            found += [] if each is None else [each]
    return found, misses


def _dynamic(node: Node, match: Match) -> Found | None:
    """A quantisation by a scale that is computed from the tensor.

    Raises:
        _Differs: no policy computes the same.
    """
    source, reduced, scale = match["source"], match["reduced"], match["scale"]
    if _base(source)[0] is not _base(match["of"])[0] or not same_shape(shape_of(source), shape_of(reduced)):
        return None
    if not same_shape(shape_of(match["column"]), (*shape_of(source)[:-1], 1)):
        return None
    rows = _rows(source)
    if dtype_of(rows.x) not in _INPUTS:
        return None
    if "narrow" in match.bindings and dtype_of(match["narrow"]) != dtype_of(rows.x):
        raise _Differs(f"amax is rounded to {plain(dtype_of(match['narrow']))}, and x is {plain(dtype_of(rows.x))}")
    if dtype_of(scale) != torch.float32:
        raise _Differs(f"the scale is computed in {plain(dtype_of(scale))}; expected float32")
    if "exponents" in match.bindings and (
        "power" not in match.bindings or dtype_of(match["exponents"]) != torch.float8_e8m0fnu
    ):
        raise _Differs(f"the scale is rounded to {plain(dtype_of(match['exponents']))} before it is applied")
    floors = {"amax_floor": _amax_floor(match), "scale_floor": float(match.get("scale_floor", 0.0))}
    maximum, is_exact = _maximum(node, match, dtype_of(rows.x), floors)
    policy = _policy(node, match, maximum, is_bounded=is_exact)
    policy = replace(policy, amax_floor=floors["amax_floor"], scale_floor=floors["scale_floor"])
    if not policy.amax_floor > 0 and not policy.scale_floor > 0:
        raise _Differs("nothing keeps the scale of a group of zeros above 0: clamp its amax, or the scale")
    inside = match.nodes | rows.nodes | _base(match["of"], rows.x)[1]
    lead, n_cols = shape_of(rows.x)[:-1], shape_of(rows.x)[-1]
    groups = 1 if rows.group_size is None else n_cols // rows.group_size
    values, path = _shown(node, inside, shape_of(rows.x))
    outputs, nodes = {"values": values}, inside | path
    start = _first_used(scale, match["column"], inside)
    scale_format = "ue8m0_fp32" if "power" in match.bindings else "fp32"
    layout = "row"
    if start is not None:
        shown, path = _shown(start, inside, (*lead, groups), exponents="power" in match.bindings)
        outputs["scales"], nodes = shown, nodes | path
        layout = _layout(shown, lead, groups)
        if "power" in match.bindings and dtype_of(shown) == torch.float8_e8m0fnu:
            scale_format = "ue8m0"
    form = _checked(QuantFormat(rows.group_size, scale_format, layout, dtype_of(node), policy))
    options = {"format": form} | ({"powers": "log2"} if "power" in match.bindings and not is_exact else {})
    return Found("quant_fp8", "aten", {"x": rows.x, "scale": None}, options, outputs, nodes)


def _static(node: Node, match: Match) -> Found | None:
    """A quantisation by a given scale.

    Raises:
        _Differs: no policy computes the same.
    """
    source, scale = match["source"], match["scale"]
    one = all(isinstance(size, int) and size == 1 for size in shape_of(scale))
    if not one or dtype_of(scale) != torch.float32 or not same_shape(shape_of(source), shape_of(node)):
        return None
    x = cast_source(source) if _widens(source) else source
    if x is None or dtype_of(x) not in _INPUTS or not shape_of(x):
        return None
    policy = _policy(node, match, match.get("high"))
    nodes = match.nodes if x is source else match.nodes | {source}
    values, path = _shown(node, nodes, shape_of(x))
    form = _checked(QuantFormat(dtype=dtype_of(node), policy=policy))
    return Found("quant_fp8", "aten", {"x": x, "scale": scale}, {"format": form}, {"values": values}, nodes | path)


def _amax_floor(match: Match) -> float:
    """The least amax, rounded as amax is: the larger of two rounded numbers is the larger of the two, rounded."""
    floor = float(match.get("amax_floor", 0.0))
    return float(torch.tensor(floor, dtype=dtype_of(match["narrow"]))) if "narrow" in match.bindings else floor


def _maximum(node: Node, match: Match, dtype: torch.dtype, floors: dict[str, float]) -> tuple[float, bool]:
    """What the largest magnitude of a group is mapped to, and whether scales are exactly rounded up to powers of two.

    Raises:
        _Differs: a multiplication rounds otherwise than the division.
    """
    is_power = "power" in match.bindings
    if "maximum" in match.bindings:
        maximum = float(match["maximum"])
        return maximum, is_power and powers_are_exact(dtype, maximum, **floors)
    factor = float(match["factor"])
    if math.frexp(factor)[0] == 0.5:
        return 1.0 / factor, is_power and powers_are_exact(dtype, 1.0 / factor, **floors)
    if is_power and factor > 0:
        maximum = float(match.get("high", torch.finfo(dtype_of(node)).max))
        near = abs(factor * maximum - 1) <= 2.0**-24
        if near and powers_are_exact(dtype, maximum, factor=factor, **floors):
            return maximum, True
    raise _Differs(
        f"amax is multiplied by {factor:g}, a rounded reciprocal; expected a division by what it is mapped to"
    )


def _policy(node: Node, match: Match, maximum: float | None, *, is_bounded: bool = False) -> QuantPolicy:
    """The policy but for its floors.

    Args:
        node: the quantised values.
        match: their form.
        maximum: what the largest magnitude is mapped to.
        is_bounded: whether the scale alone keeps values from being larger.
    """
    for step in ("quotient", "scaled", "clamped"):
        if dtype_of(match[step]) != torch.float32:
            raise _Differs(f"the scaled values are rounded to {plain(dtype_of(match[step]))}; expected float32")
    fp8 = dtype_of(node)
    policy = QuantPolicy(apply="reciprocal" if "reciprocal" in match.bindings else "divide")
    if maximum is not None and policy.maximum_of(fp8) != maximum:
        policy = replace(policy, maximum=maximum)
    if "low" not in match.bindings and maximum is not None and is_bounded and maximum <= torch.finfo(fp8).max:
        return policy
    if "low" not in match.bindings or maximum is None:
        raise _Differs("the scaled values are not clamped, and what a cast to FP8 does beyond its range varies")
    if match["high"] != maximum or match["low"] != -maximum:
        raise _Differs(
            f"the scaled values are clamped to {match['low']:g} and {match['high']:g}, "
            f"and amax is mapped to {maximum:g}; expected one number"
        )
    return policy


def _checked(form: QuantFormat) -> QuantFormat:
    try:
        return checked(form, torch.device("cpu"), "quant_fp8")
    except TilewrightError as error:
        raise _Differs(str(error)) from error


def _widens(node: Node) -> bool:
    source = cast_source(node)
    return source is not None and dtype_of(node) == torch.float32 and dtype_of(source) in _INPUTS


def _behind(node: Node) -> Node | None:
    """What a node shows in another shape or, exactly, in float32."""
    if is_call(node, *VIEWS):
        return node.all_input_nodes[0]
    return cast_source(node) if _widens(node) else None


def _base(node: Node, end: Node | None = None) -> tuple[Node, frozenset[Node]]:
    """What a node shows, behind every view and widening up to some node, and these."""
    nodes: list[Node] = []
    while node is not end and (source := _behind(node)) is not None:
        nodes.append(node)
        node = source
    return node, frozenset(nodes)


def _rows(source: Node) -> _Rows:
    """The rows whose groups a tensor shows."""
    size = shape_of(source)[-1]
    node, path = source, [source]
    whole = _Rows(source, None, frozenset())
    while (behind := _behind(node)) is not None and shape_of(behind):
        n_cols = shape_of(behind)[-1]
        if same_size(n_cols, size):
            if _widens(node):
                whole = _Rows(behind, None, frozenset(path))
        elif isinstance(size, int) and isinstance(n_cols, int):
            if n_cols % size:
                break
            if size not in GROUP_SIZES:
                raise _Differs(f"groups are of {size}; expected {', '.join(map(str, GROUP_SIZES[:-1]))} or whole rows")
            if _widens(behind):
                path.append(behind)
                behind = behind.all_input_nodes[0]
            return _Rows(behind, size, frozenset(path))
        else:
            raise _Differs("the last dimension is symbolic: torch._dynamo.mark_static(x, -1) makes it a number")
        node = behind
        path.append(node)
    return whole


def _first_used(scale: Node, column: Node, inside: frozenset[Node]) -> Node | None:
    """The first node that holds the scales, between their computation and their use, that something else needs."""
    path = [column]
    while path[-1] is not scale:
        path.append(path[-1].all_input_nodes[0])
    used = (node for node in reversed(path) if any(user not in inside for user in node.users))
    return next(used, None)


def _shown(
    node: Node, inside: frozenset[Node], shape: tuple[Any, ...], *, exponents: bool = False
) -> tuple[Node, frozenset[Node]]:
    """What a result is seen as: the last node of its views that has a shape, if there is one, else their last.

    Args:
        node: the result.
        inside: nodes that are no users.
        shape: the shape.
        exponents: whether a cast to E8M0 is a view as well.
    """
    steps = [[node]]
    while (step := _next_view(steps[-1][-1], inside, exponents)) is not None:
        steps.append(step)
    last = max((i for i, step in enumerate(steps) if same_shape(shape_of(step[-1]), shape)), default=len(steps) - 1)
    return steps[last][-1], frozenset(node for step in steps[: last + 1] for node in step)


def _next_view(node: Node, inside: frozenset[Node], exponents: bool) -> list[Node] | None:
    """The only use of a node, if it is a view, or another layout of a matrix."""
    users = [user for user in node.users if user not in inside]
    if len(users) != 1:
        return None
    user = users[0]
    if is_call(user, *VIEWS) or (exponents and _is_exponents(user)):
        return [user]
    if not _is_transposition(user) or len(user.users) != 1:
        return None
    clone = next(iter(user.users))
    if not is_call(clone, aten.clone.default) or len(clone.users) != 1:
        return None
    back = next(iter(clone.users))
    return [user, clone, back] if _is_transposition(back) else None


def _is_transposition(node: Node) -> bool:
    return is_call(node, aten.permute.default) and node.args[1] == [1, 0]


def _is_exponents(node: Node) -> bool:
    return cast_source(node) is not None and dtype_of(node) == torch.float8_e8m0fnu


def _layout(node: Node, lead: tuple[Any, ...], groups: int) -> str:
    """How scales lie in memory: by rows unless the strides are those of columns alone."""
    if not same_shape(shape_of(node), (*lead, groups)) or groups == 1 or not lead:
        return "row"
    strides, rows = fake_of(node).stride(), math.prod(lead)
    inner = [math.prod(lead[d + 1 :]) for d in range(len(lead))]
    columns = same_shape(strides, (*inner, rows)) and not same_size(rows, 1)
    return "column" if columns else "row"
