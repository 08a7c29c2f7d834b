"""The errors that tilewright raises.

Every message names the operation, the argument, what came, what was expected and what to do about it. Errors about
arguments are also ``ValueError`` or ``TypeError``, so that callers who know nothing of tilewright can catch them.
"""

from __future__ import annotations

from typing import Any


class TilewrightError(Exception):
    """Base class of every error that tilewright raises on purpose."""


class ArgumentError(TilewrightError, ValueError):
    """An argument has a value, shape, layout or device that the operation does not accept.

    Attributes:
        operation: name of the public function, such as ``"rope"``.
        argument: name of the offending argument, such as ``"cu_seqlens"``.
    """

    def __init__(self, operation: str, argument: str, message: str) -> None:
        super().__init__(f"{operation}: argument '{argument}': {message}")
        self.operation = operation
        self.argument = argument


class DTypeError(ArgumentError, TypeError):
    """An argument has a dtype that the operation does not accept."""


class ImplementationError(TilewrightError, RuntimeError):
    """The implementation that was asked for cannot serve this call. It is never replaced by another one silently."""


class UnknownNameError(TilewrightError, LookupError):
    """A name (of an operation, an implementation, a workload) is not known."""


class SettingError(TilewrightError, ValueError):
    """An environment variable of tilewright has a value that cannot be understood."""


class MissingDependencyError(TilewrightError, ImportError):
    """An optional package that this feature needs is missing or broken."""


class BenchmarkError(TilewrightError, RuntimeError):
    """A benchmark cannot give an honest number, for example because a provider's result is wrong."""


class KernelError(TilewrightError):
    """Base class of what goes wrong in a Triton kernel on the compiled CPU target."""


class UnsupportedKernelError(KernelError, NotImplementedError):
    """The kernel uses something that the CPU target does not support; the message points at the line."""


class KernelBuildError(KernelError, RuntimeError):
    """The C compiler rejected a kernel's native code, or the result cannot be loaded."""


class KernelAccessError(KernelError, IndexError):
    """A kernel accessed memory outside its tensors, which is checked under ``TILEWRIGHT_CPU_SANITIZE=1``."""


class KernelAssertionError(KernelError, AssertionError):
    """A ``tl.device_assert`` of a kernel failed."""


class FusionError(TilewrightError, RuntimeError):
    """A fusion that was expected did not happen."""


class NpuError(TilewrightError):
    """Base class of what goes wrong in the NPU tool chain."""


class NpuLanguageError(NpuError, RuntimeError):
    """A function of the kernel language was called outside a kernel."""


class NpuKernelError(NpuError, ValueError):
    """A kernel breaks rules of its target; every one of them is in the message, with its line.

    Attributes:
        diagnostics: what was found, warnings included.
    """

    def __init__(self, message: str, diagnostics: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.diagnostics = diagnostics


class NpuProgramError(NpuError, ValueError):
    """The text of a program cannot be read, or the program is not well-formed."""


class NpuRunError(NpuError, RuntimeError):
    """A program did something while running that the device would not forgive: a block that is not there, a clipped
    insert, an output that nobody wrote.

    Attributes:
        code: the diagnostic's code, such as ``"STRADDLE"``.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class NpuArtifactError(NpuError, ValueError):
    """A bundle is damaged, incomplete or of a version that this library does not read."""


class NpuHandoffError(NpuError, RuntimeError):
    """The vendor's compiler failed, or its result is not the CPU's.

    Attributes:
        diagnostics: the compiler's messages as far as they are understood.
    """

    def __init__(self, message: str, diagnostics: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.diagnostics = diagnostics
