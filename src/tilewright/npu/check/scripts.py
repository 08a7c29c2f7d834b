"""MAIN_GUARD: a module that registers an operator is run again as a script whenever the operator is compiled."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from tilewright.npu.check.values import Definition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tilewright.npu.check.host import Host
    from tilewright.npu.diagnostics import Diagnostics

_VARIABLE = "RBLN_WRITE_RTOSA"
_GUARD = f'if __name__ == "__main__" and os.environ.get("{_VARIABLE}") != "1":'
_OPERATORS = "torch.ops.rbln_triton_ops."
_SETTINGS = {
    "append",
    "appendleft",
    "basicConfig",
    "clear",
    "debug",
    "define",
    "error",
    "exception",
    "extend",
    "filterwarnings",
    "getLogger",
    "impl",
    "info",
    "insert",
    "load_dotenv",
    "manual_seed",
    "pop",
    "putenv",
    "remove",
    "seed",
    "setLevel",
    "setdefault",
    "setrecursionlimit",
    "simplefilter",
    "update",
    "warn",
    "warning",
}
"""What calls at the top of a module are called that set something up, or tell something, and run nothing."""

_SETTING_PREFIXES = ("set_", "register", "_register", "enable_", "disable_", "mark_", "allow_", "attach_", "collect_")


def check_main_guard(host: Host, diagnostics: Diagnostics) -> None:
    """Report what a module that registers an operator runs whenever it is loaded as a script.

    Args:
        host: the host side of a module.
        diagnostics: where findings go.
    """
    if not host.operators:
        return
    source = host.module.source
    for node in _Script(host).unguarded(host.module.tree.body):
        if isinstance(node, ast.If):
            span = source.first_line_of(source.span(node.test))
            message = f"what stands here runs again under {_VARIABLE}=1 whenever the operator is compiled"
            diagnostics.report("MAIN_GUARD", source, span, message, _GUARD)
        else:
            span = source.first_line_of(source.span(node))
            message = f"'{_head(node)}' runs whenever the operator is compiled, as the module is run again for it"
            diagnostics.report("MAIN_GUARD", source, span, message, f"put it behind {_GUARD}")


class _Script:
    """What the statements of a module do when it is run again."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.module = host.module
        self.operators = {each.function.name for each in host.operators} | {
            host.wrapper_of(each).name for each in host.operators
        }
        self.set_up: dict[ast.AST, bool] = {}
        self.running: dict[ast.AST, bool] = {}

    def unguarded(self, body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
        """The statements with effects that run, or the whole ``if`` where its test should keep them from running."""
        for statement in body:
            if isinstance(statement, ast.If):
                yield from self._unguarded_branches(statement)
            elif isinstance(statement, ast.For | ast.While | ast.With | ast.Try):
                for inner in _bodies(statement):
                    yield from self.unguarded(inner)
            elif self._has_effect(statement):
                yield statement

    def _unguarded_branches(self, statement: ast.If) -> Iterator[ast.stmt]:
        verdict = self._test(statement.test)
        if verdict is None and _VARIABLE in ast.unparse(statement.test):
            return  # whoever asks for the variable in a way of their own means it
        if verdict is not False:
            found = list(self.unguarded(statement.body))
            if found and _asks_for_main(statement.test):
                yield statement
            else:
                yield from found
        if verdict is not True:
            yield from self.unguarded(statement.orelse)

    def _test(self, node: ast.expr) -> bool | None:
        """What a condition is when the module is run again to compile it; None if that is not known."""
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                verdict = self._test(operand)
                return None if verdict is None else not verdict
            case ast.BoolOp(op=op, values=values):
                verdicts = [self._test(each) for each in values]
                decisive = isinstance(op, ast.Or)
                if decisive in verdicts:
                    return decisive
                return None if None in verdicts else not decisive
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._comparison(left, op, right)
            case ast.Name(id=name) if name in self.module.assignments:
                return self._test(self.module.assignments[name])
        # The variable is "1" then, so that what it is, or makes, is true.
        return True if _reads_variable(node) else None

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> bool | None:
        values = {ast.unparse(left), ast.unparse(right)}
        if values == {"__name__", "'__main__'"}:
            is_equal: bool | None = True
        elif isinstance(op, ast.In | ast.NotIn) and values == {repr(_VARIABLE), "os.environ"}:
            is_equal = True
        elif any(_VARIABLE in ast.unparse(self._named(each)) for each in (left, right)):
            literal = right if isinstance(right, ast.Constant) else left
            if not isinstance(literal, ast.Constant) or not isinstance(op, ast.Eq | ast.NotEq | ast.Is | ast.IsNot):
                return None
            is_equal = literal.value in ("1", 1)
        else:
            return None
        return is_equal is isinstance(op, ast.Eq | ast.In | ast.Is)

    def _named(self, node: ast.expr) -> ast.expr:
        return self.module.assignments.get(node.id, node) if isinstance(node, ast.Name) else node

    def _has_effect(self, statement: ast.stmt) -> bool:
        if isinstance(statement, Definition | ast.ClassDef | ast.Import | ast.ImportFrom):
            return False
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            return not self._is_setting(statement.value) or self._runs(statement)
        return self._runs(statement)

    def _is_setting(self, call: ast.Call) -> bool:
        """Whether a call that stands for itself sets something up: by its name, or by what its function does."""
        if isinstance(call.func, ast.Call):
            return self._is_setting(call.func)  # such as register_fake(...)(function)
        if isinstance(call.func, ast.Name) and call.func.id in self.host.functions:
            function = self.host.functions[call.func.id]
            if function not in self.set_up:
                self.set_up[function] = True  # of a function that calls itself, the rest of it decides
                self.set_up[function] = not any(True for _ in self.unguarded(function.body))
            return self.set_up[function]
        name = _last_name(call.func)
        return name in _SETTINGS or name.startswith(_SETTING_PREFIXES)

    def _runs(self, node: ast.AST) -> bool:
        """Whether a statement calls an operator, compiles a kernel or runs a compiled model, by whatever function."""
        return any(self._is_run(each) for each in _calls(node))

    def _is_run(self, call: ast.Call) -> bool:
        function = call.func
        if isinstance(function, ast.Call) or (
            isinstance(function, ast.Name) and function.id in self.module.assignments
        ):
            made = function if isinstance(function, ast.Call) else self._named(function)
            return isinstance(made, ast.Call) and self.module.dotted(made.func) == "torch.compile"
        dotted = self.module.dotted(function)
        if dotted.startswith(_OPERATORS) or _last_name(function) == "warmup" or dotted in self.operators:
            return True
        if not isinstance(function, ast.Name) or function.id not in self.host.functions:
            return False
        inner = self.host.functions[function.id]
        if inner not in self.running:
            self.running[inner] = False
            compiles = any(
                self.module.dotted(call.func) == "torch.compile" for each in inner.body for call in _calls(each)
            )
            self.running[inner] = compiles or any(self._runs(each) for each in inner.body)
        return self.running[inner]


def _bodies(statement: ast.For | ast.While | ast.With | ast.Try) -> Iterator[list[ast.stmt]]:
    yield statement.body
    if not isinstance(statement, ast.With):
        yield statement.orelse
    if isinstance(statement, ast.Try):
        yield from (handler.body for handler in statement.handlers)
        yield statement.finalbody


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """The calls that a statement makes; what lambdas and functions in it do is left to their calls."""
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Lambda | Definition | ast.ClassDef):
            yield from _calls(child)


def _asks_for_main(test: ast.expr) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "__name__" for each in ast.walk(test))


def _reads_variable(node: ast.expr) -> bool:
    """Whether an expression is the variable, or that as a number or a truth."""
    match node:
        case ast.Call(func=ast.Name(id="bool" | "int"), args=[inner]):
            return _reads_variable(inner)
        case ast.Call(func=ast.Attribute(attr="get" | "getenv"), args=[ast.Constant(value=name), *_]):
            return bool(name == _VARIABLE)
        case ast.Subscript(slice=ast.Constant(value=name)):
            return bool(name == _VARIABLE)
    return False


def _last_name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _head(statement: ast.stmt) -> str:
    """The first words of a statement, as a message can quote them."""
    text = ast.unparse(statement).partition("\n")[0]
    return text if len(text) <= 60 else f"{text[:57]}..."
