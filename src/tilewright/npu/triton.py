"""What ``triton`` itself offers to a module of kernels: ``from tilewright.npu import triton``."""

from __future__ import annotations

from tilewright.npu import language
from tilewright.npu.kernel import JitFunction, jit

__all__ = ["JitFunction", "cdiv", "jit", "language", "next_power_of_2"]

__version__ = "3.2.0"  # the release of Triton whose language this is


def cdiv(x: int, y: int) -> int:
    """``x / y``, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()
