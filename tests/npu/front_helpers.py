"""What the tests of the front end share: kernels that others call, and what is expected of a program."""

from typing import Any

import hypothesis
import pytest
import torch

from tilewright.errors import NpuKernelError
from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.kernel import JitFunction

HEAD = "from tilewright.npu import jit, triton\nfrom tilewright.npu import language as tl\n"
"""How a file of kernels begins."""

SCALE = 0.5
ZERO, NOTHING = 0, None
SIZES = [3, 5]
WIDTH = tl.constexpr(64)

properties = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)


@jit
def row(base, at, N: tl.constexpr, C: tl.constexpr = 64):
    return tl.make_block_ptr(base, (N, C), (C, 1), (at, 0), (1, C), (1, 0))


@jit
def all_of(base, R: tl.constexpr, C: tl.constexpr = 64):
    return tl.make_block_ptr(base, (R, C), (C, 1), (0, 0), (R, C), (1, 0))


@jit
def number(table, at, N: tl.constexpr, MAX: tl.constexpr = -1):
    return rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, at), (1, 1), (1, 0)), MAX).cast(tl.int32)


def run(kernel: JitFunction, *args: Any, profile: str = "tile") -> None:
    """Compile a kernel and run it. The profile that takes most of the language is asked."""
    kernel.warmup(*args, profile=profile).run(*(each for each in args if isinstance(each, torch.Tensor)))


def computed(kernel: JitFunction, x: torch.Tensor, *rest: Any, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """What a kernel of one tensor and one output gives."""
    out = torch.full(shape or tuple(x.shape), float("nan"))
    run(kernel, x, out, *rest)
    return out


def codes(kernel: JitFunction, *args: Any, profile: str = "tile") -> list[str]:
    """What compiling a kernel finds."""
    with pytest.raises(NpuKernelError) as caught:
        kernel.warmup(*args, profile=profile)
    return [each.code for each in caught.value.diagnostics]


def exactly(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    torch.testing.assert_close(result, expected.float(), rtol=0, atol=0, equal_nan=True)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
