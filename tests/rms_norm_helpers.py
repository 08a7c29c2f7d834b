"""What the tests of RMSNorm share: targets, tensors on them, and the formula written out."""

import pytest
import torch

from operation_helpers import GPU_TRITON, TARGETS, random, same_bits, serve

__all__ = ["GPU_TRITON", "TARGETS", "random", "same_bits", "serve"]

HALVES = [torch.float32, torch.bfloat16, torch.float16]


def wide(x):
    """A tensor as arithmetic sees it: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def plain_norm(x, eps=1e-6):
    """The norm without a weight, not rounded."""
    z = wide(x)
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)


def double(*tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def needs_memory(target, gibibytes):
    free, _ = torch.cuda.mem_get_info(target.device)
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of device memory")
