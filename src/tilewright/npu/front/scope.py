"""What the names of a kernel's module stand for: read from the file alone, or from the function that is loaded."""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from tilewright.npu.front.values import UNKNOWN, Foreign, Function
from tilewright.npu.language.core import constexpr
from tilewright.npu.module import KernelModule, language_object, of_language

if TYPE_CHECKING:
    from collections.abc import Callable

PYTHON: dict[str, Callable[..., Any]] = {
    name: getattr(builtins, name)
    for name in ("abs", "bool", "float", "int", "len", "list", "max", "min", "range", "tuple")
}
"""The functions of Python that a kernel may call with values that are known when it is compiled."""


class Scope(Protocol):
    """Where a kernel's global names are looked up."""

    module: KernelModule

    def lookup(self, name: str) -> Any:
        """What a name stands for. Raises :class:`NameError` if it stands for nothing."""


@dataclass
class FileScope:
    """The names of a module that is read and not run: imports, kernels, and constants that are literals.

    Attributes:
        module: the module.
        nested: whether the kernel stands inside another function, whose names cannot be seen.
    """

    module: KernelModule
    nested: bool = False
    _known: dict[str, Any] = field(default_factory=dict)

    def lookup(self, name: str) -> Any:
        """What a name stands for; unknown where only running the module could tell."""
        if name not in self._known:
            self._known[name] = UNKNOWN  # while it is looked up, against a name that is defined by itself
            self._known[name] = self._lookup(name)
        return self._known[name]

    def _lookup(self, name: str) -> Any:
        module = self.module
        if name in module.kernels:
            return Function(module, module.kernels[name], self)
        if name in module.imports:
            dotted = module.imports[name]
            if (found := language_object(dotted)) is not None:
                return found
            return UNKNOWN if of_language(dotted) else Foreign(dotted)
        if name in module.assignments:
            return self._constant(module.assignments[name])
        if name in PYTHON:
            return PYTHON[name]
        if self.nested or name in _defined(module.tree):
            return UNKNOWN
        raise NameError(name)

    def _constant(self, node: ast.expr) -> Any:
        """The value of a module's constant, where it is made of literals."""
        from tilewright.npu.front.interpreter import constant

        return constant(node, self)


@dataclass
class LiveScope:
    """The names of a function that is loaded: its closure, its module's globals, Python's functions."""

    module: KernelModule
    function: FunctionType

    def lookup(self, name: str) -> Any:
        """What a name stands for."""
        return self._language(self._find(name))

    def _find(self, name: str) -> Any:
        closure = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        if name in closure:
            try:
                return closure[name].cell_contents
            except ValueError:
                raise NameError(name) from None
        if name in self.function.__globals__:
            return self.function.__globals__[name]
        if name in PYTHON:
            return PYTHON[name]
        raise NameError(name)

    @staticmethod
    def _language(value: Any) -> Any:
        if isinstance(value, constexpr):
            return value.value
        if isinstance(value, ModuleType):
            found = language_object(value.__name__)
            return value if found is None else found
        return value


def _defined(tree: ast.Module) -> set[str]:
    """Every name that a module binds somewhere at its top."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return found
