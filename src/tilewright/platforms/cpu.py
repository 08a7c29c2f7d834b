"""The host's processor."""

from __future__ import annotations

import os
import platform
import shutil
from functools import lru_cache
from importlib.util import find_spec

from tilewright import settings
from tilewright.platforms import DeviceFacts

KIND = "cpu"


def owns(device_type: str) -> bool:
    """Whether torch's ``device_type`` means the host."""
    return device_type == "cpu"


def facts(index: int | None) -> DeviceFacts:
    """The facts of the host; ``index`` means nothing here."""
    triton, note = _triton()
    return DeviceFacts(KIND, platform.machine(), "", os.cpu_count() or 1, triton, note, fp8_saturates=True)


def _triton() -> tuple[str, str]:
    """How Triton kernels run on the host, and what is to be said of it."""
    import torch

    if settings.triton_interpret():
        return "interpreted", ""
    if find_spec("triton") is None:
        return "", "Triton is not installed"
    if torch.accelerator.is_available():
        return "", "on a machine with an accelerator Triton serves that"
    if settings.cpu_executor() == "interpreter":
        return "interpreted", f"interpreted on the CPU ({settings.CPU_EXECUTOR}=interpreter), slow and for tests"
    if c_compiler() is None:
        return "interpreted", "interpreted on the CPU, as there is no C compiler (gcc or clang, or what CC names); slow"
    return "compiled", "compiled for the CPU by tilewright's own target"


@lru_cache(maxsize=1)
def c_compiler() -> str | None:
    """The path of the C compiler: ``$CC`` if that is set, else gcc, cc or clang; None if there is none."""
    asked = os.environ.get("CC")
    candidates = [asked] if asked else ["gcc", "cc", "clang"]
    return next((found for name in candidates if (found := shutil.which(name))), None)
