"""AMD GPUs."""

from __future__ import annotations

from dataclasses import replace

import torch

from tilewright import settings
from tilewright.platforms import DeviceFacts

KIND = "amd"
_FNUZ = ("gfx940", "gfx941", "gfx942")


def owns(device_type: str) -> bool:
    """Whether torch's ``device_type`` means a GPU of this family: ROCm builds of torch call theirs "cuda"."""
    return device_type == "cuda" and torch.version.hip is not None


def facts(index: int | None) -> DeviceFacts:
    """The facts of GPU ``index``, the current one if None."""
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0]
    triton = "interpreted" if settings.triton_interpret() else "compiled"
    facts = DeviceFacts(KIND, arch, properties.name, properties.multi_processor_count, triton=triton)
    if arch in _FNUZ:
        return replace(facts, fp8="e4m3fnuz", fp8_formats=(*facts.fp8_formats, "e4m3fnuz"))
    return facts
