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
from tilewright.npu.front import arithmetic, branches
from tilewright.npu.front.scope import PYTHON
from tilewright.npu.front.values import (
    DYN_IF_HINT,
    UNDECIDED,
    UNKNOWN,
    Argument,
    Block,
    Flag,
    Foreign,
    Function,
    Index,
    Method,
    Origin,
    Runtime,
    Tensor,
    Undefined,
)
from tilewright.npu.language.core import Builtin, constexpr, dtype
from tilewright.npu.symbols import Symbolic, less

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xdsl.ir import Operation, SSAValue

    from tilewright.npu.diagnostics import Diagnostics
    from tilewright.npu.front.builder import Builder
    from tilewright.npu.front.scope import Scope
    from tilewright.npu.shapes import Shape

MAX_UNROLLED = 65536
_MAX_DEPTH = 32
_PROGRAM_ID = {"program_id", "num_programs"}


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class Interpreter:
    """One pass over a kernel.

    Attributes:
        diagnostics: what is found.
        builder: what the program is built with; None if it is only checked.
        names: what local names stand for.
        scope: what the others stand for.
        flash_tiles: the flash attention tiles seen so far.
        recomputes: how often partitions were put together.
        incomplete: calls that are not in the program that is built, as something in them is not known.
        skips: the partitions that may be skipped: where that is asked, by which index, and the operation.
    """

    def __init__(self, scope: Scope, diagnostics: Diagnostics, builder: Builder | None = None) -> None:
        self.scope = scope
        self.diagnostics = diagnostics
        self.builder = builder
        self.names: dict[str, Any] = {}
        self.flash_tiles: list[ast.AST] = []
        self.recomputes = 0
        self.incomplete: list[ast.AST] = []
        self.skips: list[tuple[ast.AST, Index, Operation]] = []
        self._depth = 0

    # What is found

    def report(self, code: str, node: ast.AST, message: str, hint: str = "") -> None:
        """Note that a rule is broken at a node."""
        source = self.scope.module.source
        self.diagnostics.report(code, source, source.span(node), message, hint)

    # What is built

    def emit(self, node: ast.AST, make: Callable[[], Operation], *operands: Any) -> Sequence[SSAValue | None]:
        """Add an operation to the program, if one is built and all operands are in it.

        Returns:
            Its results; of an operation that is not built, as many Nones as anyone takes.
        """
        if self.builder is None or any(getattr(each, "value", None) is None for each in operands):
            return (None, None, None)
        return self.builder.add(make(), self.scope.module.source.span(node)).results

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
        return Tensor(shape, of, Origin(name, node, tensors), value)

    # Statements

    def run(self, body: list[ast.stmt]) -> None:
        """Interpret statements in their order."""
        for statement in body:
            self._statement(statement)

    def call_body(self, function: ast.FunctionDef) -> Any:
        """Interpret a function's body; its value is what it returns."""
        try:
            self.run(function.body)
        except _Return as result:
            return result.value
        return None

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                result = self.evaluate(value)
                for target in targets:
                    self._assign(target, result)
            case ast.AnnAssign(target=target, value=value):
                if value is not None:
                    self._assign(target, self.evaluate(value))
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                left = self._name(ast.copy_location(ast.Name(name, ast.Load()), target))
                self.names[name] = arithmetic.binary(self, node, op, left, self.evaluate(value))
            case ast.Expr(value=value):
                self.evaluate(value)
            case ast.For():
                self._for(node)
            case ast.While():
                self.report("RANGE", node, "a while loop runs as often as the device says", "tl.static_range(...)")
                self._assume_unknown(node.body)
            case ast.If():
                branches.conditional(self, node)
            case ast.Return(value=value):
                raise _Return(None if value is None else self.evaluate(value))
            case ast.Assert(test=test):
                self.static_assert(node, self.evaluate(test), ast.unparse(test))
            case ast.Pass():
                pass
            case _:
                kind = type(node).__name__
                self.report("SYNTAX", node, f"a kernel has no statement of this kind ({kind})")
                self._assume_unknown([node])

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                hint = getattr(value, "value", None)
                if hint is not None and hasattr(hint, "name_hint") and hint.name_hint is None:
                    hint.name_hint = name
                self.names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = list(value) if isinstance(value, tuple) else None
                if values is not None and len(values) != len(targets):
                    self.report("SYNTAX", target, f"{len(targets)} names for {len(values)} values")
                    values = None
                for index, each in enumerate(targets):
                    self._assign(each, values[index] if values is not None else UNKNOWN)
            case _:
                self.report("SYNTAX", target, "only names can be assigned to")

    def static_assert(self, node: ast.AST, truth: Any, text: str, message: str = "") -> None:
        """Report a static_assert that does not hold; one that depends on sizes without values is believed."""
        known = not isinstance(truth, Runtime | Tensor | Index | Flag | Argument | Block)
        if not known:
            self.report("STATIC_ASSERT", node, f"static_assert({text}): only the device could know")
        elif truth not in (UNKNOWN, UNDECIDED) and not truth:
            self.report(
                "STATIC_ASSERT", node, f"static_assert({text}) does not hold{': ' + message if message else ''}"
            )

    def _assume_unknown(self, body: list[ast.stmt]) -> None:
        """Forget the names that statements assign which are not interpreted."""
        for statement in body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    self.names[node.id] = UNKNOWN

    # Loops

    def _for(self, node: ast.For) -> None:
        values = self._iterated(node)
        if values is None:
            self._assume_unknown([node])
            return
        for value in values:
            self._assign(node.target, value)
            self.run(node.body)
        self.run(node.orelse)

    def _iterated(self, node: ast.For) -> list[Any] | None:
        """The values of a loop's variable; None if they cannot be known."""
        call = node.iter
        callee = self.evaluate(call.func) if isinstance(call, ast.Call) else None
        loop = callee.name if isinstance(callee, Builtin) else "range" if callee is range else ""
        if not isinstance(call, ast.Call) or loop not in {"static_range", "range"}:
            if callee is not UNKNOWN:
                self.report("RANGE", node.iter, "a loop that is not tl.static_range", "for i in tl.static_range(...):")
            if callee is None and isinstance(values := self.evaluate(call), tuple):
                return list(values)
            return None
        if loop == "range":
            name = ast.unparse(call.func)
            arguments = ", ".join(ast.unparse(each) for each in call.args)
            self.report("RANGE", call, f"{name} is a loop of the device", f"tl.static_range({arguments})")
        given = [self.evaluate(each) for each in call.args]
        given += [self.evaluate(each.value) for each in call.keywords if each.arg in {"arg2", "step"}]
        if any(isinstance(each, Tensor | Index | Argument | Block | Flag | Runtime) for each in given):
            self.report("RANGE", call, "the bounds of a loop are constexprs", "a tl.constexpr parameter as the bound")
            return None
        if UNKNOWN in given or not 0 < len(given) <= 3:
            return None
        return self._counted(call, given)

    def _counted(self, call: ast.Call, given: list[Any]) -> list[Any] | None:
        start, stop, step = (0, given[0], 1) if len(given) == 1 else (*given, 1)[:3]
        if all(isinstance(each, int) for each in (start, stop, step)):
            if step == 0:
                self.report("RANGE", call, "a step of 0")
                return None
            values = range(start, stop, step)
            if len(values) > MAX_UNROLLED:
                self.report("RANGE", call, f"a loop of {len(values)} steps; at most {MAX_UNROLLED} can be unrolled")
                return None
            return list(values)
        later = f"{ast.unparse(call)}@{call.lineno}"
        least = start + step if isinstance(start, int) and isinstance(step, int) else start
        bound = least if isinstance(least, int) else 1
        return [start, Symbolic.atom(later, max(bound, 0))]

    # Expressions

    def evaluate(self, node: ast.expr) -> Any:
        """The value of an expression."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name():
                return self._name(node)
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
                return self.evaluate(body if truth else orelse) if truth is not UNDECIDED else UNKNOWN
            case ast.Attribute(value=value, attr=name):
                return self._attribute(node, self.evaluate(value), name)
            case ast.Subscript(value=value, slice=index):
                return self._subscript(node, self.evaluate(value), self.evaluate(index))
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(*(None if each is None else self.evaluate(each) for each in (lower, upper, step)))
            case ast.Call():
                return self._call(node)
            case ast.JoinedStr():
                return UNKNOWN  # a message of static_print or static_assert
        self.report("SYNTAX", node, f"a kernel has no expression of this kind ({type(node).__name__})")
        return UNKNOWN

    def _name(self, node: ast.Name) -> Any:
        if node.id in self.names:
            value = self.names[node.id]
            if isinstance(value, Undefined):
                self.report("NAME", node, f"'{node.id}' {value.why}")
                return UNKNOWN
            return value
        try:
            return self.scope.lookup(node.id)
        except NameError:
            self.report("NAME", node, f"'{node.id}' is not defined")
            return UNKNOWN

    def _compare(self, node: ast.Compare) -> Any:
        left = self.evaluate(node.left)
        result: Any = True
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.evaluate(comparator)
            one = arithmetic.compare(self, node, op, left, right)
            if len(node.ops) == 1:
                return one
            if one is UNKNOWN or not isinstance(one, bool):
                return one if one is not UNDECIDED else UNDECIDED
            result, left = result and one, right
        return result

    def _junction(self, op: ast.boolop, values: list[ast.expr]) -> Any:
        decisive = isinstance(op, ast.Or)
        result: Any = not decisive
        for each in values:
            value = self.truth(each, self.evaluate(each))
            if value is UNDECIDED:
                result = UNDECIDED
            elif value is decisive:
                return decisive
        return result

    def truth(self, node: ast.expr, value: Any) -> Any:
        """True, False or UNDECIDED; what only the device could know is reported."""
        if isinstance(value, Tensor | Index | Flag | Runtime | Argument | Block):
            message = "this is known on the device only; it cannot choose what is computed"
            self.report("DYN_IF", node, message, DYN_IF_HINT)
            return UNDECIDED
        if value in (UNKNOWN, UNDECIDED) or isinstance(value, Foreign):
            return UNDECIDED
        if isinstance(value, Symbolic):
            return True if less(0, value) else UNDECIDED
        return bool(value)

    def _subscript(self, node: ast.Subscript, value: Any, index: Any) -> Any:
        if isinstance(value, tuple) and isinstance(index, int | slice):
            try:
                return value[index]
            except IndexError:
                self.report("SYNTAX", node, f"there is no element {index} in a tuple of {len(value)}")
                return UNKNOWN
        if isinstance(value, Tensor):
            return self._index_tensor(node, value, index)
        if value is not UNKNOWN and index is not UNKNOWN:
            self.report("SYNTAX", node, "only tuples and shapes can be indexed")
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
        return self._builtin(node, language.FUNCTIONS["reshape"], [value, (*shape, *rest)], {})

    def _attribute(self, node: ast.Attribute, value: Any, name: str) -> Any:
        match value:
            case _ if value in (UNKNOWN, UNDECIDED):
                return UNKNOWN
            case Tensor() if name == "T":
                return self._builtin(node, language.FUNCTIONS["trans"], [value], {})
            case Tensor() if name in {"shape", "dtype", "type"}:
                return getattr(value, name)
            case Block() | Argument() if name in {"type", "dtype"}:
                return value.type
            case Tensor() | Index() | Block() | Argument():
                return Method(value, name)
            case Foreign(dotted=dotted):
                return Foreign(f"{dotted}.{name}")
            case int() | float() | Symbolic() if name == "value":
                return value
        try:
            found = getattr(value, name)
        except AttributeError:
            if getattr(value, "__name__", "").startswith("tilewright.npu"):
                self.report("UNSUPPORTED_OP", node, f"{ast.unparse(node)} is no part of the language")
            else:
                self.report("SYNTAX", node, f"{ast.unparse(node.value)} has no '{name}'")
            return UNKNOWN
        return found.value if isinstance(found, constexpr) else found

    # Calls

    def _call(self, node: ast.Call) -> Any:
        callee = self.evaluate(node.func)
        args: list[Any] = []
        for each in node.args:
            if isinstance(each, ast.Starred):
                several = self.evaluate(each.value)
                if not isinstance(several, tuple):
                    return UNKNOWN
                args += several
            else:
                args.append(self.evaluate(each))
        kwargs = {each.arg: self.evaluate(each.value) for each in node.keywords if each.arg}
        from tilewright.npu.kernel import JitFunction

        match callee:
            case _ if callee is UNKNOWN:
                return UNKNOWN
            case Builtin():
                return self._builtin(node, callee, args, kwargs)
            case Method(receiver=receiver, name=name):
                return self._method(node, receiver, name, args, kwargs)
            case Function():
                return self._inline(node, callee, args, kwargs)
            case JitFunction():
                return self._inline(node, Function(callee.module, callee.node, callee.scope), args, kwargs)
            case dtype():
                return args[0] if len(args) == 1 else UNKNOWN
            case type() if callee is constexpr:
                return args[0] if args else UNKNOWN
            case Foreign(dotted=dotted):
                self.report("SYNTAX", node, f"{dotted} cannot be called in a kernel")
                return UNKNOWN
        return self._python(node, callee, args, kwargs)

    def _python(self, node: ast.Call, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """A function of Python, or of ``triton`` itself, of values that are known."""
        from tilewright.npu import triton

        known = {id(each): name for name, each in PYTHON.items()}
        allowed = id(callee) in known or callee in (triton.cdiv, triton.next_power_of_2)
        if not allowed:
            self.report("SYNTAX", node, f"{ast.unparse(node.func)} cannot be called in a kernel")
            return UNKNOWN
        if any(value in (UNKNOWN, UNDECIDED) for value in (*args, *kwargs.values())):
            return UNKNOWN
        if any(isinstance(value, Tensor | Index | Flag | Block | Argument) for value in (*args, *kwargs.values())):
            name = known.get(id(callee), "")
            hint = {"max": "tl.maximum", "min": "tl.minimum", "abs": "tl.abs"}.get(name, "")
            self.report("SYNTAX", node, f"{ast.unparse(node.func)} is Python's, and takes constexprs", hint)
            return UNKNOWN
        try:
            result = callee(*args, **kwargs)
        except (TypeError, ValueError, AttributeError) as error:
            if not any(isinstance(value, Symbolic) for value in (*args, *kwargs.values())):
                self.report("SYNTAX", node, f"{ast.unparse(node)}: {error}")
            return UNKNOWN
        return tuple(result) if isinstance(result, list | range) else result

    def _method(self, node: ast.Call, receiver: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in {"to", "cast"}:
            from tilewright.npu.front import operations

            return operations.cast(self, node, receiver, *args, **kwargs)
        function = language.FUNCTIONS.get(name)
        if isinstance(receiver, Tensor) and function is not None:
            return self._builtin(node, function, [receiver, *args], kwargs)
        self.report("UNSUPPORTED_OP", node, f"'{name}' is no method of {ast.unparse(_receiver(node))}")
        return UNKNOWN

    def _builtin(self, node: ast.expr, function: Builtin, args: list[Any], kwargs: dict[str, Any]) -> Any:
        from tilewright.npu.front import operations, special

        if function.signature is None:
            self._refuse(node, function)
            return UNKNOWN
        try:
            bound = function.signature.bind(*args, **kwargs)
        except TypeError as error:
            self.report("SYNTAX", node, f"{function}: {error}")
            return UNKNOWN
        bound.apply_defaults()
        handlers: dict[str, Callable[..., Any]] = (
            special.HANDLERS if function.namespace == "rblib" else operations.HANDLERS
        )
        if function.namespace == "tl":
            operations.judge(self, node, function)
        result = handlers[function.name](self, node, *bound.args, **bound.kwargs)
        if self.builder is not None and not _is_complete(result):
            self.incomplete.append(node)
        return result

    def _refuse(self, node: ast.expr, function: Builtin) -> None:
        if function.name in _PROGRAM_ID:
            message = f"{function} has no meaning: the device runs one program, over all of the tensors"
            self.report("PROGRAM_ID", node, message, "tl.static_range over the blocks")
        else:
            self.report("UNSUPPORTED_OP", node, f"{function} is not supported by any release")

    def _inline(self, node: ast.Call, function: Function, args: list[Any], kwargs: dict[str, Any]) -> Any:
        parameters = function.node.args
        names = [each.arg for each in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, default in _defaults(parameters):
            if name not in given:
                given[name] = constant(default, function.scope)
        if len(args) > len(names) or set(given) != set(names):
            self.report("SYNTAX", node, f"{function.node.name} takes {', '.join(names)}")
            return UNKNOWN
        if self._depth >= _MAX_DEPTH:
            self.report("SYNTAX", node, f"calls of {function.node.name} are nested more than {_MAX_DEPTH} deep")
            return UNKNOWN
        with self._frame(function.scope, given):
            return self.call_body(function.node)

    @contextmanager
    def _frame(self, scope: Scope, names: dict[str, Any]) -> Iterator[None]:
        outer = self.scope, self.names
        self.scope, self.names = scope, names
        self._depth += 1
        try:
            yield
        finally:
            self.scope, self.names = outer
            self._depth -= 1


def constant(node: ast.expr, scope: Scope) -> Any:
    """The value of an expression of literals; unknown if it is anything else."""
    from tilewright.npu.diagnostics import Diagnostics
    from tilewright.npu.profiles import profile

    silent = Diagnostics(profile())
    value = Interpreter(scope, silent).evaluate(node)
    return UNKNOWN if silent.errors else value


def _is_complete(result: Any) -> bool:
    """Whether what a function gave is in the program."""
    if isinstance(result, tuple):
        return all(_is_complete(each) for each in result)
    return result is not UNKNOWN and (not isinstance(result, Tensor | Index | Flag) or result.value is not None)


def _defaults(parameters: ast.arguments) -> list[tuple[str, ast.expr]]:
    positional = [*parameters.posonlyargs, *parameters.args]
    tail = positional[len(positional) - len(parameters.defaults) :]
    pairs = [(each.arg, value) for each, value in zip(tail, parameters.defaults, strict=True)]
    named = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    return pairs + [(each.arg, value) for each, value in named if value is not None]


def _receiver(node: ast.Call) -> ast.expr:
    return node.func.value if isinstance(node.func, ast.Attribute) else node.func
