"""The host's processor."""

from __future__ import annotations

import os
import platform

from tilewright import settings
from tilewright.platforms import DeviceFacts

KIND = "cpu"


def owns(device_type: str) -> bool:
    """Whether torch's ``device_type`` means the host."""
    return device_type == "cpu"


def facts(index: int | None) -> DeviceFacts:
    """The facts of the host; ``index`` means nothing here."""
    triton = "interpreted" if settings.triton_interpret() else ""
    return DeviceFacts(KIND, platform.machine(), "", os.cpu_count() or 1, triton)
