"""What the tests of rotary embedding share: targets, tensors on them, and comparisons."""

import math

import pytest
import torch

import tilewright
from tilewright import rope_table
from tilewright.testing import targets

TARGETS = [pytest.param(t, id=str(t), marks=[pytest.mark.gpu] if t.on_gpu else []) for t in targets()]
TRITON = [p for p in TARGETS if p.values[0].implementation == "triton"]
GPU_TRITON = [p for p in TRITON if p.values[0].on_gpu] or [
    pytest.param(None, marks=[pytest.mark.gpu, pytest.mark.skip(reason="no GPU on this machine")], id="no-gpu")
]


def serve(target, function, *args, **kwargs):
    """Call a public function, after making sure that the target's implementation will serve it."""
    kwargs["impl"] = target.implementation
    explained = {name: value for name, value in kwargs.items() if value is not None}
    assert tilewright.explain(function.__name__, *args, **explained).chosen == target.implementation
    return function(*args, **kwargs)


def random(target, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(target.device, dtype)


def tables(target, head_dim=16, positions=32, **kwargs):
    """A table built on the CPU, so that it is the same on every device."""
    return [table.to(target.device) for table in rope_table(head_dim, positions, device="cpu", **kwargs)]


def integers(target, *values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=target.device)


def same_bits(a, b):
    """Equal bit for bit: the sign of zero counts, a NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def pair_norms(x, interleaved=False):
    """Length of each feature's pair, at each feature, in float64."""
    x = x.double()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    norm = torch.hypot(first, second)
    return torch.stack((norm, norm), -1).flatten(-2) if interleaved else torch.cat((norm, norm), -1)


def rotated_by_hand(x, positions, inverse_frequencies):
    """NeoX rotation of ``x [tokens, H, D]`` in float64, written out for each token and pair."""
    y = x.double().clone()
    pairs = len(inverse_frequencies)
    for token, position in enumerate(positions):
        for i, frequency in enumerate(inverse_frequencies):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[token, :, i].double(), x[token, :, i + pairs].double()
            y[token, :, i] = a * c - b * s
            y[token, :, i + pairs] = b * c + a * s
    return y
