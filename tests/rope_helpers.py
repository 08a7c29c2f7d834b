"""What the tests of rotary embedding share: targets, tensors on them, and comparisons."""

import math

import torch

from operation_helpers import GPU_TRITON, TARGETS, TRITON, random, same_bits, serve
from tilewright import rope_table

__all__ = ["GPU_TRITON", "TARGETS", "TRITON", "random", "same_bits", "serve"]


def tables(target, head_dim=16, positions=32, **kwargs):
    """A table built on the CPU, so that it is the same on every device."""
    return [table.to(target.device) for table in rope_table(head_dim, positions, device="cpu", **kwargs)]


def integers(target, *values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=target.device)


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
