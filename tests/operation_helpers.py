"""What the tests of all operations share: targets, tensors on them, and comparisons."""

import pytest
import torch

import tilewright
from tilewright.testing import targets

TARGETS = [pytest.param(t, id=str(t), marks=[pytest.mark.gpu] if t.on_gpu else []) for t in targets()]
TRITON = [p for p in TARGETS if p.values[0].implementation == "triton"]
GPU_TRITON = [p for p in TRITON if p.values[0].on_gpu] or [
    pytest.param(None, marks=[pytest.mark.gpu, pytest.mark.skip(reason="no GPU on this machine")], id="no-gpu")
]


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
