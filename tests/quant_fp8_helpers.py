"""What the tests of FP8 quantisation share: targets, tensors on them, and tables of codes."""

from functools import partial

import torch

import operation_helpers
from operation_helpers import TARGETS, serve
from tilewright import QuantFormat

__all__ = ["TARGETS", "serve"]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PACKED = {"scale_format": "ue8m0_packed", "scale_layout": "tma_aligned"}
MX = QuantFormat(32, "ue8m0")
random = partial(operation_helpers.random, dtype=torch.bfloat16)


def codes_of(dtype):
    """Every finite value of an FP8 dtype, ascending, in float64; zero once."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return torch.unique(values[values.isfinite()])


def nearest(x, dtype):
    """The code nearest to each element of ``x``, found in the table of all codes in float64."""
    codes = codes_of(dtype).to(x.device)
    upper = torch.searchsorted(codes, x).clamp(1, len(codes) - 1)
    low, high = codes[upper - 1], codes[upper]
    return torch.where(x - low < high - x, low, high)


def half_steps(values):
    """Half the distance from each code to its farther neighbour, in float64."""
    codes = codes_of(values.dtype).to(values.device)
    gaps = codes.diff()
    wide = torch.maximum(torch.cat((gaps[:1], gaps)), torch.cat((gaps, gaps[-1:])))
    return wide[torch.searchsorted(codes, values.double())] / 2


def spread(scales, group_size, n_cols):
    """The scale of each element."""
    return scales.repeat_interleave(group_size or n_cols, -1)[..., :n_cols]
