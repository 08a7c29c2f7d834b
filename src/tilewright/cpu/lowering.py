"""From Triton IR to the loop program: what is computed where, and in which nest of loops.

A tile's elements are computed where they are needed; :mod:`analysis` says which tiles are stored instead. Everything
that consumes tiles (a store, a reduction, a tile to be stored) is a sink of a nest of loops over the tile's shape, and
sinks of one shape that follow each other share a nest as long as none needs what the nest has not finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilewright.cpu import collectives, control, guards, pointwise, tiles
from tilewright.cpu.analysis import ANYWHERE, WRITES, Analysis, analyse, is_lazy
from tilewright.cpu.diagnostics import unsupported
from tilewright.cpu.expressions import Expr, Expressions
from tilewright.cpu.loops import Buffer, Let, Nest, Parameter, Program, Return, Site, Store, Write
from tilewright.cpu.ttir import Operation, Value
from tilewright.cpu.types import I32, Element, Opaque, Pointer, Tensor, element_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tilewright.cpu.loops import Sink, Statement
    from tilewright.cpu.ttir import Block, Location, Module


@dataclass(frozen=True)
class Shifted:
    """A tile that a loop moves on by one scalar: a start, and how far it has come."""

    start: Value
    by: Expr


ALL_POINTERS = (1 << 64) - 1
"""A memory access that any of the kernel's pointers may lead to."""

Binding = Expr | Buffer | Shifted | Value


class Conflict(Exception):
    """An element is needed that the open nest has not finished."""


