"""The loop program as a C file."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

from tilewright.cpu.c_expressions import FORMATS, Writer, c_type
from tilewright.cpu.c_nests import NestWriter, _Text, write_combine
from tilewright.cpu.libdevice import NATIVE
from tilewright.cpu.loops import (
    Assert,
    Assign,
    Buffer,
    Declare,
    Dot,
    Fold,
    For,
    Histogram,
    If,
    Jump,
    Label,
    Leave,
    Let,
    Loop,
    Nest,
    Print,
    Return,
    Scan,
)  # fmt: skip
from tilewright.cpu.types import I1, Pointer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilewright.cpu.expressions import Expr, Expressions
    from tilewright.cpu.loops import Program, Statement
    from tilewright.cpu.types import Element

MANY_NESTS = 16
"""A kernel with more nests than these is written as many functions."""

WORTH_THREADS = 32768
"""Launches of fewer elements run on one thread: to start the others would take longer."""

STACK_BYTES = 256 * 1024
"""Tiles lie on the stack up to this size, all together; else in memory that each thread keeps for the launch."""


@lru_cache(maxsize=2)
def header(name: str) -> str:
    """The text of a header of this package."""
    return files("tilewright.cpu").joinpath(name).read_text(encoding="utf-8")


def runtime(body: str) -> str:
    """The text that a native kernel begins with."""
    ours = (f"{name}(" for name in NATIVE.values() if name.startswith("tw_"))
    library = header("runtime_libdevice.h") if any(call in body for call in ours) else ""
    return header("runtime.h") + library


def write_program(program: Program, make: Expressions, checked: bool) -> str:
    """The kernel as a C file.

    Args:
        program: the kernel.
        make: what made its expressions.
        checked: whether every access is checked against the bounds.
    """
    return _ProgramWriter(program, make, checked).text()


class _ProgramWriter:
    def __init__(self, program: Program, make: Expressions, checked: bool) -> None:
        self.program = program
        self.make = make
        self.checked = checked
        self.out = _Text()
        self.plain = Writer(make, (), checked)
        self.functions: list[str] = []
        self.outlined = not checked and _nests(program.body) > MANY_NESTS

    def text(self) -> str:
        fields = "".join(f"    {self._field(p.type)}{p.name};\n" for p in self.program.parameters)
        head = f"struct tw_args {{\n{fields or '    char none;' + chr(10)}}};\n"
        keep = " restrict" if not self.program.aliased else ""
        for p in self.program.parameters:
            type_ = f"char *{keep} const" if isinstance(p.type, Pointer) else f"const {c_type(p.type)}"
            self.out.add(f"{type_} {p.name} = args->{p.name};")
        self.out.add("const int32_t pid0 = program[0], pid1 = program[1], pid2 = program[2];")
        self.out.add("const int32_t grid0 = grid[0], grid1 = grid[1], grid2 = grid[2];")
        scratch = self._buffers()
        for statement in self.program.body:
            self.statement(statement)
        self.out.add("(void)pid0; (void)pid1; (void)pid2; (void)grid0; (void)grid1; (void)grid2; (void)scratch;")
        body = "\n".join(self.out.lines)
        signature = (
            "static void tw_program(const struct tw_args *args, const int32_t *program, const int32_t *grid, "
            "tw_report *report, const tw_bounds *bounds, char *scratch, FILE *out)"
        )
        launch = _launch(scratch, self._prints(self.program.body), work(self.program.body))
        functions = "\n".join(self.functions)
        return f"{runtime(functions + body)}\n{head}\n{functions}\n{signature} {{\n{body}\n}}\n{launch}"

    @staticmethod
    def _field(type_: object) -> str:
        text = c_type(type_)  # type: ignore[arg-type]
        return text if text.endswith("*") else f"{text} "

    def _prints(self, statements: Sequence[Statement]) -> bool:
        for statement in statements:
            if isinstance(statement, Print):
                return True
            inner = [statement.body] if isinstance(statement, For | Loop) else []
            inner += [statement.then, statement.otherwise] if isinstance(statement, If) else []
            if any(self._prints(body) for body in inner):
                return True
        return False

    def _buffers(self) -> int:
        """Declare local memory; how many bytes of it are not on the stack."""
        sizes = [-(-max(1, b.size) * _bytes(b) // 64) * 64 for b in self.program.buffers]
        on_stack = sum(sizes) <= STACK_BYTES
        offset = 0
        for buffer, size in zip(self.program.buffers, sizes, strict=True):
            type_ = c_type(buffer.element)
            if on_stack:
                self.out.add(f"_Alignas(64) {type_} {buffer.name}[{buffer.size}];")
            else:
                self.out.add(
                    f"{type_} *restrict const {buffer.name} = "
                    f"({type_} *)__builtin_assume_aligned(scratch + {offset}, 64);"
                )
            offset += size
        return 0 if on_stack else offset

    # Statements

    def statement(self, statement: Statement) -> None:
        """Write one statement."""
        if isinstance(statement, Nest):
            lines = NestWriter(self.make, statement, self.checked).lines()
            if self.outlined and not any(isinstance(getattr(s, "target", None), str) for s in statement.sinks):
                lines = self._outlined(statement, lines)
            extra = "    " * (self.out.level - 1)
            self.out.lines += [extra + line for line in lines]
        elif isinstance(statement, Let):
            self._let(statement)
        elif isinstance(statement, Declare):
            self.out.add(f"{c_type(statement.type)} {statement.name} = 0;")
        elif isinstance(statement, Assign):
            self._assign(statement)
        elif isinstance(statement, For):
            self._for(statement)
        elif isinstance(statement, If):
            self._if(statement)
        elif isinstance(statement, Loop):
            self.out.open("for (;;)")
            self._body(statement.body)
            self.out.close()
        elif isinstance(statement, Leave):
            self.out.add(f"if (!{self.value(statement.unless)}) break;")
        elif isinstance(statement, Label):
            self.out.add(f"{statement.name}:;")
        elif isinstance(statement, Jump):
            self.out.add(f"goto {statement.label};")
        elif isinstance(statement, Return):
            self.out.add("return;")
        else:
            self._collective(statement)

    def _outlined(self, nest: Nest, lines: list[str]) -> list[str]:
        """The nest as a function of its own, and the call of it.

        Compilers take far more than twice as long for a function of twice the size, and a kernel that sorts has a
        hundred nests.
        """
        from tilewright.cpu.collectives import roots_of

        parameters: dict[str, str] = {}
        seen: set[Expr] = set()
        for sink in nest.sinks:
            if isinstance(sink, Fold) and any(isinstance(target, str) for target in sink.targets):
                return lines
            targets = (
                sink.targets if isinstance(sink, Fold) else [getattr(sink, "buffer", getattr(sink, "target", None))]
            )
            for buffer in targets:
                if isinstance(buffer, Buffer):
                    parameters[buffer.name] = f"{c_type(buffer.element)} *restrict {buffer.name}"
            own = {e.attr for e in (*sink.combine.left, *sink.combine.right)} if isinstance(sink, Fold) else set()
            for part in (part for root in roots_of(sink) for part in root.walk(seen)):
                if part.op == "element":
                    parameters[part.attr.name] = f"{c_type(part.attr.element)} *restrict {part.attr.name}"
                elif part.op == "var" and part.attr not in own:
                    parameters[part.attr] = f"{c_type(part.type)} {part.attr}"
        name = f"tw_nest_{len(self.functions)}"
        head = f"static __attribute__((noinline)) void {name}({', '.join(parameters.values())}) {{"
        self.functions.append("\n".join([head, *lines, "}"]))
        return [f"    {name}({', '.join(parameters)});"]

    def _body(self, statements: Sequence[Statement]) -> None:
        for statement in statements:
            self.statement(statement)

    def value(self, e: Expr) -> str:
        """The text of an expression outside any nest."""
        return self.plain.text(e, {})

    def _let(self, let: Let) -> None:
        type_ = c_type(let.value.type)
        spaced = type_ if type_.endswith("*") else f"{type_} "
        self.out.add(f"{spaced}{let.name} = {self.value(let.value)};")

    def _assign(self, assign: Assign) -> None:
        if len(assign.targets) == 1:
            name, value = assign.targets[0]
            self.out.add(f"{name} = {self.value(value)};")
            return
        self.out.open("")
        for name, value in assign.targets:
            type_ = c_type(value.type)
            self.out.add(f"{type_ if type_.endswith('*') else type_ + ' '}{name}_next = {self.value(value)};")
        for name, _ in assign.targets:
            self.out.add(f"{name} = {name}_next;")
        self.out.close()

    def _for(self, loop: For) -> None:
        type_ = c_type(loop.start.type)
        wide = f"uint{loop.start.type.bits}_t"
        v = loop.variable
        start, stop, step = (self.value(e) for e in (loop.start, loop.stop, loop.step))
        compared = f"({wide}){v}_stop > ({wide}){v}_start" if loop.unsigned else f"{v}_stop > {v}_start"
        self.out.open("")
        self.out.add(f"const {type_} {v}_start = {start}, {v}_stop = {stop}, {v}_step = {step};")
        # The number of rounds is known before the first, so no counter passes the end of its type.
        self.out.add(
            f"const {wide} {v}_rounds = {compared} && {v}_step != 0 ? "
            f"(({wide}){v}_stop - ({wide}){v}_start - 1) / ({wide}){v}_step + 1 : 0;"
        )
        self.out.open(f"for ({wide} {v}_round = 0; {v}_round < {v}_rounds; {v}_round++)")
        self.out.add(f"const {type_} {v} = ({type_})(({wide}){v}_start + {v}_round * ({wide}){v}_step);")
        self._body(loop.body)
        self.out.close()
        self.out.close()

    def _if(self, choice: If) -> None:
        self.out.open(f"if ({self.value(choice.condition)})")
        self._body(choice.then)
        self.out.close()
        if choice.otherwise:
            self.out.open("else")
            self._body(choice.otherwise)
            self.out.close()

    def _collective(self, statement: Statement) -> None:
        if isinstance(statement, Dot):
            self._dot(statement)
        elif isinstance(statement, Scan):
            self._scan(statement)
        elif isinstance(statement, Histogram):
            self._histogram(statement)
        elif isinstance(statement, Print):
            self._print(statement)
        elif isinstance(statement, Assert):
            self._assert(statement)
        else:
            raise AssertionError(statement)

    def _dot(self, dot: Dot) -> None:
        m, n, k = dot.m, dot.n, dot.k
        kind = {"f64": "f64", "i8": "i8"}.get(str(dot.a.element), "i32" if dot.a.element.is_int else "f32")
        step = "0"
        if dot.batch > 1:
            self.out.open(f"for (int batch = 0; batch < {dot.batch}; batch++)")
            step = "batch"
        a, b, c = (f"{x.name} + {step} * {size}" for x, size in ((dot.a, m * k), (dot.b, k * n), (dot.c, m * n)))
        add = "true" if dot.accumulate else "false"
        if kind.startswith("i"):
            unsigned = "" if kind == "i8" else "(const uint32_t *)"
            a, b, c = f"{unsigned}({a})", f"{unsigned}({b})", f"(uint32_t *)({c})"
        pairs = dot.pairs and k >= 2 and m >= 8 and n >= 32
        if pairs:
            self.out.add("#ifdef TW_HAS_PAIRS")
            self.out.open("")
            self.out.add(f"_Alignas(64) uint32_t a_packed[{m * k // 2}], b_packed[{k * n // 2}];")
            self.out.add(f"tw_dot_pairs({a}, {b}, {c}, a_packed, b_packed, {m}, {n}, {k}, {add});")
            self.out.close()
            self.out.add("#else")
        self.out.add(f"tw_dot_{kind}({a}, {b}, {c}, {m}, {n}, {k}, {add});")
        if pairs:
            self.out.add("#endif")
        if dot.batch > 1:
            self.out.close()

    def _scan(self, scan: Scan) -> None:
        outer = _product(scan.shape[: scan.axis])
        length = scan.shape[scan.axis]
        inner = _product(scan.shape[scan.axis + 1 :])
        self.out.open(f"for (int o = 0; o < {outer}; o++) for (int s = 1; s < {length}; s++)")
        step = f"({length - 1} - s)" if scan.reverse else "s"
        before = f"({length} - s)" if scan.reverse else "(s - 1)"
        self.out.open(f"for (int i = 0; i < {inner}; i++)")
        at = f"(o * {length} + {step}) * {inner} + i"
        last = f"(o * {length} + {before}) * {inner} + i"
        # What has been combined so far is the left operand.
        self.out.add(f"const int at = {at}, last = {last};")
        places = [f"{b.name}[at]" for b in scan.buffers]
        copies = [f"own{k}" for k in range(len(places))]
        for copy, place, buffer in zip(copies, places, scan.buffers, strict=True):
            self.out.add(f"const {c_type(buffer.element)} {copy} = {place};")
        for place, buffer in zip(places, scan.buffers, strict=True):
            self.out.add(f"{place} = {buffer.name}[last];")
        write_combine(self.out, self.plain, scan.combine, places, copies)
        self.out.close()
        self.out.close()

    def _histogram(self, histogram: Histogram) -> None:
        bins, values = histogram.bins, histogram.values
        self.out.add(f"for (int i = 0; i < {bins.size}; i++) {bins.name}[i] = 0;")
        mask = f"{histogram.mask.name}[i] && " if histogram.mask is not None else ""
        index = f"(uint64_t)(uint{values.element.bits}_t){values.name}[i]"
        self.out.add(
            f"for (int i = 0; i < {values.size}; i++) if ({mask}{index} < {bins.size}) {bins.name}[{values.name}[i]]++;"
        )

    def _print(self, statement: Print) -> None:
        prefix = _string(statement.prefix)
        self.out.add("#pragma omp critical(tw_print)")
        self.out.open("")
        if not statement.values:
            self.out.add(f'fprintf(out, "pid (%d, %d, %d)%s\\n", pid0, pid1, pid2, {prefix});')
        for value, signed in statement.values:
            if isinstance(value, Buffer):
                index = _index_of("i", value.shape)
                places = ", ".join(["%d"] * len(index))
                self.out.open(f"for (int i = 0; i < {value.size}; i++)")
                form, text = _printed(value.element, f"{value.name}[i]", signed, statement.hexadecimal)
                self.out.add(
                    f'fprintf(out, "pid (%d, %d, %d) idx ({places})%s{form}\\n", pid0, pid1, pid2, '
                    f"{', '.join(index)}, {prefix}, {text});"
                )
                self.out.close()
            else:
                form, text = _printed(value.type, self.value(value), signed, statement.hexadecimal)
                self.out.add(f'fprintf(out, "pid (%d, %d, %d)%s{form}\\n", pid0, pid1, pid2, {prefix}, {text});')
        self.out.close()

    def _assert(self, statement: Assert) -> None:
        condition = statement.condition
        number = statement.site.number
        if isinstance(condition, Buffer):
            self.out.add(
                f"for (int i = 0; i < {condition.size}; i++) if (!{condition.name}[i]) "
                f"{{ tw_raise(report, 1, {number}, program, i, 0); return; }}"
            )
        else:
            self.out.add(f"if (!{self.value(condition)}) {{ tw_raise(report, 1, {number}, program, 0, 0); return; }}")


def _bytes(buffer: Buffer) -> int:
    element = buffer.element
    return 4 if element.is_small_float else element.bytes


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _string(text: str) -> str:
    """A C string literal."""
    escaped = "".join(
        c if c.isascii() and c.isprintable() and c not in '\\"' else "".join(f"\\{b:03o}" for b in c.encode())
        for c in text
    )
    return f'"{escaped}"'


def _index_of(position: str, shape: Sequence[int]) -> list[str]:
    """The index in a shape of a row-major position."""
    index = []
    below = 1
    for size in reversed(shape):
        index.append(f"({position} / {below}) % {size}")
        below *= size
    return index[::-1] or ["0"]


def _printed(element: Element, text: str, signed: bool, hexadecimal: bool) -> tuple[str, str]:
    """The format and the argument that print a value; in hexadecimal all digits of its bits."""
    if isinstance(element, Pointer):
        return "%p", f"(void *){text}"
    bits = max(8, element.bits)
    if hexadecimal:
        if element.is_float:
            text = f"tw_{FORMATS.get(element) or ('double' if bits == 64 else 'float')}_bits({text})"
        return f"0x%0{bits // 4}llx", f"(unsigned long long)(uint{bits}_t){text}"
    if element.is_float:
        return "%f", f"(double){text}"
    if signed or element == I1:
        return "%lld", f"(long long){text}"
    return "%llu", f"(unsigned long long)(uint{bits}_t){text}"


def _nests(statements: Sequence[Statement]) -> int:
    """How many nests there are, in all branches and loops."""
    total = 0
    for statement in statements:
        bodies = [statement.body] if isinstance(statement, For | Loop) else []
        bodies += [statement.then, statement.otherwise] if isinstance(statement, If) else []
        total += isinstance(statement, Nest) + sum(_nests(body) for body in bodies)
    return total


def work(statements: Sequence[Statement]) -> int:
    """About how many elements a program computes; a loop is taken to run sixteen times."""
    total = 0
    for statement in statements:
        if isinstance(statement, Nest):
            total += _product(statement.shape) * len(statement.sinks)
        elif isinstance(statement, Dot):
            total += statement.batch * statement.m * statement.n * statement.k // 16
        elif isinstance(statement, Scan):
            total += _product(statement.shape) * 4
        elif isinstance(statement, For | Loop):
            total += 16 * work(statement.body)
        elif isinstance(statement, If):
            total += max(work(statement.then), work(statement.otherwise))
        else:
            total += 1
    return total


def _launch(scratch: int, prints: bool, program_work: int) -> str:
    """The function that runs the whole grid, on all threads unless there is too little to do."""
    return f"""
