"""NVIDIA GPUs."""

from __future__ import annotations

import torch

from tilewright import settings
from tilewright.platforms import DeviceFacts

KIND = "nvidia"


def owns(device_type: str) -> bool:
    """Whether torch's ``device_type`` means a GPU of this family. ROCm builds of torch say "cuda" too."""
    return device_type == "cuda" and torch.version.hip is None


def facts(index: int | None) -> DeviceFacts:
    """The facts of GPU ``index``, the current one if None."""
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{properties.major}{properties.minor}"
    triton = "interpreted" if settings.triton_interpret() else "compiled"
    return DeviceFacts(
        KIND,
        arch,
        properties.name,
        properties.multi_processor_count,
        triton=triton,
        fp8_saturates=True,
        limits_registers=True,
    )
