"""SELF_CONTAINED: a module is compiled again alone, so it has to have all that its wrappers use."""

from __future__ import annotations

import ast
import builtins
from typing import TYPE_CHECKING

from tilewright.npu.check.values import Definition

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilewright.npu.check.host import Host
    from tilewright.npu.diagnostics import Diagnostics

_OF_EVERY_MODULE = frozenset(dir(builtins)) | {"__file__", "__spec__", "__loader__", "__package__", "__path__"}
_FALLS_BACK = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def check_self_contained(host: Host, diagnostics: Diagnostics) -> None:
    """Report relative imports, and names that wrappers use and the module does not have.

    Names in kernels are the affair of the rule NAME, which sees them where the kernel is interpreted.

    Args:
        host: the host side of a module.
        diagnostics: where findings go.
    """
    source = host.module.source
    used = _used(host)
    for statement in _imports_that_run(host.module.tree, used):
        package = "." * statement.level + (statement.module or "")
        message = f"a relative import from '{package}': the module is compiled again alone, outside its package"
        hint = "import it by its full name, or define what is needed here"
        diagnostics.report("SELF_CONTAINED", source, source.first_line_of(source.span(statement)), message, hint)
    if any(alias.name == "*" for node in ast.walk(host.module.tree) for alias in _aliases(node)):
        return  # nobody knows which names there are
    known = host.names | _OF_EVERY_MODULE | _declared_global(host.module.tree)
    for function in used:
        around = _bound_around(host.module.tree, function)
        for name in _free_names(function):
            if name.id not in known | around:
                message = f"'{function.name}' uses '{name.id}', which the module does not have"
                hint = "import or define it in this module"
                diagnostics.report("SELF_CONTAINED", source, source.span(name), message, hint)


def _used(host: Host) -> list[Definition]:
    """The wrappers and operators of a module, and the functions of the module that they call."""
    found: list[Definition] = []
    waiting = [each for operator in host.operators for each in (operator.function, host.wrapper_of(operator))]
    while waiting:
        function = waiting.pop()
        if any(function is each for each in found):
            continue
        found.append(function)
        names = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
        waiting.extend(node for name, node in host.functions.items() if name in names)
    return sorted(found, key=lambda each: each.lineno)


def _imports_that_run(node: ast.AST, used: list[Definition]) -> Iterator[ast.ImportFrom]:
    """The relative imports that run when a module is loaded alone, or in one of the functions that are used."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.level:
            yield child
        elif not _is_left_out(child, used):
            yield from _imports_that_run(child, used)


def _is_left_out(node: ast.AST, used: list[Definition]) -> bool:
    """Whether imports in a statement do not run, or may fail."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return not any(node is each for each in used)
        case ast.If(test=test):
            return "TYPE_CHECKING" in ast.unparse(test)
        case ast.Try(handlers=handlers):
            return any(_catches_imports(each) for each in handlers)
    return False


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    return any(isinstance(each, ast.Name) and each.id in _FALLS_BACK for each in ast.walk(handler.type))


def _bound_around(tree: ast.Module, function: Definition) -> set[str]:
    """The names of the functions that a function stands in."""
    return {
        name
        for outer in ast.walk(tree)
        if isinstance(outer, Definition) and outer is not function
        if any(each is function for each in ast.walk(outer))
        for node in ast.walk(outer)
        for name in _bound(node)
    }


def _declared_global(tree: ast.Module) -> set[str]:
    return {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}


def _aliases(node: ast.AST) -> list[ast.alias]:
    return node.names if isinstance(node, ast.Import | ast.ImportFrom) else []


def _free_names(function: Definition) -> Iterator[ast.Name]:
    """The names that the body of a function reads and that nothing in it binds, whatever part of it does."""
    bound = {name for node in ast.walk(function) for name in _bound(node)}
    seen: set[str] = set()
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id not in bound | seen:
                seen.add(node.id)
                yield node


def _bound(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name
        case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in aliases)
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.MatchMapping(rest=str(name)):
            yield name
