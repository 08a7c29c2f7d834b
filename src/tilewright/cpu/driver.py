"""The driver half of the back end, as Triton's plug-ins have it: the device that Triton believes is current.

Triton imports this module while it is itself half imported; see ``compiler.py``.
"""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

from triton.backends.driver import DriverBase

from tilewright import settings
from tilewright.cpu.compiler import BACKEND

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def current_device() -> tuple[str, str, bool]:
    """The processor and how it is to run kernels now."""
    return (BACKEND, settings.cpu_executor(), settings.cpu_sanitize())


class CPUDriver(DriverBase):  # type: ignore[misc]
    """The host's processor."""

    def __init__(self) -> None:
        super().__init__()
        from tilewright.cpu.launch import Launcher

        self.utils = _Utilities()
        self.launcher_cls = Launcher

    @staticmethod
    def is_active() -> bool:
        """Whether Triton is to use the processor unless told otherwise: where there is no accelerator."""
        import torch

        return not torch.accelerator.is_available()

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The C type of an argument."""
        if ty.startswith("*"):
            return "char *"
        known = {
            "i1": "bool",
            "u1": "bool",
            "fp16": "float",
            "bf16": "float",
            "fp32": "float",
            "f32": "float",
            "fp64": "double",
        }
        return known.get(ty) or f"{'u' if ty.startswith('u') else ''}int{ty[1:]}_t"

    def get_current_target(self) -> Any:
        """What kernels are compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(BACKEND, platform.machine(), 1)

    def get_current_device(self) -> tuple[str, str, bool]:
        """The current device. Triton keeps kernels by it, so it differs from other targets' and between ways to run."""
        return current_device()

    def set_current_device(self, device: Any) -> None:
        """There is one device."""

    def get_current_stream(self, device: Any = None) -> int:
        """There are no streams: a launch returns when the kernel has run."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Torch's name of the device."""
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """What ``triton.testing.do_bench`` measures with."""
        return _Interface

    def get_benchmarker(self) -> Callable[..., Any]:
        """What the autotuner measures with."""
        from triton.testing import do_bench

        return do_bench  # type: ignore[no-any-return]

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        """Memory that pushes everything else out of the caches when it is written."""
        import torch

        return torch.empty(64 * 1024 * 1024, dtype=torch.int8)

    def clear_cache(self, cache: torch.Tensor) -> None:
        """Push everything out of the caches."""
        cache.zero_()


class _Utilities:
    """What Triton asks of a device when it loads a kernel."""

    @staticmethod
    def get_device_properties(device: Any) -> dict[str, int]:
        """Limits that Triton compares a kernel's needs with; there are none."""
        return {
            "max_shared_mem": 1 << 30, "multiprocessor_count": 1, "max_num_regs": 1 << 30, "warpSize": 1,
            "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0,
        }  # fmt: skip

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: Any) -> tuple[Any, Any, int, int, int]:
        """Load a kernel: module, function, registers, spills, threads."""
        from tilewright.cpu.kernel import Kernel

        loaded = Kernel(kernel)
        return loaded, loaded, 0, 0, 1 << 30

    @staticmethod
    def unload_module(module: Any) -> None:
        """A kernel stays loaded."""


class _Event:
    """A moment on the host's clock, with the interface of torch's events."""

    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Take the time."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds until ``end``."""
        return (end.at - self.at) * 1e3


class _Interface:
    """Of torch's device interfaces as much as measuring needs."""

    Event = _Event

    @staticmethod
    def synchronize() -> None:
        """A launch has run when it returns."""

    @staticmethod
    def current_device() -> int:
        """There is one device."""
        return 0
