"""What can be known of a module of kernels without running it: its imports, its kernels, its constants."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilewright.npu.source import SourceFile

_OURS = "tilewright.npu"
_STAND_FOR = {
    "rebel.triton": f"{_OURS}.triton",
    "triton": f"{_OURS}.triton",
    "rebel.triton.language": f"{_OURS}.language",
    "rebel.triton.language.math": f"{_OURS}.language",
    "triton.language": f"{_OURS}.language",
    "triton.language.math": f"{_OURS}.language",
    "rebel.triton.language.extra.rbln.libdevice": f"{_OURS}.language.rblib",
    f"{_OURS}.rblib": f"{_OURS}.language.rblib",
    _OURS: _OURS,
    f"{_OURS}.triton": f"{_OURS}.triton",
    f"{_OURS}.language": f"{_OURS}.language",
    f"{_OURS}.language.rblib": f"{_OURS}.language.rblib",
}
"""The modules of the language by the names that kernels import them under, and what each is here."""


@dataclass(frozen=True)
class KernelModule:
    """A module of kernels, as its syntax tree shows it.

    Attributes:
        source: its file.
        tree: its syntax tree.
    """

    source: SourceFile
    tree: ast.Module

    @cached_property
    def imports(self) -> dict[str, str]:
        """What each imported name stands for: ``{"tl": "rebel.triton.language"}``. Imports may stand anywhere."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        found[alias.asname] = alias.name
                    else:
                        top = alias.name.partition(".")[0]
                        found[top] = top
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        return found

    @cached_property
    def functions(self) -> list[ast.FunctionDef]:
        """The functions under ``@triton.jit``, at the top or inside another function."""
        return [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef) and any(self._is_jit(each) for each in node.decorator_list)
        ]

    @cached_property
    def kernels(self) -> dict[str, ast.FunctionDef]:
        """Those functions by name; of several of one name the last one."""
        return {node.name: node for node in self.functions}

    @cached_property
    def assignments(self) -> dict[str, ast.expr]:
        """What names at the top of the module are assigned to, where that is done once and nowhere else."""
        bound = Counter(_bound(self.tree))
        return {name: value for node in self.tree.body for name, value in _assigned(node) if bound[name] == 1}

    @cached_property
    def names(self) -> set[str]:
        """Every name that the module binds; ``"*"`` is among them if it imports all of another's."""
        return set(_bound(self.tree))

    @cached_property
    def enclosing(self) -> set[str]:
        """The names of the functions that kernels stand in: what they stand for is known when they run."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = {id(each) for each in ast.walk(node)} - {id(node)}
                if any(id(each) in inside for each in self.functions):
                    found |= set(_bound(node)) | {each.arg for each in _arguments(node.args)}
        return found - self.imports.keys()

    def dotted(self, node: ast.expr) -> str:
        """The full name of what an expression names, such as ``"rebel.triton.jit"``; "" if it names nothing."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            before = self.dotted(node.value)
            return f"{before}.{node.attr}" if before else ""
        return ""

    def language_object(self, node: ast.expr) -> Any:
        """What of the kernel language an expression names (a function, a dtype, a module); None if nothing of it."""
        return language_object(self.dotted(node))

    def _is_jit(self, decorator: ast.expr) -> bool:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        dotted = self.dotted(target)
        imported = dotted.partition(".")[0] in {each.partition(".")[0] for each in self.imports.values()}
        # `triton` may be the parameter of a function that makes kernels: what is not imported is judged by its name.
        return dotted.rpartition(".")[2] == "jit" and (of_language(dotted) or not imported)


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """A kernel's parameters in their order."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def constexpr_names(function: ast.FunctionDef) -> set[str]:
    """Which of a kernel's parameters are constexprs, by their annotations."""
    return {each.arg for each in parameters(function) if is_constexpr(each.annotation)}


def is_constexpr(annotation: ast.expr | None) -> bool:
    """Whether an annotation is ``tl.constexpr``, under any name of the module that it is of."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value.rpartition(".")[2] == "constexpr"
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", "")
    return name == "constexpr"


def language_object(dotted: str) -> Any:
    """What a full name means in the kernel language; None for what is not of it."""
    if dotted in _STAND_FOR:
        return import_module(_STAND_FOR[dotted])
    home, _, name = dotted.rpartition(".")
    if home not in _STAND_FOR:
        return None
    return getattr(import_module(_STAND_FOR[home]), name, None)


def of_language(dotted: str) -> bool:
    """Whether a full name is one of the language's modules, or lies in one, known there or not."""
    return dotted in _STAND_FOR or dotted.rpartition(".")[0] in _STAND_FOR


def _bound(scope: ast.AST) -> Iterator[str]:
    """Every name that a module or a function binds or changes, as often as it does; functions may do that too."""
    for node in _of_scope(scope):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                yield name
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.alias():
                yield node.asname or node.name.partition(".")[0]
            case ast.ExceptHandler(name=str(name)):
                yield name
    if isinstance(scope, ast.Module):
        for node in ast.walk(scope):
            match node:
                case ast.Global(names=names):
                    yield from names
                case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                    yield name
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append" | "extend" | "insert" | "pop")):
                    yield name


def _of_scope(scope: ast.AST) -> Iterator[ast.AST]:
    """What stands in a module or function, and not in a function or class inside of it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _of_scope(node)


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    several = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *several]


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        yield node.target.id, node.value