@dataclass
class OpenNest:
    """The nest that sinks are being added to."""

    nest: Nest
    bounds: dict[Expr, int]
    memo: dict[tuple[Value, tuple[Expr, ...]], Expr] = field(default_factory=dict)
    produced: dict[Buffer, dict[Expr, Expr]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    reads: list[tuple[frozenset[Value | str], Value]] = field(default_factory=list)
    writes: list[frozenset[Value | str]] = field(default_factory=list)


class Lowering:
    """The lowering of one kernel."""

    def __init__(self, module: Module, aliased: bool) -> None:
        self.module = module
        self.aliased = aliased
        self.make = Expressions()
        self.bindings: dict[Value, Binding] = {}
        self.facts: Analysis = Analysis()
        self.out: list[Statement] = []
        self.open: OpenNest | None = None
        self.buffers: list[Buffer] = []
        self.sites: list[Site] = []
        self.pointer_bits: dict[Value, int] = {}
        self.load_sites: dict[Operation, Site] = {}
        self.homes: dict[Operation, Buffer] = {}
        self.labels: dict[Block, str] = {}
        self.n_names = 0
        self.calls: list[str] = []
        self.returns: list[Callable[[Sequence[Value]], None]] = []

    # Names

    def name(self, hint: str) -> str:
        """A new name that starts with ``hint``."""
        self.n_names += 1
        clean = "".join(c if c.isalnum() and c.isascii() else "_" for c in hint).strip("_")
        start = "" if clean[:1].isalpha() else "v"
        return f"{start}{clean}_{self.n_names}"

    def buffer(self, hint: str, element: Element, shape: Sequence[int]) -> Buffer:
        """New local memory for a tile."""
        found = Buffer(self.name(hint), element, tuple(shape))
        self.buffers.append(found)
        return found

    def site(self, location: Location, pointer: Value | None = None) -> Site:
        """A new memory access, through ``pointer``."""
        roots = frozenset() if pointer is None else self.roots(pointer)
        bits = sum(self.pointer_bits.get(root, 0) for root in roots if isinstance(root, Value))
        found = Site(len(self.sites), location, ALL_POINTERS if ANYWHERE in roots else bits)
        self.sites.append(found)
        return found

    # Elements and scalars

    def scalar(self, value: Value) -> Expr:
        """The expression of a scalar value."""
        bound = self.bindings.get(value)
        while isinstance(bound, Value):
            bound = self.bindings.get(bound)
        if not isinstance(bound, Expr):
            raise AssertionError(f"{value} is not a scalar that has been lowered")
        return bound

    def element(self, value: Value, index: tuple[Expr, ...]) -> Expr:
        """The element of a tile at an index, or the scalar itself."""
        if not isinstance(value.type, Tensor):
            return self.scalar(value)
        assert self.open is not None
        key = (value, index)
        found = self.open.memo.get(key)
        if found is None:
            found = self.open.memo[key] = self._element(value, index)
        return found

    def _element(self, value: Value, index: tuple[Expr, ...]) -> Expr:
        bound = self.bindings.get(value)
        if isinstance(bound, Value):
            return self.element(bound, index)
        if isinstance(bound, Expr):
            return bound
        if isinstance(bound, Buffer):
            return self.read(bound, index)
        if isinstance(bound, Shifted):
            start = self.element(bound.start, index)
            if isinstance(start.type, Pointer):
                return self.make.make("addptr", start.type, (start, bound.by))
            return self.make.int_op("add", start, bound.by)
        assert isinstance(value.owner, Operation), value
        return tiles.element(self, value.owner, value, index)

    def read(self, buffer: Buffer, index: tuple[Expr, ...]) -> Expr:
        """The element of stored tile."""
        assert self.open is not None
        position = self.make.flat(index, buffer.shape)
        produced = self.open.produced.get(buffer)
        if produced is not None:
            if position not in produced:
                raise Conflict
            return produced[position]
        return self.make.make("element", buffer.element, (position,), buffer)

    def let(self, value: Value, expression: Expr, mutable: bool = False) -> Expr:
        """Bind a scalar value to a variable that holds the expression's value."""
        if expression.op == "const" and not mutable:
            self.bindings[value] = expression
            return expression
        self.before(expression)
        name = self.name(value.name)
        self.out.append(Let(name, expression, mutable))
        variable = self.make.var(name, expression.type)
        self.bindings[value] = variable
        return variable

    def before(self, *expressions: Expr) -> None:
        """Close the open nest if an expression needs a scalar that the nest computes."""
        if self.open is None or not self.open.names:
            return
        seen: set[Expr] = set()
        for expression in expressions:
            if any(part.op == "var" and part.attr in self.open.names for part in expression.walk(seen)):
                self.flush()
                return

    # Nests

    def flush(self) -> None:
        """Close the open nest."""
        if self.open is not None:
            self.out.append(self.open.nest)
            self.open = None

    def sink(self, shape: Sequence[int], build: Callable[[tuple[Expr, ...]], list[Sink]], alone: bool = False) -> None:
        """Add sinks over tiles of a shape, to the open nest if that can be; ``alone`` ones get a nest of their own."""
        loops = tuple(size for size in shape if size > 1)
        if alone or self.open is None or self.open.nest.shape != loops:
            self.flush()
            self._start(loops, alone)
        assert self.open is not None
        try:
            sinks = build(self.index(shape))
            self._check_scalars(sinks)
        except Conflict:
            self.flush()
            self._start(loops, alone)
            sinks = build(self.index(shape))
        assert self.open is not None
        self.open.nest.sinks += sinks
        for sink in sinks:
            if isinstance(sink, Write):
                self.open.produced.setdefault(sink.buffer, {})[sink.position] = sink.value
        if alone:
            self.flush()

    def _start(self, loops: tuple[int, ...], alone: bool) -> None:
        bounds = {self.make.index(k): size for k, size in enumerate(loops)}
        self.open = OpenNest(Nest(loops, serial=alone), bounds)

    def _check_scalars(self, sinks: list[Sink]) -> None:
        """No sink may use a scalar that the open nest is still computing."""
        assert self.open is not None
        if not self.open.names:
            return
        seen: set[Expr] = set()
        for sink in sinks:
            for root in collectives.roots_of(sink):
                if any(part.op == "var" and part.attr in self.open.names for part in root.walk(seen)):
                    raise Conflict

    def index(self, shape: Sequence[int]) -> tuple[Expr, ...]:
        """The index of the open nest's current element in a tile of the shape."""
        found = []
        depth = 0
        for size in shape:
            found.append(self.make.index(depth) if size > 1 else self.make.const(0, I32))
            depth += size > 1
        return tuple(found)

    def write(self, buffer: Buffer, value: Value) -> None:
        """Store a tile in a buffer."""

        def build(index: tuple[Expr, ...]) -> list[Sink]:
            return [Write(buffer, self.make.flat(index, buffer.shape), self.element(value, index))]

        self.sink(buffer.shape, build)

    def stored(self, value: Value, element: Element | None = None) -> Buffer:
        """A finished buffer that holds the tile; with ``element``, one of that type."""
        bound = self.bindings.get(value)
        while isinstance(bound, Value):
            value = bound
            bound = self.bindings.get(value)
        own = element_of(value.type)
        if isinstance(bound, Buffer) and element in (None, own):
            if self.open is not None and bound in self.open.produced:
                self.flush()
            return bound
        buffer = self.buffer(value.name, element or own, shape_of(value.type))

        def build(index: tuple[Expr, ...]) -> list[Sink]:
            e = self.element(value, index)
            if element is not None and e.type != element:
                e = self.make.make("fcast" if element.is_float else "sext", element, (e,))
            return [Write(buffer, self.make.flat(index, buffer.shape), e)]

        self.sink(buffer.shape, build)
        self.flush()
        return buffer

    # Operations

    def block(self, operations: Sequence[Operation]) -> None:
        """Lower operations one after the other."""
        for operation in operations:
            self.operation(operation)

    def operation(self, operation: Operation) -> None:
        """Lower one operation."""
        for result in operation.results:
            if isinstance(result.type, Opaque):
                raise unsupported(operation, f"{operation.name} with a result of type {result.type}")
        if is_lazy(operation):
            for result in operation.results:
                self.bindings.pop(result, None)
                if result in self.facts.stored:
                    buffer = self.buffer(result.name, element_of(result.type), shape_of(result.type))
                    self.write(buffer, result)
                    self.bindings[result] = buffer
            return
        handler = _HANDLERS.get(operation.name)
        if handler is not None:
            handler(self, operation)
        elif pointwise.is_pointwise(operation):
            args = [self.scalar(operand) for operand in operation.operands]
            self.let(operation.result, pointwise.build(self.make, operation, args))
        else:
            raise unsupported(operation, f"the operation {operation.name}")

    def roots(self, pointer: Value) -> frozenset[Value | str]:
        """Which of the kernel's pointers a pointer may come from."""
        return self.facts.roots.get(pointer, frozenset({ANYWHERE}))

    def note_read(self, pointer: Value) -> None:
        """The open nest reads memory."""
        assert self.open is not None
        roots = self.roots(pointer)
        if any(self.facts.may_overlap(roots, written, self.aliased) for written in self.open.writes):
            raise Conflict
        self.open.reads.append((roots, pointer))

    def store(self, operation: Operation) -> None:
        """``tt.store``."""
        pointer, value, *rest = operation.operands
        mask = rest[0] if rest else None
        roots = self.roots(pointer)
        site = self.site(operation.location, pointer)
        if self.open is not None:
            reads = [r for r, p in self.open.reads if p is not pointer]
            if any(self.facts.may_overlap(roots, other, self.aliased) for other in reads):
                self.flush()
            elif any(self.facts.may_overlap(roots, other, self.aliased) for other in self.open.writes):
                if self._store_apart(operation, site):
                    return
                self.flush()
        if not isinstance(pointer.type, Tensor):
            self.flush()

        def build(index: tuple[Expr, ...]) -> list[Sink]:
            stored = self.element(value, index)
            when = None if mask is None else self.element(mask, index)
            return [Store(self.element(pointer, index), stored, when, site)]

        self.sink(shape_of(pointer.type), build)
        assert self.open is not None
        self.open.writes.append(roots)
        if not isinstance(pointer.type, Tensor):
            self.flush()

    def _store_apart(self, operation: Operation, site: Site) -> bool:
        """Add a store to a nest that stores through the same pointer already, on condition that the two do not meet."""
        assert self.open is not None
        pointer, value, *rest = operation.operands
        shape = shape_of(pointer.type)
        earlier = [sink for sink in self.open.nest.sinks if isinstance(sink, Store)]
        if self.aliased or self.open.names or self.open.nest.serial or len(earlier) != 1:
            return False
        if self.open.nest.shape != tuple(size for size in shape if size > 1):
            return False
        index = self.index(shape)
        try:
            mask = self.element(rest[0], index) if rest else None
            store = Store(self.element(pointer, index), self.element(value, index), mask, site)
        except Conflict:
            return False
        seen: set[Expr] = set()
        for part in (part for root in collectives.roots_of(store) for part in root.walk(seen)):
            if part.op == "load" and part.attr.roots & earlier[0].site.roots:
                return False
            if part.op == "element" and part.attr in self.open.produced:
                return False
        condition = guards.apart(self.make, self.open.nest, earlier[0], store)
        if condition is None:
            return False
        self.open.nest.apart.append((len(self.open.nest.sinks), condition))
        self.open.nest.sinks.append(store)
        return True

    def function(
        self, function: Operation, arguments: Sequence[Binding], returns: Callable[[Sequence[Value]], None]
    ) -> None:
        """Lower a function's body in place of a call."""
        if any(name == function.attributes["sym_name"] for name in self.calls):
            raise unsupported(function, "recursion")
        outer, self.facts = self.facts, analyse(function, self.aliased)
        self.calls.append(function.attributes["sym_name"])
        self.returns.append(returns)
        body = function.regions[0]
        for argument, binding in zip(body.blocks[0].arguments, arguments, strict=True):
            self.bindings[argument] = binding
        if len(body.blocks) == 1:
            self.block(body.block.operations)
        else:
            control.blocks(self, body)
        self.flush()
        self.returns.pop()
        self.calls.pop()
        self.facts = outer


def _return(lowering: Lowering, operation: Operation) -> None:
    lowering.returns[-1](operation.operands)


_HANDLERS: dict[str, Callable[[Lowering, Operation], None]] = {
    "tt.store": Lowering.store,
    "tt.return": _return,
    **tiles.HANDLERS,
    **collectives.HANDLERS,
    **control.HANDLERS,
}


def lower(module: Module, aliased: bool, fuse_multiply_add: bool) -> tuple[Program, Expressions]:
    """Lower a kernel, to a program and what makes its expressions.

    Args:
        module: the kernel, as :func:`reader.read` gives it.
        aliased: whether its pointers may lead to memory that overlaps.
        fuse_multiply_add: whether the compiler may round a product and a sum once, as GPUs do.

    Raises:
        UnsupportedKernelError: the kernel does what this target does not support.
    """
    lowering = Lowering(module, aliased)
    kernel = module.kernel
    parameters: list[Parameter] = []
    arguments: list[Binding] = []
    for argument in kernel.regions[0].blocks[0].arguments:
        if isinstance(argument.type, Opaque | Tensor):
            raise unsupported(kernel, f"the type {argument.type} of argument {argument.name}")
        name = lowering.name(argument.name)
        parameters.append(Parameter(name, argument.type))
        if isinstance(argument.type, Pointer):
            lowering.pointer_bits[argument] = 1 << min(63, len(lowering.pointer_bits))
        arguments.append(lowering.make.var(name, argument.type))

    def leave(values: Sequence[Value]) -> None:
        lowering.flush()
        lowering.out.append(Return())

    lowering.function(kernel, arguments, leave)
    facts = analyse(kernel, aliased)
    written: set[Value | str] = set()
    for operation in facts.position:
        if operation.name in WRITES:
            written |= facts.roots.get(operation.operands[0], frozenset({ANYWHERE}))
        if operation.name == "tt.call":
            written.add(ANYWHERE)
    for parameter, argument in zip(parameters, kernel.regions[0].blocks[0].arguments, strict=True):
        parameter.written = isinstance(argument.type, Pointer) and (argument in written or ANYWHERE in written)
    _drop_unread(lowering)
    name = kernel.attributes["sym_name"]
    program = Program(name, parameters, lowering.out, lowering.buffers, lowering.sites, aliased, fuse_multiply_add)
    return program, lowering.make


def _drop_unread(lowering: Lowering) -> None:
    """Remove writes to buffers that nothing reads: all their readers shared the nest."""
    while True:
        for buffer in lowering.buffers:
            buffer.n_reads = 0
        control.count_reads(lowering.out)
        dead = {buffer for buffer in lowering.buffers if not buffer.n_reads}
        before = len(lowering.buffers)
        lowering.buffers = [buffer for buffer in lowering.buffers if buffer not in dead]
        control.drop_writes(lowering.out, dead)
        if len(lowering.buffers) == before:
            return
