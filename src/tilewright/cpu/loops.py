"""The loop program: what a kernel does for one program of its grid, as loops over elements.

It stands between Triton's tile operations and C, and can be printed. Tiles that are stored are :class:`Buffer`; every
other tile is an expression of the loops' variables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilewright.cpu.expressions import Expr
    from tilewright.cpu.ttir import Location
    from tilewright.cpu.types import Element


@dataclass(eq=False)
class Buffer:
    """Local memory for a tile, row-major. The elements lie as in registers: small floats as fp32."""

    name: str
    element: Element
    shape: tuple[int, ...]
    n_reads: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Site:
    """A memory access of the kernel, for messages about it.

    Attributes:
        roots: the kernel's pointers that may lead there, as a set of bits.
    """

    number: int
    location: Location
    roots: int = 0

    def __str__(self) -> str:
        return f"@{self.location.in_user_code().line}"


class Statement:
    """A step of the loop program."""

    def lines(self) -> list[str]:
        """The statement as text."""
        return [str(self)]


@dataclass(eq=False)
class Let(Statement):
    """A scalar that does not change; ``mutable`` ones are assigned again."""

    name: str
    value: Expr
    mutable: bool = False

    def __str__(self) -> str:
        return f"{'var' if self.mutable else 'let'} {self.name}: {self.value.type} = {self.value}"


@dataclass(eq=False)
class Declare(Statement):
    """A scalar variable, not yet assigned."""

    name: str
    type: Element

    def __str__(self) -> str:
        return f"var {self.name}: {self.type}"


@dataclass(eq=False)
class Assign(Statement):
    """Give variables new values, all at once."""

    targets: list[tuple[str, Expr]]

    def __str__(self) -> str:
        return "; ".join(f"{name} = {value}" for name, value in self.targets)


@dataclass(eq=False)
class Write:
    """Store an element of a tile in a buffer."""

    buffer: Buffer
    position: Expr
    value: Expr

    def __str__(self) -> str:
        return f"{self.buffer}[{self.position}] = {self.value}"


@dataclass(eq=False)
class Store:
    """Store an element in the kernel's memory, where the mask holds."""

    pointer: Expr
    value: Expr
    mask: Expr | None
    site: Site

    def __str__(self) -> str:
        when = "" if self.mask is None else f" if {self.mask}"
        return f"*({self.pointer}) = {self.value}{when} {self.site}"


@dataclass(eq=False)
class Combine:
    """A function of two groups of scalars: of a reduction, a scan.

    Attributes:
        identity: what can stand at the start, per operand, where there is such a value.
    """

    left: list[Expr]
    right: list[Expr]
    results: list[Expr]
    identity: list[Expr] | None

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.results))})"


@dataclass(eq=False)
class Fold:
    """Reduce the nest's tile along one axis.

    Attributes:
        axis: the number of the axis in the nest's shape.
        values: what is reduced.
        targets: per operand a buffer of the remaining shape, or the name of a scalar where nothing remains.
        position: the position in the buffers.
    """

    axis: int
    values: list[Expr]
    targets: list[Buffer | str]
    position: Expr
    combine: Combine

    def __str__(self) -> str:
        targets, values = (", ".join(map(str, group)) for group in (self.targets, self.values))
        return f"{targets} = fold axis {self.axis} of {values} by {self.combine}"


@dataclass(eq=False)
class Atomic:
    """Read, modify and write an element of memory as one step, where the mask holds; an exchange may compare first."""

    kind: str
    pointer: Expr
    value: Expr
    mask: Expr | None
    compare: Expr | None
    target: Buffer | str | None
    position: Expr
    site: Site

    def __str__(self) -> str:
        return f"{self.target} = atomic {self.kind} *({self.pointer}), {self.value} {self.site}"


Sink = Write | Store | Fold | Atomic


