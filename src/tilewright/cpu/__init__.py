"""The compiled CPU target: an out-of-tree back end for a stock Triton that runs kernels on CPU tensors as native code.

Triton finds it through an entry point; importing tilewright does not load it. Where there is no accelerator it is
Triton's default; elsewhere :func:`active` switches to it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["active"]


@contextmanager
def active() -> Iterator[None]:
    """Make the processor Triton's device in this block, whatever accelerator the machine has.

    Triton has one current driver for the whole process, so this holds for all threads.

    Example:
        >>> import tilewright.cpu
        >>> with tilewright.cpu.active():
        ...     pass  # kernel[grid](...) takes CPU tensors here
    """
    from triton.backends import Backend, backends
    from triton.runtime import driver

    from tilewright.cpu.compiler import BACKEND, CPUBackend
    from tilewright.cpu.driver import CPUDriver

    # Where tilewright runs without having been installed there is no entry point for Triton to find.
    backends.setdefault(BACKEND, Backend(CPUBackend, CPUDriver))
    before = driver._active
    driver.set_active(CPUDriver())
    try:
        yield
    finally:
        driver._active = before
