"""Patterns of the inside of one operation: how its arithmetic is written in ATen operators.

A form is a small immutable object. It is held against a node from the node backwards, and yields every way in which it
fits: what its names stand for, and the nodes that belong to it. What several consumers share is no matter of forms: see
the rules.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node

from tilewright.fusion.graph import arguments, aten, by_hint, is_call, prims, same_size, signature, value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

CASTS = (prims.convert_element_type.default, aten._to_copy.default)
VIEWS = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.squeeze.dims, aten.alias.default,
)  # fmt: skip
_FILLED = {aten.full.default: "fill_value", aten.full_like.default: "fill_value", aten.scalar_tensor.default: "s"}
_HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Match:
    """A way in which a form fits.

    Attributes:
        bindings: what each name stands for: a node, or a number.
        nodes: the nodes that belong to the form; those that ``Tensor`` bound do not.
    """

    bindings: Mapping[str, Any] = field(default_factory=dict)
    nodes: frozenset[Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What a name stands for, if the form that fitted has it."""
        return self.bindings.get(name, default)

    def bound(self, name: str, what: Any) -> Iterator[Match]:
        """The same with one more name; nothing if the name stands for something else already."""
        if name not in self.bindings:
            yield Match({**self.bindings, name: what}, self.nodes)
        elif self.bindings[name] is what if isinstance(what, Node) else self.bindings[name] == what:
            yield self

    def holding(self, *nodes: Node) -> Match:
        """The same with more nodes."""
        return Match(self.bindings, self.nodes.union(nodes))


class Form:
    """Something that may be held against a node."""

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Every way in which the form fits, given what earlier parts have bound."""
        raise NotImplementedError

    def match(self, node: Any) -> Match | None:
        """The first way in which the form fits."""
        return next(self.matches(node, Match()), None)


@dataclass(frozen=True)
class Anything(Form):
    """Whatever it is."""

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Once."""
        yield so_far


@dataclass(frozen=True)
class Tensor(Form):
    """An input: any node that holds a tensor. The same name is the same node."""

    name: str
    when: Callable[[torch.Tensor], bool] | None = None

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Binds the name to the node."""
        fake = value(what) if isinstance(what, Node) else None
        if isinstance(fake, torch.Tensor) and (self.when is None or self.when(fake)):
            yield from so_far.bound(self.name, what)


@dataclass(frozen=True)
class Number(Form):
    """A Python number, or a tensor that is filled with one. The same name is the same value."""

    name: str

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Binds the name to the number."""
        if is_call(what, *_FILLED) and isinstance(value(what), torch.Tensor) and dtype_of(what) == torch.float32:
            so_far = so_far.holding(what)
            what = arguments(what)[_FILLED[what.target]]
        if isinstance(what, int | float) and not isinstance(what, bool):
            yield from so_far.bound(self.name, what)
        elif by_hint() and symbolic_number(what):
            yield from so_far.bound(self.name, math.nan)


def symbolic_number(node: Any) -> bool:
    """Whether a node holds a Python float that varies from call to call: a float64 input, perhaps cast to float32."""
    given = cast_source(node) or node
    held = value(given) if isinstance(given, Node) and given.op == "placeholder" else None
    if not isinstance(held, torch.Tensor):
        return isinstance(held, torch.SymFloat)
    return held.dim() == 0 and held.dtype == torch.float64 and held.device.type == "cpu"


@dataclass(frozen=True)
class As(Form):
    """A form whose output gets a name."""

    name: str
    form: Form

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of the form."""
        for match in self.form.matches(what, so_far):
            yield from match.bound(self.name, what)


@dataclass(frozen=True)
class OneOf(Form):
    """Alternatives, the first one first."""

    forms: tuple[Form, ...]

    def __init__(self, *forms: Form) -> None:
        object.__setattr__(self, "forms", forms)

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of each."""
        for form in self.forms:
            yield from form.matches(what, so_far)


@dataclass(frozen=True)
class Call(Form):
    """A call of one of several operators.

    Arguments are held against the operands in the order of the operator's schema: forms, or values that must be equal.
    Arguments beyond them must have their defaults.
    """

    targets: tuple[Any, ...]
    operands: tuple[Any, ...]
    commutative: bool = False
    when: Callable[[Node], bool] | None = None

    def __init__(
        self, targets: Any, *operands: Any, commutative: bool = False, when: Callable[[Node], bool] | None = None
    ) -> None:
        object.__setattr__(self, "targets", targets if isinstance(targets, tuple) else (targets,))
        object.__setattr__(self, "operands", operands)
        object.__setattr__(self, "commutative", commutative)
        object.__setattr__(self, "when", when)

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of the operands, in both orders if the operator is commutative."""
        if not is_call(what, *self.targets) or value(what) is None:
            return
        if self.when is not None and not self.when(what):
            return
        given, count = arguments(what), len(self.operands)
        defaults, _, names = signature(what.target)
        if any(name not in defaults or given[name] != defaults[name] for name in names[count:]):
            return
        values = [given.get(name) for name in names[:count]]
        for order in permutations(values) if self.commutative else (values,):
            yield from _each(self.operands, order, so_far.holding(what))


@dataclass(frozen=True)
class Each(Form):
    """Several forms, each held against its own of as many values."""

    forms: tuple[Form, ...]

    def __init__(self, *forms: Form) -> None:
        object.__setattr__(self, "forms", forms)

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of all together."""
        if isinstance(what, list | tuple):
            yield from _each(self.forms, what, so_far)


