"""What stands around the kernels of a module: its functions, its operators, the wrappers that compile kernels."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tilewright.npu.check.trace import Warmup, warmups
from tilewright.npu.check.values import Definition
from tilewright.npu.source import Span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilewright.npu.module import KernelModule

NAMESPACE = "rbln_triton_ops"


@dataclass(frozen=True)
class Operator:
    """A function under ``triton_op`` or ``custom_op``.

    Attributes:
        function: the function.
        name: full name of the operator, such as ``"rbln_triton_ops::add"``; "" if it is computed.
        node: the expression that gives the name.
    """

    function: Definition
    name: str
    node: ast.expr

    @property
    def namespace(self) -> str:
        """What stands before ``::``."""
        return self.name.partition("::")[0]

    @property
    def short_name(self) -> str:
        """What stands behind ``::``."""
        return self.name.partition("::")[2]


@dataclass(frozen=True)
class Host:
    """The host side of a module of kernels.

    Attributes:
        module: the module.
    """

    module: KernelModule

    @cached_property
    def functions(self) -> dict[str, Definition]:
        """The functions that are no kernels, by name; of those inside others, the ones whose name is theirs alone."""
        inner: dict[str, list[Definition]] = {}
        for node in _functions(self.module.tree):
            inner.setdefault(node.name, []).append(node)
        found = {name: nodes[0] for name, nodes in inner.items() if len(nodes) == 1}
        found |= {node.name: node for node in self.module.tree.body if isinstance(node, Definition)}
        return {name: node for name, node in found.items() if name not in self.module.kernels}

    @cached_property
    def operators(self) -> list[Operator]:
        """Its operators in the order of the source."""
        return [found for node in _functions(self.module.tree) for found in self._registered(node)]

    def wrapper_of(self, operator: Operator) -> Definition:
        """What compiles an operator: the function ``<name>_wrapper``, else the operator's own."""
        name = f"{operator.short_name}_wrapper"
        is_own = not operator.short_name or operator.function.name == name
        return operator.function if is_own else self.functions.get(name, operator.function)

    def compiled(self, function: Definition) -> list[Warmup]:
        """The kernels of the module that a function compiles."""
        if id(function) not in self._compiled:
            self._compiled[id(function)] = warmups(self.module, self.functions, function)
        return self._compiled[id(function)]

    @cached_property
    def _compiled(self) -> dict[int, list[Warmup]]:
        return {}

    @cached_property
    def names(self) -> frozenset[str]:
        """What is bound at the top of the module, in whatever way; calls of functions aside."""
        found = set(self.module.imports)
        for node in _outside_functions(self.module.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, Definition | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom):  # relative ones are not among the module's imports
                found |= {alias.asname or alias.name for alias in node.names}
        return frozenset(found)

    def kernel_of(self, operator: Operator) -> str:
        """The kernel that an operator is for: by its name, else the only one that its wrapper compiles; or ""."""
        if operator.short_name in self.module.kernels:
            return operator.short_name
        compiled = {each.kernel for each in self.compiled(self.wrapper_of(operator))}
        return compiled.pop() if len(compiled) == 1 else ""

    def text_of(self, node: ast.expr) -> str:
        """The text that an expression is; "" if that needs more than constants of the module."""
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.Name(id=name) if name in self.module.assignments:
                value = self.module.assignments[name]
                return self.text_of(value) if isinstance(value, ast.Constant) else ""
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                parts = [self.text_of(left), self.text_of(right)]
            case ast.JoinedStr(values=values):
                parts = [self.text_of(each.value if isinstance(each, ast.FormattedValue) else each) for each in values]
            case _:
                return ""
        return "".join(parts) if all(parts) else ""

    def name_span(self, function: Definition) -> Span:
        """Where a function's name stands in its definition."""
        whole = self.module.source.span(function)
        line = self.module.source.line(whole.line)
        found = re.compile(rf"\bdef\s+({re.escape(function.name)})\b").search(line, whole.column - 1)
        if found is None:
            return self.module.source.first_line_of(whole)
        return Span(whole.file, whole.line, found.start(1) + 1, whole.line, found.end(1) + 1)

    def _registered(self, function: Definition) -> Iterator[Operator]:
        for decorator in function.decorator_list:
            if not isinstance(decorator, ast.Call):
                continue
            if self.module.dotted(decorator.func).rpartition(".")[2] not in ("triton_op", "custom_op"):
                continue
            given = [*decorator.args, *(each.value for each in decorator.keywords if each.arg in ("name", "qualname"))]
            if given:
                yield Operator(function, self.text_of(given[0]), given[0])


def _functions(node: ast.AST) -> Iterator[Definition]:
    """The functions under a node in the order of the source, methods aside."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            continue
        if isinstance(child, Definition):
            yield child
        yield from _functions(child)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, Definition | ast.ClassDef | ast.Lambda):
            yield from _outside_functions(child)
