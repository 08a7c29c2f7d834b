"""Where an operation can be tested on this machine."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tilewright.platforms import facts

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Target:
    """An implementation on a device."""

    implementation: str
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether the device is no CPU."""
        return self.device.type != "cpu"

    def __str__(self) -> str:
        return f"{self.implementation}-{self.device.type}"


def targets() -> tuple[Target, ...]:
    """Every target that this machine has: the reference, Triton where it runs on the CPU, and the accelerator."""
    found = [Target("reference", torch.device("cpu"))]
    if facts(torch.device("cpu")).triton:
        found.append(Target("triton", torch.device("cpu")))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
        found += [Target("reference", device), Target("triton", device)]
    return tuple(found)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that torch hands out uninitialised with NaN, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
