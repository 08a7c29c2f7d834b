"""Where something stands in a kernel's source."""

from __future__ import annotations

import ast
import linecache
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True, order=True)
class Span:
    """A stretch of source text.

    Attributes:
        file: path of the file; "" if it is not known.
        line: its first line, counted from 1; 0 if it is not known.
        column: its first character, counted from 1.
        end_line: its last line.
        end_column: the character behind its last one.
    """

    file: str = ""
    line: int = 0
    column: int = 0
    end_line: int = 0
    end_column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file or "<unknown>"


@dataclass(frozen=True)
class SourceFile:
    """A file of kernels: its text, and its syntax tree.

    Attributes:
        path: where it lies, as it was named.
        text: all of it.
    """

    path: str
    text: str

    @classmethod
    def read(cls, path: str) -> SourceFile:
        """The file of this name; what was typed into a prompt or a notebook is read from Python's cache of lines."""
        cached = "".join(linecache.getlines(path))
        try:
            return cls(path, Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError):
            if cached:
                return cls(path, cached)
            raise

    @cached_property
    def lines(self) -> list[str]:
        """Its lines, without their ends, as Python counts them."""
        return re.split(r"\r\n|\r|\n", self.text)

    def line(self, number: int) -> str:
        """One line, counted from 1; "" if there is none."""
        lines = self.lines
        return lines[number - 1] if 0 < number <= len(lines) else ""

    def parse(self) -> ast.Module:
        """Its syntax tree.

        Raises:
            SyntaxError: it is not Python.
        """
        return ast.parse(self.text, self.path)

    def span(self, node: ast.AST) -> Span:
        """Where a node of its tree stands, without the body of a loop or an ``if``.

        Python counts columns in bytes, people in characters.
        """
        line, end_line = getattr(node, "lineno", 0), getattr(node, "end_lineno", None)
        if not line:
            return Span(self.path)
        end_line, end_offset = end_line or line, getattr(node, "end_col_offset", None) or 0
        if (last := _header(node)) is not None:
            end_line, end_offset = last.end_lineno or line, last.end_col_offset or 0
        column = self._characters(line, node.col_offset)  # type: ignore[attr-defined]
        end_column = self._characters(end_line, end_offset)
        return Span(self.path, line, column, end_line, end_column)

    def _characters(self, line: int, offset: int) -> int:
        return len(self.line(line).encode()[:offset].decode(errors="replace")) + 1

    def first_line_of(self, span: Span) -> Span:
        """The part of a span that lies in its first line: what a caret can underline."""
        if span.end_line <= span.line:
            return span
        return replace(span, end_line=span.line, end_column=len(self.line(span.line).rstrip()) + 1)


def _header(node: ast.AST) -> ast.expr | None:
    """The last expression of what a statement with a body begins with."""
    match node:
        case ast.If(test=last) | ast.While(test=last) | ast.For(iter=last):
            return last
    return None
