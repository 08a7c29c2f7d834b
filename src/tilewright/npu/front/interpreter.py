"""A kernel's source, statement by statement, with sizes that are numbers or symbols and tensors that are only typed.

Constexprs are folded, ``static_range`` is unrolled, a run-time ``if`` becomes a region with yields. Everything that
breaks a rule is reported, and interpretation goes on with what can be assumed, so that all of it is reported at once.
With numbers for all sizes the program is built meanwhile; with symbols nothing is built, and a loop whose end is not
known runs twice: for its first value, and for any later one.
"""

from __future__ import annotations

import ast
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tilewright.npu import language
from tilewright.npu.front import arithmetic, branches, calls, loops
from tilewright.npu.front.paths import Choices, NoSuchWay
from tilewright.npu.front.scope import plain
from tilewright.npu.front.values import (
    DYN_IF_HINT,
    FLOAT,
    UNDECIDED,
    UNKNOWN,
    Argument,
    Block,
    Flag,
    Foreign,
    Index,
    Method,
    Origin,
    Return,
    Runtime,
    Tensor,
    Undefined,
    guess,
)
from tilewright.npu.module import constexpr_names, is_constexpr
from tilewright.npu.symbols import Symbolic, less

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xdsl.ir import Operation, SSAValue

    from tilewright.npu.diagnostics import Diagnostics
    from tilewright.npu.front.builder import Builder
    from tilewright.npu.front.scope import Scope
    from tilewright.npu.front.values import Function
    from tilewright.npu.language.core import dtype
    from tilewright.npu.shapes import Shape
    from tilewright.npu.source import SourceFile, Span

_OF_SHAPES = {"SHAPE", "DOT_SHAPE"}
"""The rules about the shapes of tensors, which nothing is said about where these are guessed."""


