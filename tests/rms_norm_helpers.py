"""What the tests of RMSNorm share: targets, tensors on them, and the formula written out."""

import pytest
import torch

import tilewright
from tilewright import ops
from tilewright.testing import targets

IMPLEMENTATIONS = {i.name for i in ops.operation("rms_norm").implementations}
TARGETS = [
    pytest.param(t, id=str(t), marks=[pytest.mark.gpu] if t.on_gpu else [])
    for t in targets()
    if t.implementation in IMPLEMENTATIONS
]
GPU_TRITON = [p for p in TARGETS if p.values[0].implementation == "triton" and p.values[0].on_gpu] or [
    pytest.param(None, marks=[pytest.mark.gpu, pytest.mark.skip(reason="no GPU on this machine")], id="no-gpu")
]
HALVES = [torch.float32, torch.bfloat16, torch.float16]


def serve(target, function, *args, **kwargs):
    """Call a public function, after making sure that the target's implementation will serve it."""
    kwargs["impl"] = target.implementation
    assert tilewright.explain(function.__name__, *args, **kwargs).chosen == target.implementation
    return function(*args, **kwargs)


def random(target, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(target.device, dtype)


def same_bits(a, b):
    """Equal bit for bit: the sign of zero counts, a NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


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
