"""What can be known of a module of kernels without running it: its imports, its kernels, its constants."""

from __future__ import annotations

import ast
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
    def kernels(self) -> dict[str, ast.FunctionDef]:
        """The functions under ``@triton.jit``, at the top or inside another function, by name."""
        return {
            node.name: node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef) and any(self._is_jit(each) for each in node.decorator_list)
        }

    @cached_property
    def assignments(self) -> dict[str, ast.expr]:
        """What names at the top of the module are assigned to, where that is done once."""
        found: dict[str, ast.expr] = {}
        twice: set[str] = set()
        for node in self.tree.body:
            for name, value in _assigned(node):
                twice |= {name} & found.keys()
                found[name] = value
        return {name: value for name, value in found.items() if name not in twice}

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


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        yield node.target.id, node.value