class Interpreter:
    """One pass over a kernel.

    Attributes:
        diagnostics: what is found.
        builder: what the program is built with; None if it is only checked.
        names: what local names stand for.
        sizes: the local names that the source says are constexprs.
        scope: what the others stand for.
        returned: what the function that is interpreted may have returned already.
        flash_tiles: the flash attention tiles seen so far.
        recomputes: how often partitions were put together.
        inlined: the functions that were interpreted where they are called.
        incomplete: what is not in the program that is built, as something in it is not known.
        skips: the partitions that may be skipped: where that is asked, by which index, and the operation.
        choices: what is assumed of constexprs without values.
        depth: how many functions are interpreted inside of each other.
        endless: names of functions that call themselves without an end.
        steps: how many steps loops have had.
        loops: how often each loop was begun whose end is not known.
    """

    def __init__(
        self, scope: Scope, diagnostics: Diagnostics, builder: Builder | None = None, choices: Choices | None = None
    ) -> None:
        self.scope = scope
        self.diagnostics = diagnostics
        self.builder = builder
        self.names: dict[str, Any] = {}
        self.sizes: set[str] = set()
        self.returned: list[Any] = []
        self.flash_tiles: list[ast.AST] = []
        self.recomputes = 0
        self.inlined: set[int] = set()
        self.incomplete: list[ast.AST] = []
        self.skips: list[tuple[ast.AST, Index, Operation]] = []
        self.choices = choices or Choices(open=False)
        self.depth = 0
        self.endless: set[str] = set()
        self._assigned: set[str] = set()
        self._guessing = False
        self.steps = 0
        self.loops: dict[str, int] = {}
        self._kernel = scope.module.source
        self._elsewhere: dict[int, SourceFile] = {}

    # What is found

    def report(self, code: str, node: ast.AST, message: str, hint: str = "") -> None:
        """Note that a rule is broken at a node."""
        if self._guessing and code in _OF_SHAPES:
            return
        source = self._source(node)
        self.diagnostics.report(code, source, source.span(node), message, hint)

    def span(self, node: ast.AST) -> Span:
        """Where a node stands."""
        return self._source(node).span(node)

    def line(self, node: ast.AST) -> str:
        """The line that it begins in."""
        return self._source(node).line(self.span(node).line)

    def _source(self, node: ast.AST) -> SourceFile:
        """The file of a node: the kernel's, if it is not that of a function which the kernel calls."""
        return self._elsewhere.get(id(node), self._kernel)

    # What is built

    def emit(self, node: ast.AST, make: Callable[[], Operation], *operands: Any) -> Sequence[SSAValue | None]:
        """Add an operation to the program, if one is built and all operands are in it.

        Returns:
            Its results; of an operation that is not built, as many Nones as anyone takes.
        """
        if self.builder is None or any(getattr(each, "value", None) is None for each in operands):
            return (None, None, None)
        return self.builder.add(make(), self.span(node)).results

    def tensor(
        self,
        node: ast.AST,
        name: str,
        shape: Shape,
        operands: tuple[Any, ...],
        make: Callable[[], Operation],
        of: dtype = language.float32,
    ) -> Tensor:
        """The tensor that an operation gives."""
        value = self.emit(node, make, *operands)[0]
        tensors = tuple(each for each in operands if isinstance(each, Tensor))
        return Tensor(shape, of, Origin(name, node, tensors), value, any(each.guessed for each in tensors))

    @contextmanager
    def judging(self, *operands: Any) -> Iterator[None]:
        """Report no shapes that do not fit while one of the operands has a shape that is only guessed."""
        before = self._guessing
        self._guessing = before or any(isinstance(each, Tensor) and each.guessed for each in operands)
        try:
            yield
        finally:
            self._guessing = before

    def leave_out(self, node: ast.AST) -> None:
        """Note that something is not in the program that is built, so that none is made."""
        if self.builder is not None:
            self.incomplete.append(node)

    @contextmanager
    def unbuilt(self, node: ast.AST) -> Iterator[None]:
        """Interpret for what can be found only: nobody knows whether, or how often, the device runs this."""
        self.leave_out(node)
        builder, self.builder = self.builder, None
        try:
            yield
        finally:
            self.builder = builder

    # Functions

    def call_body(self, function: ast.FunctionDef) -> Any:
        """Interpret a function's body; its value is what it returns."""
        outer, self.returned = (self.returned, self._assigned), []
        self._assigned = {each.id for each in ast.walk(function) if isinstance(each, ast.Name) and _is_stored(each)}
        result = None
        try:
            self.run(function.body)
        except Return as end:
            result = end.value
        finally:
            before = self.returned
            self.returned, self._assigned = outer
        for each in before:
            result = branches.common(function, each, result)
        return result

    @contextmanager
    def frame(self, function: Function, names: dict[str, Any]) -> Iterator[None]:
        """Interpret another function, with these names for its parameters."""
        self.inlined.add(id(function.node))
        source = function.module.source
        if source.path != self._kernel.path and id(function.node) not in self._elsewhere:
            self._elsewhere |= {id(node): source for node in ast.walk(function.node)}
        outer = self.scope, self.names, self.sizes
        self.scope, self.names, self.sizes = function.scope, names, constexpr_names(function.node)
        self.depth += 1
        try:
            yield
        finally:
            self.scope, self.names, self.sizes = outer
            self.depth -= 1

    # Statements

    def run(self, body: list[ast.stmt]) -> None:
        """Interpret statements in their order."""
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                result = self.evaluate(value)
                for target in targets:
                    self.assign(target, result)
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                if value is not None:
                    self.assign(target, self.evaluate(value))
                if isinstance(target, ast.Name) and is_constexpr(annotation):
                    self.sizes.add(target.id)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                self.assign(target, arithmetic.binary(self, node, op, self._name(target, name), self.evaluate(value)))
            case ast.Expr(value=value):
                self.evaluate(value)
            case ast.For():
                loops.loop(self, node)
            case ast.While():
                self.report("RANGE", node, "a while loop runs as often as the device says", "tl.static_range(...)")
                loops.once(self, node)
            case ast.If():
                branches.conditional(self, node)
            case ast.Return(value=value):
                raise Return(node, None if value is None else self.evaluate(value))
            case ast.Assert(test=test):
                self.static_assert(node, self.evaluate(test), ast.unparse(test))
            case ast.Pass():
                pass
            case _:
                kind = type(node).__name__
                self.report("SYNTAX", node, f"a kernel has no statement of this kind ({kind})")
                self.leave_out(node)
                self.forget(node)

    def assign(self, target: ast.expr, value: Any) -> None:
        """Give a value to a name, or the elements of a tuple to several."""
        match target:
            case ast.Name(id=name):
                if self.builder is not None and isinstance(value, Tensor | Index) and value.value is not None:
                    self.builder.name(value.value, name)
                self.names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = list(value) if isinstance(value, tuple) else None
                if values is None and value not in (UNKNOWN, UNDECIDED) and not isinstance(value, Symbolic):
                    self.report("SYNTAX", target, f"{len(targets)} names for what is no tuple")
                elif values is not None and len(values) != len(targets):
                    self.report("SYNTAX", target, f"{len(targets)} names for {len(values)} values")
                    values = None
                for index, each in enumerate(targets):
                    self.assign(each, values[index] if values is not None else UNKNOWN)
            case _:
                self.report("SYNTAX", target, "only names can be assigned to")
                self.leave_out(target)
                self.forget(target)

    def static_assert(self, node: ast.AST, truth: Any, text: str, message: str = "") -> None:
        """Report a static_assert that does not hold; one that depends on sizes without values is believed."""
        known = not isinstance(truth, Runtime | Tensor | Index | Flag | Argument | Block)
        if not known:
            self.report("STATIC_ASSERT", node, f"static_assert({text}): only the device could know")
        elif truth not in (UNKNOWN, UNDECIDED, FLOAT) and not truth:
            if self.choices.made and self.choices.open:
                raise NoSuchWay
            self.report(
                "STATIC_ASSERT", node, f"static_assert({text}) does not hold{': ' + message if message else ''}"
            )

    def forget(self, node: ast.AST) -> None:
        """Forget the names that a statement assigns which is not interpreted, or as often as nobody knows."""
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and _is_stored(each):
                value: Any = self.names.get(each.id)
                tensor = isinstance(value, Tensor)
                self.names[each.id] = guess(value.origin, value.shape, value.dtype) if tensor else UNKNOWN

    # Expressions

    def evaluate(self, node: ast.expr) -> Any:
        """The value of an expression."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return tuple(self.evaluate(each) for each in elements)
            case ast.BinOp(left=left, op=op, right=right):
                return arithmetic.binary(self, node, op, self.evaluate(left), self.evaluate(right))
            case ast.UnaryOp(op=op, operand=operand):
                return arithmetic.unary(self, node, op, self.evaluate(operand))
            case ast.Compare():
                return self._compare(node)
            case ast.BoolOp(op=op, values=values):
                return self._junction(op, values)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                truth = self.truth(test, self.evaluate(test))
                if truth is not UNDECIDED:
                    return self.evaluate(body if truth else orelse)
                with self.unbuilt(node):
                    return branches.common(node, self.evaluate(body), self.evaluate(orelse))
            case ast.Attribute(value=value, attr=name):
                return self._attribute(node, self.evaluate(value), name)
            case ast.Subscript(value=value, slice=index):
                return self._subscript(node, self.evaluate(value), self.evaluate(index))
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(*(None if each is None else self.evaluate(each) for each in (lower, upper, step)))
            case ast.Call():
                return calls.call(self, node)
            case ast.JoinedStr(values=values):
                return self._text(values)
        self.report("SYNTAX", node, f"a kernel has no expression of this kind ({type(node).__name__})")
        return UNKNOWN

    def _name(self, node: ast.AST, name: str) -> Any:
        if name in self.names:
            value = self.names[name]
            if isinstance(value, Undefined):
                self.report("NAME", node, f"'{name}' {value.why}")
                return UNKNOWN
            return value
        try:
            return self.scope.lookup(name)
        except NameError:
            if not self.choices.made or name not in self._assigned:  # else it is where other choices are made
                self.report("NAME", node, f"'{name}' is not defined")
            return UNKNOWN

    def _text(self, values: list[ast.expr]) -> Any:
        """An f-string, most often a message."""
        parts = []
        for each in values:
            part = self.evaluate(each.value if isinstance(each, ast.FormattedValue) else each)
            if part in (UNKNOWN, UNDECIDED, FLOAT) or (isinstance(each, ast.FormattedValue) and each.format_spec):
                return UNKNOWN
            shows = isinstance(each, ast.FormattedValue) and each.conversion == ord("r")
            parts.append(repr(part) if shows else str(part))
        return "".join(parts)

    def _compare(self, node: ast.Compare) -> Any:
        left = self.evaluate(node.left)
        result: Any = True
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.evaluate(comparator)
            one = arithmetic.compare(self, node, op, left, right)
            if len(node.ops) == 1:
                return one
            if isinstance(one, Tensor | Flag | Runtime):
                self.report("SYNTAX", node, "what only the device knows is compared with one other thing at a time")
                return UNDECIDED
            if one in (UNKNOWN, UNDECIDED):
                result = UNDECIDED
            elif not one:
                return False
            left = right
        return result

    def _junction(self, op: ast.boolop, values: list[ast.expr]) -> Any:
        """``and``, ``or``: as in Python the value that decides, and the others are not evaluated."""
        decisive = isinstance(op, ast.Or)
        undecided = False
        value: Any = None
        for each in values:
            value = self.evaluate(each)
            truth = self.truth(each, value)
            if truth is UNDECIDED:
                undecided = True
            elif truth is decisive:
                return decisive if undecided and self.builder is None else UNDECIDED if undecided else value
        return UNDECIDED if undecided else value

    def truth(self, node: ast.AST, value: Any) -> Any:
        """True, False or UNDECIDED; what only the device could know is reported."""
        if isinstance(value, Tensor | Index | Flag | Runtime | Argument | Block):
            message = "this is known on the device only; it cannot choose what is computed"
            self.report("DYN_IF", node, message, DYN_IF_HINT)
            return UNDECIDED
        if value in (UNKNOWN, UNDECIDED, FLOAT) or isinstance(value, Foreign):
            return UNDECIDED
        if isinstance(value, Symbolic):
            if less(0, value) and not value.is_name:
                return True
            is_false = self.choices.ask("==", value, 0)  # a parameter may be a switch
            return UNDECIDED if is_false is None else not is_false
        return bool(value)

    def _subscript(self, node: ast.Subscript, value: Any, index: Any) -> Any:
        if isinstance(value, Tensor):
            return self._index_tensor(node, value, index)
        bounds = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
        if any(isinstance(each, Symbolic) or each is UNKNOWN for each in (value, *bounds)):
            return UNKNOWN
        if isinstance(value, tuple) and isinstance(index, int | slice):
            try:
                return value[index]
            except IndexError:
                self.report("SYNTAX", node, f"there is no element {index} in a tuple of {len(value)}")
                return UNKNOWN
            except TypeError:
                pass
        self.report("SYNTAX", node, "only tuples and shapes can be indexed, by integers")
        return UNKNOWN

    def _index_tensor(self, node: ast.Subscript, value: Tensor, index: Any) -> Any:
        """``x[:, None]``: new dimensions of size 1."""
        parts = index if isinstance(index, tuple) else (index,)
        whole = sum(part == slice(None) for part in parts)
        if any(part is not None and part != slice(None) for part in parts) or whole > len(value.shape):
            self.report(
                "UNSUPPORTED_OP", node, "elements of a tensor cannot be addressed", "tl.reshape, tl.expand_dims"
            )
            return UNKNOWN
        rest = iter(value.shape)
        shape = tuple(1 if part is None else next(rest) for part in parts)
        return calls.builtin(self, node, language.FUNCTIONS["reshape"], [value, (*shape, *rest)], {})

    def _attribute(self, node: ast.Attribute, value: Any, name: str) -> Any:
        match value:
            case _ if value in (UNKNOWN, UNDECIDED, FLOAT):
                return value if name == "value" else UNKNOWN
            case Tensor() if name == "T":
                return calls.builtin(self, node, language.FUNCTIONS["trans"], [value], {})
            case Tensor() if name in {"shape", "dtype", "type"}:
                return getattr(value, name)
            case Block() | Argument() if name in {"type", "dtype"}:
                return value.type
            case Tensor() | Index() | Block() | Argument() | Flag() | Runtime():
                return Method(value, name)
            case Foreign(dotted=dotted):
                return Foreign(f"{dotted}.{name}")
            case int() | float() | str() | Symbolic() if name == "value":
                return value
        try:
            return plain(getattr(value, name))
        except AttributeError:
            if getattr(value, "__name__", "").startswith("tilewright.npu"):
                self.report("UNSUPPORTED_OP", node, f"{ast.unparse(node)} is no part of the language")
            else:
                self.report("SYNTAX", node, f"{ast.unparse(node.value)} has no '{name}'")
            return UNKNOWN


def _is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def constant(node: ast.expr, scope: Scope) -> Any:
    """The value of an expression of literals; unknown if it is anything else."""
    from tilewright.npu.diagnostics import Diagnostics
    from tilewright.npu.profiles import profile

    silent = Diagnostics(profile())
    value = Interpreter(scope, silent).evaluate(node)
    broken = {each.code for each in silent.all} - {"PARTITION_DIV"}  # a rule for kernels, not for a module's numbers
    return UNKNOWN if broken else value
