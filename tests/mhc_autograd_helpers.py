"""What the tests of hyper-connections' gradients and of their operators share: calls whose tensors all are leaves."""

import math
from functools import partial

import pytest
import torch

import tilewright
from operation_helpers import TARGETS, random, serve

REFERENCE = [p for p in TARGETS if p.values[0].implementation == "reference"]
"""Those that compute in float64."""

KINDS = ("mhc_pre", "mhc_pre_broadcast", "mhc_pre_delayed", "mhc_head", "mhc_post_pre")
FUNCTIONS = (*KINDS, "mhc_post", "mhc_expand")
LEAD, N, H = (2, 3), 3, 8


def leaves(target, function, dtype=torch.float32, lead=LEAD, n=N, h=H, norm=False):
    """The tensors of a call by name, in the order of the arguments; all require a gradient."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = n if function == "mhc_head" else n * (n + 2)
    columns = h if function == "mhc_pre_broadcast" else n * h
    streams, x = ((*lead, n, h), dtype), ((*lead, h), dtype)
    layer = {"x": x, "residual": streams, "post_mix": ((*lead, n, 1), wide), "comb_mix": ((*lead, n, n), wide)}
    weights = {"fn": ((rows, columns), wide), "scale": ((1 if function == "mhc_head" else 3,), wide)}
    weights |= {"base": ((rows,), wide)}
    if norm:
        weights["norm_weight"] = ((h,), dtype)
    if function == "mhc_pre_delayed":
        weights["pre_mix"] = ((*lead, n), wide)
    first = {"mhc_post": layer, "mhc_post_pre": layer, "mhc_pre_broadcast": {"x": x}, "mhc_expand": {"x": x}}
    shapes = first.get(function, {"residual": streams})
    if function in KINDS:
        shapes = shapes | weights
    made = {
        name: random(target, *shape, dtype=kind, seed=seed) for seed, (name, (shape, kind)) in enumerate(shapes.items())
    }
    if "fn" in made:
        made["fn"] = made["fn"] / math.sqrt(columns)
    return {name: t.requires_grad_() for name, t in made.items()}


def call(target, function, tensors, **kwargs):
    """The results as a tuple, by the target's implementation, which must be the one that serves."""
    if function == "mhc_expand":
        kwargs["hc_mult"] = N
    return as_tuple(serve(target, getattr(tilewright, function), **tensors, **kwargs))


def by_reference(function):
    """The function itself, served by the reference, whatever dtype the tensors have."""
    kwargs = {"hc_mult": N} if function == "mhc_expand" else {}
    return partial(getattr(tilewright, function), impl="reference", **kwargs)


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def total(results):
    """A number in which every element of every result counts differently."""
    return sum((y.double() * torch.linspace(0.5, 2, y.numel(), device=y.device).view(y.shape)).sum() for y in results)


def gradients(target, function, tensors, **kwargs):
    return torch.autograd.grad(total(call(target, function, tensors, **kwargs)), tuple(tensors.values()))


MODES = {
    "plain": {},
    "options": {"rms_eps": 1e-2, "pre_eps": 0.0, "sinkhorn_eps": 1e-3, "post_mult": -1.5, "sinkhorn_iters": 3},
    "one iteration": {"sinkhorn_iters": 1},
    "norm": {"norm": True, "norm_eps": 1e-2},
    "recompute": {"recompute": True, "norm": True},
    "batch_invariant": {"batch_invariant": True},
    "pre_mix": {"return_pre_mix": True, "sinkhorn_iters": 2},
}


def modes(function):
    """Those that a function has."""
    foreign = {
        "mhc_head": ("recompute", "norm", "post_mult", "sinkhorn_iters", "return_pre_mix"),
        "mhc_pre_delayed": ("return_pre_mix",),
    }.get(function, ())
    return [mode for mode, kwargs in MODES.items() if not any(name in kwargs for name in foreign)]


IN_MODES = [pytest.param(f, m, id=f"{f}-{m}") for f in KINDS for m in modes(f)]
