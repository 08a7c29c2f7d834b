"""What the names of a kernel's module stand for: read from the file alone, or from the function that is loaded."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from tilewright.npu.front.values import UNKNOWN, Foreign, Function
from tilewright.npu.language.core import constexpr
from tilewright.npu.module import KernelModule, language_object, of_language

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable

PYTHON: dict[str, Callable[..., Any]] = {
    name: getattr(builtins, name)
    for name in ("abs", "bool", "float", "int", "len", "list", "max", "min", "range", "tuple")
}
"""The functions of Python that a kernel may call with values that are known when it is compiled."""


_USUAL = {
    "tl": "triton.language",
    "triton": "triton",
    "rblib": "rebel.triton.language.extra.rbln.libdevice",
}
"""What these names stand for where they are a parameter of a function that makes kernels, or are set later."""


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
        nested: whether the kernel stands inside another function; what that one's names stand for cannot be seen.
    """

    module: KernelModule
    nested: bool = False
    _known: dict[str, Any] = field(default_factory=dict)

    def lookup(self, name: str) -> Any:
        """What a name stands for; unknown where only running the module could tell."""
        if name not in self._known:
            self._known[name] = UNKNOWN  # while it is looked up, against a name that is defined by itself
            found = self._lookup(name)
            if found is UNKNOWN and name in _USUAL:
                found = language_object(_USUAL[name])
            self._known[name] = found
        return self._known[name]

    def _lookup(self, name: str) -> Any:
        module = self.module
        if name in module.kernels:
            return Function(module, module.kernels[name], self)
        if self.nested and name in module.enclosing:
            return UNKNOWN
        if name in module.imports:
            dotted = module.imports[name]
            if (found := language_object(dotted)) is not None:
                return found
            return UNKNOWN if of_language(dotted) else Foreign(dotted)
        if name in module.assignments:
            return self._constant(module.assignments[name])
        if name in module.names:
            return UNKNOWN
        try:
            return _python(name)
        except NameError:
            if "*" in module.names:
                return UNKNOWN
            raise

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
        return plain(self._find(name))

    def _find(self, name: str) -> Any:
        closure = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        if name in closure:
            try:
                return closure[name].cell_contents
            except ValueError:
                raise NameError(name) from None
        if name in self.function.__globals__:
            return self.function.__globals__[name]
        return _python(name)


def plain(value: Any) -> Any:
    """A value of Python as a kernel has it: constexprs unwrapped, lists as tuples, modules of the language."""
    if isinstance(value, constexpr):
        return plain(value.value)
    if isinstance(value, list):
        return tuple(plain(each) for each in value)
    if isinstance(value, ModuleType):
        found = language_object(value.__name__)
        return value if found is None else found
    return value


def _python(name: str) -> Any:
    """A name of Python itself: a function that kernels may call, or one that they may not."""
    if name in PYTHON:
        return PYTHON[name]
    if hasattr(builtins, name):
        return Foreign(name)
    raise NameError(name)
