"""Calls that stay within one chunk of the interpreter's stack.

CPython keeps Python frames in chunks of 16 KiB. A function that is called again and again where a chunk ends has the
next one mapped and unmapped at every call, which takes a hundred times as long as the call, until the releases of 2026
(https://github.com/python/cpython/issues/142183). Compilers call deep, so that some of their innermost functions often
stand there: with Python 3.11, 16 decoder layers compiled on a CPU in 28.6 s instead of 35.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

_WORDS = 17_000
"""A frame of so many takes a chunk of 256 KiB, the next power of two; some hundred frames have room in what is left.

An exception that is kept keeps the frame, of 133 KiB.
"""


def roomy(run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on a fresh chunk of the stack, which all that it calls fits into."""
    return run(*args, **kwargs)


roomy.__code__ = roomy.__code__.replace(co_stacksize=_WORDS)
