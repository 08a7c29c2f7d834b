"""Back ends: what a program becomes for a kind of target. A table; another target is another entry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilewright.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tilewright.npu.program import Program

__all__ = ["BACKENDS", "Backend", "backend", "emit"]


@dataclass(frozen=True)
class Backend:
    """What a program becomes for a kind of target.

    Attributes:
        name: such as ``"linalg"``.
        summary: what it is.
        artifacts: what writes each of its files, by file name; it imports what it needs when it is called.
    """

    name: str
    summary: str
    artifacts: Mapping[str, Callable[[Program], str]] = field(default_factory=dict)

    def emit(self, program: Program) -> dict[str, str]:
        """Its texts of a program by file name."""
        return {name: write(program) for name, write in self.artifacts.items()}


def _kernel_compile(program: Program) -> str:
    from tilewright.npu.backends.rbln import kernel_compile

    return kernel_compile(program)


def _linalg(program: Program) -> str:
    from tilewright.npu.backends.linalg import lower

    return lower(program)


BACKENDS = {
    each.name: each
    for each in (
        # The vendor's IR is closed, and its compiler takes the kernel's source: there is no text to lower to.
        Backend("rbln", "RBLN: the kernel's source for the vendor's compiler", {"kernel_compile.py": _kernel_compile}),
        Backend("linalg", "MLIR's linalg on tensors, in upstream dialects only", {"linalg.mlir": _linalg}),
    )
}
"""The back ends by name."""


def backend(name: str) -> Backend:
    """The back end of this name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in BACKENDS:
        raise UnknownNameError(f"there is no back end '{name}'; there are: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def emit(program: Program) -> dict[str, str]:
    """The texts that a program's own back end gives, by file name; the program's text itself is not among them.

    Raises:
        UnknownNameError: the program was compiled for a back end that there is none of.
        NpuProgramError: the program has something in it that the back end does not know.
    """
    return backend(program.manifest.backend).emit(program)
