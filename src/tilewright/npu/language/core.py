"""What the kernel language is made of: dtypes, constexpr, and functions that mean something in a kernel only."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.errors import NpuLanguageError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class dtype:
    """A dtype of the language.

    Attributes:
        name: Triton's name: ``"fp32"``, ``"int32"``.
        bits: its size.
    """

    name: str
    bits: int

    def is_floating(self) -> bool:
        """Whether it is a floating point dtype."""
        return self.name.startswith(("fp", "bf"))

    def is_int(self) -> bool:
        """Whether it is an integer dtype."""
        return not self.is_floating()

    @property
    def primitive_bitwidth(self) -> int:
        """Its size in bits."""
        return self.bits

    @property
    def scalar(self) -> dtype:
        """Itself; blocks have dtypes of this kind for their elements."""
        return self

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class block_type:
    """The type of a block: ``block_pointer.type.element_ty`` is one.

    Attributes:
        element_ty: dtype of its elements.
        shape: its sizes.
    """

    element_ty: dtype
    shape: tuple[Any, ...]

    @property
    def scalar(self) -> dtype:
        """The dtype of its elements."""
        return self.element_ty


@dataclass(frozen=True)
class pointer_type:
    """The type of a pointer: what it points to.

    Attributes:
        element_ty: a dtype, or the block of a block pointer.
    """

    element_ty: dtype | block_type

    @property
    def scalar(self) -> dtype:
        """The dtype of the elements in the end."""
        return self.element_ty.scalar


class constexpr:
    """Marks a parameter, or a value, as known when a kernel is compiled."""

    def __init__(self, value: Any) -> None:
        self.value: Any = value.value if isinstance(value, constexpr) else value

    def __repr__(self) -> str:
        return f"constexpr[{self.value}]"

    def __index__(self) -> int:
        return int(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if isinstance(other, constexpr) else other))

    def __hash__(self) -> int:
        return hash(self.value)


class Builtin:
    """A function of the language: a name, a signature and documentation; kernels are never run as Python.

    Attributes:
        name: its name.
        namespace: ``"tl"`` or ``"rblib"``, for messages.
        signature: its parameters; None for a function that exists in Triton and is supported nowhere.
    """

    def __init__(self, name: str, namespace: str, signature: inspect.Signature | None, doc: str | None) -> None:
        self.name = self.__name__ = name
        self.namespace = namespace
        self.signature = signature
        self.__doc__ = doc

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: kernels are not run as Python."""
        raise NpuLanguageError(f"{self}() means something inside a kernel only, in a function under @triton.jit")

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}>"


def builtin(namespace: str) -> Callable[[Callable[..., Any]], Builtin]:
    """Make a documented signature a function of the language."""

    def make(function: Callable[..., Any]) -> Builtin:
        return Builtin(function.__name__.rstrip("_"), namespace, inspect.signature(function), function.__doc__)

    return make