@dataclass(eq=False)
class Nest(Statement):
    """Loops over a tile's elements. The iterations do not depend on each other, so they may run in any order.

    Attributes:
        shape: how far each loop runs.
        sinks: what is done with each element.
        serial: the iterations run in order: atomic operations.
        apart: conditions under which the stores of a nest do not overlap, each with the number of the store's sink.
            Where one does not hold, that sink and those after it have to wait until the others have run everywhere.
    """

    shape: tuple[int, ...]
    sinks: list[Sink] = field(default_factory=list)
    serial: bool = False
    apart: list[tuple[int, Expr]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The statement as text."""
        head = " ".join(f"i{k}<{size}" for k, size in enumerate(self.shape) if size > 1)
        return [f"{'serial' if self.serial else 'nest'} {head}:", *(f"  {sink}" for sink in self.sinks)]


@dataclass(eq=False)
class Scan(Statement):
    """Combine the elements of buffers along an axis one after the other, in place."""

    shape: tuple[int, ...]
    axis: int
    reverse: bool
    buffers: list[Buffer]
    combine: Combine

    def __str__(self) -> str:
        order = "backwards" if self.reverse else "forwards"
        return f"scan {', '.join(map(str, self.buffers))} axis {self.axis} {order} by {self.combine}"


@dataclass(eq=False)
class Dot(Statement):
    """``c += a @ b`` per batch, or ``c = a @ b``; row-major."""

    a: Buffer
    b: Buffer
    c: Buffer
    batch: int
    m: int
    n: int
    k: int
    accumulate: bool
    pairs: bool

    def __str__(self) -> str:
        sizes = f"({self.batch} x {self.m} x {self.n} x {self.k})"
        return f"{self.c} {'+=' if self.accumulate else '='} {self.a} @ {self.b} {sizes}"


@dataclass(eq=False)
class Histogram(Statement):
    """Count how often each bin's number occurs."""

    values: Buffer
    mask: Buffer | None
    bins: Buffer

    def __str__(self) -> str:
        return f"{self.bins} = histogram {self.values}"


@dataclass(eq=False)
class Print(Statement):
    """Print the elements of tiles."""

    prefix: str
    values: list[tuple[Buffer | Expr, bool]]
    hexadecimal: bool

    def __str__(self) -> str:
        return f"print {self.prefix!r} {', '.join(str(v) for v, _ in self.values)}"


@dataclass(eq=False)
class Assert(Statement):
    """Stop the launch unless every element is true."""

    condition: Buffer | Expr
    message: str
    site: Site

    def __str__(self) -> str:
        return f"assert {self.condition} {self.message!r} {self.site}"


@dataclass(eq=False)
class For(Statement):
    """Count from ``start`` to ``stop`` by ``step``."""

    variable: str
    start: Expr
    stop: Expr
    step: Expr
    unsigned: bool
    body: list[Statement]

    def lines(self) -> list[str]:
        """The statement as text."""
        return [f"for {self.variable} in {self.start} .. {self.stop} by {self.step}:", *_indented(self.body)]


@dataclass(eq=False)
class If(Statement):
    """One of two branches."""

    condition: Expr
    then: list[Statement]
    otherwise: list[Statement]

    def lines(self) -> list[str]:
        """The statement as text."""
        found = [f"if {self.condition}:", *_indented(self.then)]
        return found + (["else:", *_indented(self.otherwise)] if self.otherwise else [])


@dataclass(eq=False)
class Loop(Statement):
    """Repeat until a :class:`Leave`."""

    body: list[Statement]

    def lines(self) -> list[str]:
        """The statement as text."""
        return ["loop:", *_indented(self.body)]


@dataclass(eq=False)
class Leave(Statement):
    """Leave the innermost loop unless the condition holds."""

    unless: Expr

    def __str__(self) -> str:
        return f"leave unless {self.unless}"


@dataclass(eq=False)
class Label(Statement):
    """Where a jump goes."""

    name: str

    def __str__(self) -> str:
        return f"{self.name}:"


@dataclass(eq=False)
class Jump(Statement):
    """Go on elsewhere."""

    label: str

    def __str__(self) -> str:
        return f"jump {self.label}"


@dataclass(eq=False)
class Return(Statement):
    """End the program."""

    def __str__(self) -> str:
        return "return"


def _indented(body: Sequence[Statement]) -> list[str]:
    return [f"  {line}" for statement in body for line in statement.lines()]


@dataclass(eq=False)
class Parameter:
    """An argument of the kernel as it arrives at the native code."""

    name: str
    type: Element
    written: bool = False


@dataclass(eq=False)
class Program:
    """A kernel as loops.

    Attributes:
        aliased: whether its pointers may lead to memory that overlaps.
        sites: the memory accesses and assertions, by number.
    """

    name: str
    parameters: list[Parameter]
    body: list[Statement]
    buffers: list[Buffer]
    sites: list[Site]
    aliased: bool
    fuse_multiply_add: bool

    def __str__(self) -> str:
        head = f"program {self.name}({', '.join(f'{p.name}: {p.type}' for p in self.parameters)})"
        return "\n".join([head, *_indented(self.body)]) + "\n"
