"""Errors that point at the line of the kernel that they are about."""

from __future__ import annotations

import linecache
from functools import lru_cache
from typing import TYPE_CHECKING

from tilewright.errors import UnsupportedKernelError

if TYPE_CHECKING:
    from tilewright.cpu.ttir import Location, Operation


def pointed(location: Location, message: str) -> str:
    """``file:line:column: message``, the source line with a caret below the column, and the call that led there."""
    where = location.in_user_code()
    if not where.line:
        return message
    column = max(0, where.column - _first_column())
    lines = [f"{where.file}:{where.line}:{column + 1}: {message}"]
    source = linecache.getline(where.file, where.line).rstrip("\n")
    if source.strip():
        column = min(column, len(source))
        lines += [f"    {source}", "    " + "".join("\t" if c == "\t" else " " for c in source[:column]) + "^"]
    innermost = location.frames()[0]
    if innermost.line and innermost != where:
        lines.append(f"    (through {innermost.file}:{innermost.line})")
    return "\n".join(lines)


@lru_cache(maxsize=1)
def _first_column() -> int:
    """The number of a line's first column: Triton counts from 0 up to version 3.7, from 1 after."""
    from triton import __version__

    major, minor = __version__.split(".")[:2]
    return int((int(major), int(minor)) >= (3, 8))


def unsupported(operation: Operation, reason: str) -> UnsupportedKernelError:
    """The error for an operation that cannot be lowered."""
    return UnsupportedKernelError(pointed(operation.location, f"the CPU target does not support {reason}"))
