"""Neural processing units. Rebellions' torch extension calls its devices "rbln"."""

from __future__ import annotations

from tilewright.platforms import DeviceFacts

KIND = "npu"


def owns(device_type: str) -> bool:
    """Whether torch's ``device_type`` means an NPU."""
    return device_type == "rbln"


def facts(index: int | None) -> DeviceFacts:
    """The facts of an NPU; torch says nothing more of it."""
    return DeviceFacts(KIND)