void tw_launch(
    const struct tw_args *args, int32_t g0, int32_t g1, int32_t g2, tw_report *report, const int64_t *ranges,
    int32_t n_ranges, char **text, size_t *text_size) {{
    const int32_t grid[3] = {{g0, g1, g2}};
    const tw_bounds bounds = {{n_ranges, ranges}};
    const int64_t total = (int64_t)g0 * g1 * g2;
    FILE *out = {"open_memstream(text, text_size)" if prints else "NULL"};
    const int64_t threads = omp_get_max_threads();
    const int64_t chunk = total / (threads * 8) > 0 ? total / (threads * 8) : 1;
    #pragma omp parallel if (total > 1 && total > {WORTH_THREADS // max(1, program_work)})
    {{
        char *scratch = {f"(char *)aligned_alloc(64, {scratch})" if scratch else "NULL"};
        #pragma omp for schedule(dynamic, chunk)
        for (int64_t p = 0; p < total; p++) {{
            const int32_t program[3] = {{(int32_t)(p % g0), (int32_t)(p / g0 % g1), (int32_t)(p / g0 / g1)}};
            if (__atomic_load_n(&report->kind, __ATOMIC_RELAXED) == 0)
                tw_program(args, program, grid, report, &bounds, scratch, out);
        }}
        free(scratch);
    }}
    if (out) fclose(out);
    (void)text; (void)text_size;
}}
"""
