"""The environment variables that tilewright reads, all of them, each when it is asked for and never at import."""

from __future__ import annotations

import os

from tilewright.errors import SettingError

CHECK_DEVICE_VALUES = "TILEWRIGHT_CHECK_DEVICE_VALUES"
"""``1``: also check values that lie in device memory (``cu_seqlens``, positions), at the price of a synchronisation."""

TRITON_INTERPRET = "TRITON_INTERPRET"
"""Triton's own switch: ``1`` runs its kernels in its interpreter. Triton reads it when it is imported."""

CPU_SANITIZE = "TILEWRIGHT_CPU_SANITIZE"
"""``1``: kernels of the compiled CPU target check every access against the storages of their tensors."""

CPU_EXECUTOR = "TILEWRIGHT_CPU_EXECUTOR"
"""``native`` or ``interpreter``: what runs kernels of the compiled CPU target. Without a C compiler the latter."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


def flag(name: str, default: bool = False) -> bool:
    """Read a boolean environment variable.

    Raises:
        SettingError: the value is neither a yes nor a no.
    """
    raw = os.environ.get(name)
    if raw is None:
        return default
    value = raw.strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise SettingError(f"environment variable {name}={raw!r}: expected 1 or 0")


def check_device_values() -> bool:
    """Whether values in device memory are checked before a launch (:data:`CHECK_DEVICE_VALUES`)."""
    return flag(CHECK_DEVICE_VALUES)


def triton_interpret() -> bool:
    """Whether Triton kernels run in Triton's interpreter (:data:`TRITON_INTERPRET`), by Triton's reading of it."""
    return os.environ.get(TRITON_INTERPRET, "").lower() in {"1", "true", "on", "y", "yes"}


def cpu_sanitize() -> bool:
    """Whether kernels on the CPU check their accesses (:data:`CPU_SANITIZE`)."""
    return flag(CPU_SANITIZE)


def cpu_executor() -> str:
    """What is to run kernels on the CPU (:data:`CPU_EXECUTOR`).

    Raises:
        SettingError: there is no such executor.
    """
    value = os.environ.get(CPU_EXECUTOR, "native").strip().lower()
    if value not in {"native", "interpreter"}:
        raise SettingError(f"environment variable {CPU_EXECUTOR}={value!r}: expected native or interpreter")
    return value
