"""Nests of loops as C: what is computed where, vector loops, reductions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilewright.cpu.c_expressions import Writer, c_type, from_memory, to_memory
from tilewright.cpu.expressions import depth
from tilewright.cpu.guards import leading, without_masks
from tilewright.cpu.loops import Atomic, Buffer, Fold, Nest, Store, Write
from tilewright.cpu.types import F64, I1, Pointer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tilewright.cpu.expressions import Expr, Expressions
    from tilewright.cpu.loops import Combine, Sink

LANES = 64
"""How many partial results a reduction keeps: four vectors of AVX-512, and the same sums on every machine."""

_LEAVES = frozenset({"const", "var", "index"})


@dataclass
class _Text:
    """Lines of C, indented."""

    lines: list[str] = field(default_factory=list)
    level: int = 1

    def add(self, line: str) -> None:
        self.lines.append("    " * self.level + line)

    def open(self, line: str) -> None:
        self.add(line + " {")
        self.level += 1

    def close(self) -> None:
        self.level -= 1
        self.add("}")


def temporaries(
    writer: Writer, roots: Sequence[Expr], order: Sequence[int], first: Callable[[Expr], bool] | None = None
) -> list[tuple[int, Expr]]:
    """The parts that get a variable, with the depth it stands at: those used twice or in a deeper loop than theirs.

    ``first`` names others: those that must be computed before the nest writes anything.
    """
    uses: dict[Expr, int] = {}
    deeper: set[Expr] = set()
    found: list[Expr] = []
    seen: set[Expr] = set()

    def visit(e: Expr) -> None:
        if e in seen:
            return
        seen.add(e)
        own = depth(e, order)
        for part in writer.parts(e):
            uses[part] = uses.get(part, 0) + 1
            visit(part)
            if depth(part, order) < own:
                deeper.add(part)
        found.append(e)

    for root in roots:
        uses[root] = uses.get(root, 0) + 1
        visit(root)
        if depth(root, order) < len(order):
            deeper.add(root)
    chosen = [e for e in found if e.op not in _LEAVES and (uses[e] > 1 or e in deeper or (first and first(e)))]
    return [(depth(e, order), e) for e in chosen]


class NestWriter:
    """Writes one nest.

    Args:
        make: makes the offsets of memory accesses.
        nest: what to write.
        checked: whether accesses are checked against the bounds.
    """

    def __init__(self, make: Expressions, nest: Nest, checked: bool) -> None:
        self.nest = nest
        self.checked = checked
        self.order = _order(nest, Writer(make)) if not nest.serial else list(range(len(nest.shape)))
        self.writer = Writer(make, self.order, checked, self._element_number())
        self.names: dict[Expr, str] = {}
        self.single = False
        self.prefix = "t"
        self.text = _Text()
        inner = self.order[-1] if self.order else -1
        folds = [sink for sink in nest.sinks if isinstance(sink, Fold)]
        self.lane_folds = [f for f in folds if f.axis == inner and f.combine.identity is not None]
        self.other_folds = [f for f in folds if f not in self.lane_folds]

    def _element_number(self) -> str:
        total = "0"
        for k, size in enumerate(self.nest.shape):
            total = f"({total} * {size} + i{k})" if k else "i0"
        return total if self.nest.shape else "0"

    def lines(self) -> list[str]:
        """The nest as lines of C."""
        self._declare_scalars()
        if self.nest.apart:
            return self._apart()
        plain = not (self.checked or self.nest.serial or not self.order)
        split = leading(self.writer.make, self.nest) if plain and self.nest.shape[0] > LANES else None
        if split is not None and not self.other_folds:
            return [*self.text.lines, *self._split_body(*split)]
        found = without_masks(self.writer.make, self.nest) if plain else None
        if found is None:
            return [*self.text.lines, *self._body()]
        condition, bare = found
        fast = NestWriter(self.writer.make, bare, self.checked)
        if condition.op == "const":
            return [*self.text.lines, *fast._body()]
        guard = self.writer.text(condition, {})
        head, self.text.lines = self.text.lines, []
        return [*head, f"    if ({guard})", *fast._body(), "    else", *self._body()]

    def _apart(self) -> list[str]:
        """One nest where the stores do not overlap, two where they may."""
        (number, condition), make = self.nest.apart[0], self.writer.make
        together = Nest(self.nest.shape, self.nest.sinks)
        before, after = (Nest(self.nest.shape, s) for s in (self.nest.sinks[:number], self.nest.sinks[number:]))
        in_turn = [line for nest in (before, after) for line in NestWriter(make, nest, self.checked).lines()]
        if self.checked:
            return in_turn
        fused = NestWriter(make, together, False).lines()
        return [f"    if ({self.writer.text(condition, {})}) {{", *fused, "    } else {", *in_turn, "    }"]

    def _body(self) -> list[str]:
        """The loops, in a block."""
        self.text.lines = []
        temps = self._temporaries()
        self.text.open("")
        self._start_folds()
        turned = self._turned()
        if turned is not None:
            self.text.add(f"_Alignas(64) {c_type(turned.buffer.element)} turned[{turned.buffer.size}];")
        self._loop(0, temps)
        if turned is not None:
            rows, columns = self.nest.shape
            self.text.add(f"tw_transpose((const int32_t *)turned, (int32_t *){turned.buffer.name}, {columns}, {rows});")
        self.text.close()
        return self.text.lines

    def _split_body(self, count: Expr, bare: Nest) -> list[str]:
        """One loop in two parts: the elements before the first that a mask shuts out, then the others."""
        size = self.nest.shape[0]
        lanes = LANES if self.lane_folds else 1
        fast = NestWriter(self.writer.make, bare, self.checked)
        fast.text = self.text = _Text()
        self.text.open("")
        whole = f" / {lanes} * {lanes}" if lanes > 1 else ""
        self.text.add(f"const int full = (int)({self.value(count)}){whole};")
        if lanes > 1:
            self._declare_lanes(lanes)
        fast._part("0", "full", lanes, "f")
        self._part("full", str(size), lanes, "t")
        if lanes > 1:
            self._finish_lanes(lanes)
        self.text.close()
        return self.text.lines

    def _part(self, start: str, stop: str, lanes: int, prefix: str) -> None:
        """The loop from ``start`` to ``stop``, in steps of the lanes of its reductions."""
        self.prefix = prefix
        temps = self._temporaries()
        self._settle(0, temps)
        if lanes > 1:
            self._lanes(start, stop, lanes, temps)
            return
        self.text.add("#pragma omp simd")
        self.text.open(f"for (int i0 = {start}; i0 < {stop}; i0++)")
        self._loop(1, temps)
        self.text.close()

    def _temporaries(self) -> list[tuple[int, Expr]]:
        """What gets a variable, and in how many loops it stands."""
        from tilewright.cpu.collectives import roots_of

        roots = [root for sink in self.nest.sinks for root in roots_of(sink)]
        positions = [sink.position for sink in self.nest.sinks if not isinstance(sink, Store)]
        pointers = [sink.pointer for sink in self.nest.sinks if isinstance(sink, Store | Atomic)]
        # A pointer that is stored through is written as an address, not as a value.
        addresses = [part for pointer in pointers for part in self.writer.address(pointer)[:2]]
        values = [root for root in roots if not any(root is other for other in [*pointers, *positions])]
        values += [self.writer.position(position) for position in positions]
        return temporaries(self.writer, [*values, *addresses], self.order, self._is_overwritten)

    def _turned(self) -> Write | None:
        """The tile that a nest stores across the direction it runs in: it is stored along it, and then transposed.

        That is how a transposed tile is loaded: rows of memory become columns.
        """
        if self.order != [1, 0] or len(self.nest.sinks) != 1:
            return None
        sink = self.nest.sinks[0]
        whole = isinstance(sink, Write) and [s for s in sink.buffer.shape if s > 1] == list(self.nest.shape)
        if not whole or self.checked or min(self.nest.shape) < 16 or self.nest.shape[0] * self.nest.shape[1] > 1 << 14:
            return None
        assert isinstance(sink, Write)
        element = sink.buffer.element
        if isinstance(element, Pointer) or element == I1 or not (element.is_small_float or element.bits == 32):
            return None
        return (
            sink
            if not any(part.op == "element" and part.attr is sink.buffer for part in sink.value.walk(set()))
            else None
        )

    def _is_overwritten(self, e: Expr) -> bool:
        """Whether the memory that an expression reads may be written by a sink of the nest."""
        if e.op == "load":
            return any(isinstance(sink, Store | Atomic) for sink in self.nest.sinks)
        written = [sink.buffer for sink in self.nest.sinks if isinstance(sink, Write)]
        return e.op == "element" and e.attr in written

    def _declare_scalars(self) -> None:
        for sink in self.nest.sinks:
            if isinstance(sink, Fold):
                for target, value in zip(sink.targets, sink.values, strict=True):
                    if isinstance(target, str):
                        self.text.add(f"{c_type(value.type)} {target};")
            elif isinstance(sink, Atomic) and isinstance(sink.target, str):
                self.text.add(f"{c_type(sink.value.type)} {sink.target} = 0;")

    def _start_folds(self) -> None:
        for fold in self.other_folds:
            if fold.combine.identity is None:
                continue
            for target, identity in zip(fold.targets, fold.combine.identity, strict=True):
                assert isinstance(target, Buffer)
                self.text.add(f"for (int i = 0; i < {target.size}; i++) {target.name}[i] = {self.value(identity)};")

    def value(self, e: Expr) -> str:
        """The expression's text."""
        return self.writer.text(e, self.names)

    def position(self, e: Expr) -> str:
        """The text of a position in a buffer."""
        return self.value(self.writer.position(e))

    def _loop(self, level: int, temps: list[tuple[int, Expr]]) -> None:
        """The loop at a level and all inside it, after what is computed before it."""
        self._settle(level, temps)
        if level == len(self.order):
            for sink in self.nest.sinks:
                self._sink(sink)
            return
        loop = self.order[level]
        size = self.nest.shape[loop]
        innermost = level == len(self.order) - 1
        if innermost and self.lane_folds:
            self._lane_loop(size, temps)
            return
        if innermost and not self.nest.serial and not self.checked:
            self.text.add("#pragma omp simd")
        self.text.open(f"for (int i{loop} = 0; i{loop} < {size}; i{loop}++)")
        self._loop(level + 1, temps)
        self.text.close()

    def _settle(self, level: int, temps: list[tuple[int, Expr]]) -> None:
        """Compute what stands in so many loops."""
        for at, e in temps:
            if at == level:
                name = f"{self.prefix}{len(self.names)}"
                type_ = f"const {c_type(e.type)}".replace("const char *", "char *const")
                self.text.add(f"{type_} {name} = {self.value(e)};")
                self.names[e] = name

    # Reductions along the innermost loop, in lanes

    def _lane_loop(self, size: int, temps: list[tuple[int, Expr]]) -> None:
        lanes = min(LANES, size)
        self.single = lanes == size
        self._declare_lanes(lanes)
        self._lanes("0", str(size), lanes, temps)
        self._finish_lanes(lanes)

    def _declare_lanes(self, lanes: int) -> None:
        """The partial results, which change nothing so far."""
        for number, fold in enumerate(self.lane_folds):
            assert fold.combine.identity is not None
            for k, identity in enumerate(fold.combine.identity):
                self.text.add(f"_Alignas(64) {c_type(identity.type)} lane{number}_{k}[{lanes}];")
                if not self.single:
                    self.text.add(f"for (int l = 0; l < {lanes}; l++) lane{number}_{k}[l] = {self.value(identity)};")

    def _lanes(self, start: str, stop: str, lanes: int, temps: list[tuple[int, Expr]]) -> None:
        """The innermost loop in steps of the lanes."""
        self.text.open(f"for (int r = {start}; r < {stop}; r += {lanes})")
        if not self.checked:
            self.text.add("#pragma omp simd")
        self.text.open(f"for (int l = 0; l < {lanes}; l++)")
        self.text.add(f"const int i{self.order[-1]} = r + l;")
        self._loop(len(self.order), temps)
        self.text.close()
        self.text.close()

    def _finish_lanes(self, lanes: int) -> None:
        """Combine the partial results, and keep the last one."""
        for number, fold in enumerate(self.lane_folds):
            half = lanes // 2
            while half:
                if half >= 4:
                    self.text.add("#pragma omp simd")
                self.text.open(f"for (int l = 0; l < {half}; l++)")
                places = [f"lane{number}_{k}" for k in range(len(fold.values))]
                self._combine(fold.combine, [f"{p}[l]" for p in places], [f"{p}[l + {half}]" for p in places])
                self.text.close()
                half //= 2
            for k, target in enumerate(fold.targets):
                place = target if isinstance(target, str) else f"{target.name}[{self.position(fold.position)}]"
                self.text.add(f"{place} = lane{number}_{k}[0];")

    def _combine(self, combine: Combine, left: Sequence[str], right: Sequence[str]) -> None:
        """Combine two groups of places into the left one."""
        write_combine(self.text, self.writer, combine, left, right)

    # Sinks

    def _sink(self, sink: Sink) -> None:
        if isinstance(sink, Write) and sink is self._turned():
            self.text.add(f"turned[i1 * {self.nest.shape[0]} + i0] = {self.value(sink.value)};")
        elif isinstance(sink, Write):
            self.text.add(f"{sink.buffer.name}[{self.position(sink.position)}] = {self.value(sink.value)};")
        elif isinstance(sink, Store):
            self._store(sink)
        elif isinstance(sink, Atomic):
            self._atomic(sink)
        elif sink in self.lane_folds:
            number = self.lane_folds.index(sink)
            left = [f"lane{number}_{k}[l]" for k in range(len(sink.values))]
            if self.single:  # each lane has one element
                for place, value in zip(left, sink.values, strict=True):
                    self.text.add(f"{place} = {self.value(value)};")
                return
            self._combine(sink.combine, left, [self.value(value) for value in sink.values])
        else:
            self._fold(sink)

    def _fold(self, fold: Fold) -> None:
        position = self.position(fold.position)
        places = [t if isinstance(t, str) else f"{t.name}[{position}]" for t in fold.targets]
        values = [self.value(value) for value in fold.values]
        if fold.combine.identity is not None:
            self._combine(fold.combine, places, values)
            return
        self.text.open(f"if (i{fold.axis} == 0)")
        for place, value in zip(places, values, strict=True):
            self.text.add(f"{place} = {value};")
        self.text.close()
        self.text.open("else")
        self._combine(fold.combine, places, values)
        self.text.close()

    def _store(self, store: Store) -> None:
        assert isinstance(store.pointer.type, Pointer)
        pointee = store.pointer.type.pointee
        mask = "true" if store.mask is None else self.value(store.mask)
        place = self.writer.place(store.pointer, self.names)
        if self.checked:
            mask = self.writer.allowed(store.pointer, mask, store.site.number, store.site.roots, self.names)
        value = to_memory(pointee, self.value(store.value))  # type: ignore[arg-type]
        self.text.add(f"{place} = {value};" if mask == "true" else f"if ({mask}) {place} = {value};")

    def _atomic(self, atomic: Atomic) -> None:
        mask = "true" if atomic.mask is None else self.value(atomic.mask)
        if self.checked:
            site = atomic.site
            mask = self.writer.allowed(atomic.pointer, mask, site.number, site.roots, self.names)
        call = self._atomic_call(atomic)
        if atomic.target is None:
            self.text.add(f"if ({mask}) (void){call};")
            return
        whole = isinstance(atomic.target, str)
        target = atomic.target if whole else f"{atomic.target}[{self.position(atomic.position)}]"
        self.text.add(f"{target} = {mask} ? {call} : 0;")

    def _atomic_call(self, atomic: Atomic) -> str:
        """The call of the function of ``runtime.h``; exchanges go through the integers of a float's size."""
        element = atomic.value.type
        place = f"&{self.writer.place(atomic.pointer, self.names)}"
        operands = [] if atomic.compare is None else [atomic.compare]
        operands += [] if atomic.kind == "load" else [atomic.value]
        values = [to_memory(element, self.value(operand)) for operand in operands]
        if atomic.kind in {"exchange", "compare", "load"}:
            integer = f"i{element.bits}"
            if not element.is_float or element.bits < 32:
                return from_memory(element, f"tw_atomic_{atomic.kind}_{integer}({', '.join([place, *values])})")
            to, back = ("double_bits", "bits_double") if element == F64 else ("float_bits", "bits_float")
            arguments = [f"(int{element.bits}_t *)(void *){place}", *(f"tw_{to}({value})" for value in values)]
            return f"tw_{back}(tw_atomic_{atomic.kind}_{integer}({', '.join(arguments)}))"
        kind = "add" if atomic.kind == "fadd" else atomic.kind
        suffix = str(element) if element.is_float else f"i{element.bits}"
        return from_memory(element, f"tw_atomic_{kind}_{suffix}({', '.join([place, *values])})")


