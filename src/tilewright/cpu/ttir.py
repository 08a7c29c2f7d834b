"""Triton IR as plain objects: operations with operands, attributes, regions and source locations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.cpu.types import Type


@dataclass(frozen=True)
class Location:
    """Where an operation comes from.

    Attributes:
        file: path of the source file; "" if unknown.
        line: line, counted from 1; 0 if unknown.
        column: column as MLIR gives it: from 0 up to Triton 3.7, from 1 after.
        name: the variable that the value is assigned to.
        callers: where the function that holds the operation was called, innermost first.
    """

    file: str = ""
    line: int = 0
    column: int = 0
    name: str = ""
    callers: tuple[Location, ...] = ()

    def frames(self) -> tuple[Location, ...]:
        """The call stack, innermost first."""
        return (self, *self.callers)

    def in_user_code(self) -> Location:
        """The innermost frame that is not inside Triton's own language library."""
        known = [frame for frame in self.frames() if frame.line]
        outside = [frame for frame in known if "/triton/language/" not in frame.file.replace("\\", "/")]
        return (outside or known or [self])[0]


UNKNOWN = Location()


@dataclass(eq=False)
class Value:
    """A result of an operation or an argument of a block."""

    type: Type
    name: str
    owner: Operation | Block | None = None
    index: int = 0

    def __str__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(eq=False)
class Operation:
    """An operation, such as ``arith.addi``."""

    name: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, Any]
    regions: list[Region]
    successors: list[Block]
    location: Location

    @property
    def result(self) -> Value:
        """The only result."""
        return self.results[0]


@dataclass(eq=False)
class Block:
    """A sequence of operations; the last one ends it."""

    label: str
    arguments: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass(eq=False)
class Region:
    """The blocks of a function, a loop body, a combine function."""

    blocks: list[Block]

    @property
    def block(self) -> Block:
        """The only block."""
        return self.blocks[0]


@dataclass(frozen=True)
class Dense:
    """A constant tensor: one value for all elements, or a list in row-major order."""

    values: Any
    splat: bool


@dataclass(eq=False)
class Module:
    """The functions of a kernel; the public one is the kernel."""

    functions: dict[str, Operation]
    attributes: dict[str, Any]

    @property
    def kernel(self) -> Operation:
        """The entry function."""
        public = [f for f in self.functions.values() if f.attributes.get("sym_visibility") == "public"]
        return (public or list(self.functions.values()))[0]


@dataclass(frozen=True)
class Bits:
    """A floating point constant given by its bit pattern."""

    pattern: int
    type: Any