def _each(operands: Sequence[Any], values: Sequence[Any], so_far: Match) -> Iterator[Match]:
    if len(operands) != len(values):
        return
    if not operands:
        yield so_far
        return
    for match in _one(operands[0], values[0], so_far):
        yield from _each(operands[1:], values[1:], match)


def _one(operand: Any, what: Any, so_far: Match) -> Iterator[Match]:
    if isinstance(operand, Form):
        yield from operand.matches(what, so_far)
    elif not isinstance(what, Node) and operand == what:
        yield so_far


@dataclass(frozen=True)
class Item(Form):
    """One of several results of a call."""

    form: Form
    index: int

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of the call."""
        if is_call(what, operator.getitem) and what.args[1] == self.index:
            yield from self.form.matches(what.args[0], so_far.holding(what))


@dataclass(frozen=True)
class Rounded(Form):
    """A cast, of whatever to whatever."""

    form: Form

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of what is cast."""
        source = cast_source(what)
        if source is not None:
            yield from self.form.matches(source, so_far.holding(what))


def maybe_rounded(form: Form) -> Form:
    """A form, with a cast of its output or without."""
    return OneOf(Rounded(form), form)


@dataclass(frozen=True)
class Widened(Form):
    """A form, with a cast of its output from 16 bits to float32 or without: no number changes."""

    form: Form

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those before the cast, then those with no cast."""
        source = cast_source(what)
        if source is not None and value(source).dtype in _HALF_DTYPES and value(what).dtype == torch.float32:
            yield from self.form.matches(source, so_far.holding(what))
        yield from self.form.matches(what, so_far)


@dataclass(frozen=True)
class Viewed(Form):
    """A form, its output seen in other shapes, the elements in their order; or not."""

    form: Form

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those with no view first, then those behind each."""
        yield from self.form.matches(what, so_far)
        while is_call(what, *VIEWS):
            so_far, what = so_far.holding(what), what.args[0]
            yield from self.form.matches(what, so_far)


@dataclass(frozen=True)
class Half(Form):
    """The first or the second half of the last dimension of something."""

    form: Form
    index: int

    def matches(self, what: Any, so_far: Match) -> Iterator[Match]:
        """Those of the whole."""
        part = piece(what)
        if part is None:
            return
        whole, size = value(part.source).shape[-1], value(what).shape[-1]
        if same_size(2 * size, whole) and same_size(part.start, self.index * size):
            yield from self.form.matches(part.source, so_far.holding(*part.nodes))


class Piece(NamedTuple):
    """Some neighbouring columns of a tensor.

    Attributes:
        source: the tensor.
        start: the first column.
        nodes: what takes them.
    """

    source: Node
    start: Any
    nodes: tuple[Node, ...]


def piece(node: Any) -> Piece | None:
    """Which columns of what a node holds, if it is a slice or a part of a split along the last dimension."""
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split.Tensor, aten.split_with_sizes.default):
        split, index = node.args
        source, sizes, dim = (*split.args, 0)[:3]
        if not is_last(dim, source):
            return None
        if isinstance(sizes, list | tuple):
            return Piece(source, sum(map(_size, sizes[:index])), (node, split))
        return Piece(source, index * _size(sizes), (node, split))
    if is_call(node, aten.slice.Tensor):
        given = arguments(node)
        start = 0 if given["start"] is None else _size(given["start"])
        if given["step"] != 1 or not is_last(given["dim"], given["self"]):
            return None
        if isinstance(start, int) and start < 0:
            start = start + value(given["self"]).shape[-1]
        return Piece(given["self"], start, (node,))
    return None


def _size(given: Any) -> Any:
    return value(given) if isinstance(given, Node) else given


def cast_source(node: Any) -> Node | None:
    """What a node casts to another dtype; None if it is no cast."""
    if not is_call(node, *CASTS):
        return None
    source = node.args[0]
    tensors = isinstance(source, Node) and isinstance(value(source), torch.Tensor)
    return source if tensors and isinstance(value(node), torch.Tensor) else None


def is_last(dims: Any, source: Any) -> bool:
    """Whether a dimension, or a list of one, is the last of a tensor."""
    if isinstance(dims, list | tuple):
        return len(dims) == 1 and is_last(dims[0], source)
    fake = value(source) if isinstance(source, Node) else None
    return isinstance(dims, int) and isinstance(fake, torch.Tensor) and dims in (-1, fake.dim() - 1)


def over_last(node: Node) -> bool:
    """Whether a call reduces the last dimension of its first argument alone."""
    return is_last(arguments(node)["dim"], node.args[0])


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of what a node holds."""
    dtype: torch.dtype = value(node).dtype
    return dtype


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of what a node holds."""
    return tuple(value(node).shape)


def plain(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")


ANYTHING = Anything()
ADD, MUL, DIV = (
    (aten.add.Tensor, aten.add.Scalar),
    (aten.mul.Tensor, aten.mul.Scalar),
    (aten.div.Tensor, aten.div.Scalar),
)


def product(a: Any, b: Any) -> Form:
    """``a * b`` in either order."""
    return Call(MUL, a, b, commutative=True)


def total(a: Any, b: Any) -> Form:
    """``a + b`` in either order."""
    return Call(ADD, a, b, commutative=True)


def inverse(form: Form) -> Form:
    """``1 / form``, as the decompositions write it."""
    reciprocal = Call(aten.reciprocal.default, form)
    return OneOf(product(reciprocal, 1), reciprocal)
