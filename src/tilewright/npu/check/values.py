"""What is known of a value in a wrapper, and of the names that it has there. What is not known is ``None``."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Given:
    """A parameter of the wrapper, in whatever form.

    Attributes:
        name: of the parameter.
        aligned: whether its last dimension may have been padded by then.
    """

    name: str
    aligned: bool = False


@dataclass(frozen=True)
class Made:
    """A tensor that was allocated on the way.

    Attributes:
        node: the call that allocates it.
        aligned: whether it has the size of a tensor that may have been padded by then.
    """

    node: ast.Call
    aligned: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel of the module.

    Attributes:
        name: of the kernel.
    """

    name: str


@dataclass(frozen=True)
class Function:
    """A function whose body is known.

    Attributes:
        node: its definition.
        scope: the names around it, where it stands in another function.
    """

    node: Definition | ast.Lambda
    scope: Scope | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Many:
    """A tuple or a list.

    Attributes:
        items: what is in it.
    """

    items: tuple[Value, ...]


@dataclass(frozen=True)
class Sizes:
    """The shape of a tensor, or its last size alone.

    Attributes:
        aligned: whether the tensor may have been padded by then.
        is_shape: whether it is the whole shape.
    """

    aligned: bool
    is_shape: bool


Value: TypeAlias = Given | Made | Kernel | Function | Many | Sizes | None


class Scope:
    """Names of a function, and behind them those of the functions around it.

    Attributes:
        names: what is known of each name that the function itself has.
        outer: the names around it.
    """

    def __init__(self, outer: Scope | None = None) -> None:
        self.names: dict[str, Value] = {}
        self.outer = outer

    def has(self, name: str) -> bool:
        """Whether a name is one of a function, and not of the module."""
        return name in self.names or (self.outer is not None and self.outer.has(name))

    def get(self, name: str) -> Value:
        """What is known of a name."""
        if name in self.names or self.outer is None:
            return self.names.get(name)
        return self.outer.get(name)


def concatenated(left: Value, right: Value) -> Value:
    """The sum of two lists or tuples."""
    return Many(left.items + right.items) if isinstance(left, Many) and isinstance(right, Many) else None


def joined(left: Value, right: Value) -> Value:
    """What is known of a value that is one of two."""
    if left == right:
        return left
    if isinstance(left, Given) and isinstance(right, Given) and left.name == right.name:
        return Given(left.name, left.aligned or right.aligned)
    if isinstance(left, Many) and isinstance(right, Many) and len(left.items) == len(right.items):
        return Many(tuple(joined(a, b) for a, b in zip(left.items, right.items, strict=True)))
    return None


def all_joined(values: Sequence[Value]) -> Value:
    """What is known of a value that is one of several."""
    result = values[0] if values else None
    for value in values[1:]:
        result = joined(result, value)
    return result