def write_combine(text: _Text, writer: Writer, combine: Combine, left: Sequence[str], right: Sequence[str]) -> None:
    """Write ``left = combine(left, right)`` for places."""
    text.open("")
    for variable, place in zip([*combine.left, *combine.right], [*left, *right], strict=True):
        text.add(f"const {c_type(variable.type)} {variable.attr} = {place};")
    inner: dict[Expr, str] = {}
    plain = Writer(writer.make)
    for _, e in temporaries(plain, combine.results, []):
        if e.op in _LEAVES:
            continue
        name = f"c{len(inner)}"
        text.add(f"const {c_type(e.type)} {name} = {plain.text(e, inner)};")
        inner[e] = name
    for place, result in zip(left, combine.results, strict=True):
        text.add(f"{place} = {plain.text(result, inner)};")
    text.close()


def _order(nest: Nest, writer: Writer) -> list[int]:
    """The loops from outside: the innermost one is where most accesses go on to the neighbouring element."""
    loops = list(range(len(nest.shape)))
    if len(loops) < 2 or any(isinstance(sink, Fold | Atomic) for sink in nest.sinks):
        return loops
    from tilewright.cpu.collectives import roots_of

    votes = dict.fromkeys(loops, 0)
    seen: set[Expr] = set()
    pointers: list[tuple[Expr, int]] = []
    for sink in nest.sinks:
        if isinstance(sink, Store):
            pointers.append((sink.pointer, 2))
        for root in roots_of(sink):
            pointers += [(part.args[0], 1) for part in root.walk(seen) if part.op == "load"]
    for pointer, weight in pointers:
        _, offset, _ = writer.address(pointer)
        for loop in neighbours(offset):
            if loop in votes:
                votes[loop] += weight
    best = max(loops, key=lambda loop: (votes[loop], loop))
    if votes[best] <= votes[loops[-1]] or nest.shape[best] < 8:
        return loops
    return [loop for loop in loops if loop != best] + [best]


def neighbours(offset: Expr) -> Mapping[int, None]:
    """The loops whose next step leads to the next element: those that the sum ``offset`` holds by themselves."""
    found: dict[int, None] = {}
    pending = [offset]
    while pending:
        e = pending.pop()
        if e.op == "addn":
            pending += e.args
        elif e.op == "sext" and e.args[0].op == "index":
            found[int(e.args[0].attr[1:])] = None
    return found
