"""Gradients of rotary embedding, what autograd saves for them, and rotation in place under its eyes."""

import pytest
import torch
import torch.utils.checkpoint

from rope_helpers import TARGETS, integers, random, same_bits, serve, tables
from tilewright import numerics, rope, rope_from_angles, rope_qk, rope_table
from tilewright.errors import ArgumentError, TilewrightError

MODES = [
    {},
    {"interleaved": True, "offsets": 3},
    {"inverse": True},
    {"rotary_dim": 4, "rotary_offset": 2},
    {"layout": "bhsd", "position_ids": [1, 0, -1]},
]


# Gradients.


def with_positions(target, kwargs):
    return {n: integers(target, *v) if isinstance(v, list) else v for n, v in kwargs.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("function", ["rope", "rope_qk", "rope_from_angles", "inplace"])
def test_gradients_of_gradients(target, kwargs, function):
    kwargs = with_positions(target, kwargs)
    heads_first = kwargs.get("layout") == "bhsd"
    shapes = [(1, 2, 3, 8), (1, 1, 3, 8)] if heads_first else [(1, 3, 2, 8), (1, 3, 1, 8)]
    q, k = (random(target, *shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    width = 4 if "rotary_dim" in kwargs else 8  # un-duplicated: each member of a pair has its own column
    angles = random(target, 8, width, dtype=torch.float64, seed=5)
    if kwargs.get("inverse"):  # an invertible one
        angles = angles[:, : width // 2]
    cos, sin = angles.cos(), angles.sin()
    calls = {
        "rope": (lambda q: serve(target, rope, q, cos, sin, **kwargs), (q,)),
        "rope_qk": (lambda q, k: tuple(serve(target, rope_qk, q, k, cos, sin, **kwargs)), (q, k)),
        "rope_from_angles": (lambda q: serve(target, rope_from_angles, q, angles, **kwargs), (q,)),
        "inplace": (
            lambda q, k: tuple(serve(target, rope_qk, q * q, k * k, cos, sin, inplace=True, **kwargs)),
            (q, k),
        ),
    }
    call, leaves = calls[function]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_saves_tables_alone(target, inplace):
    q, k = random(target, 2, 5, 3, 16).requires_grad_(), random(target, 2, 5, 1, 16).requires_grad_()
    cos, sin = tables(target)
    position_ids = integers(target, 4, 3, 2, 1, 0)
    saved = []
    q_in, k_in = (q.clone(), k.clone()) if inplace else (q, k)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        serve(target, rope, q_in, cos, sin, position_ids=position_ids, inplace=inplace)
        serve(target, rope_qk, q_in, k_in, cos, sin, position_ids=position_ids, inplace=inplace)
    assert saved, "the hooks saw nothing"
    allowed = {t.untyped_storage().data_ptr() for t in (cos, sin, position_ids)}
    assert {t.untyped_storage().data_ptr() for t in saved} <= allowed


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("which", ["q", "k"])
def test_only_one_requires_a_gradient(target, inplace, which):
    cos, sin = tables(target)
    q, k = random(target, 2, 5, 3, 16), random(target, 2, 5, 1, 16, seed=1)
    leaf = {"q": q, "k": k}[which].requires_grad_()
    expected = torch.autograd.grad(serve(target, rope, leaf, cos, sin).square().sum(), leaf)
    inputs = (q.clone(), k.clone()) if inplace else (q, k)
    rotated = serve(target, rope_qk, *inputs, cos, sin, inplace=inplace)
    total = rotated.q.square().sum() + rotated.k.square().sum()
    assert same_bits(torch.autograd.grad(total, leaf)[0], expected[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("which", ["q", "k"])
def test_only_one_result_is_used(target, which):
    cos, sin = tables(target)
    q, k = random(target, 2, 5, 3, 16).requires_grad_(), random(target, 2, 5, 1, 16, seed=1).requires_grad_()
    getattr(serve(target, rope_qk, q, k, cos, sin), which).sum().backward()  # the gradient that comes in has stride 0
    used, unused = (q, k) if which == "q" else (k, q)
    (expected,) = torch.autograd.grad(rope(used, cos, sin, impl=target.implementation), used, torch.ones_like(used))
    assert same_bits(used.grad, expected)
    assert unused.grad is None or not unused.grad.any()


@pytest.mark.parametrize("which", ["cos", "sin"])
def test_tables_have_no_gradient(which):
    table = dict(zip(("cos", "sin"), rope_table(8, 8), strict=True))
    table[which] = table[which].clone().requires_grad_()
    x = torch.ones(1, 4, 1, 8)
    with pytest.raises(ArgumentError) as caught:
        rope(x, **table)
    assert caught.value.argument == which
    with torch.no_grad():
        assert torch.equal(rope(x, **table), rope(x, **{name: t.detach() for name, t in table.items()}))


def test_angles_have_no_gradient():
    with pytest.raises(ArgumentError) as caught:
        rope_from_angles(torch.ones(1, 4, 1, 8), torch.ones(4, 4, requires_grad=True))
    assert caught.value.argument == "angles"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(target, mode):
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16).requires_grad_()
    expected = serve(target, rope, x, cos, sin).detach()
    with mode():
        y = serve(target, rope, x, cos, sin)
        made_inside = x * 1
        written = serve(target, rope, made_inside, cos, sin, inplace=True)
    assert not y.requires_grad
    assert written is made_inside
    assert same_bits(y, expected)
    assert same_bits(written, expected)
    if mode is torch.inference_mode:
        assert y.is_inference()
        assert same_bits(serve(target, rope, made_inside, cos, sin), serve(target, rope, expected, cos, sin))


# In place.


@pytest.mark.parametrize("target", TARGETS)
def test_in_place_returns_its_arguments_and_counts_a_version(target):
    cos, sin = tables(target)
    q, k = random(target, 2, 5, 3, 16), random(target, 2, 5, 1, 16)
    before = q._version, k._version
    assert serve(target, rope, q, cos, sin, inplace=True) is q
    rotated = serve(target, rope_qk, q, k, cos, sin, inplace=True)
    assert rotated.q is q
    assert rotated.k is k
    assert q._version > before[0] + 1
    assert k._version > before[1]


@pytest.mark.parametrize("target", TARGETS)
def test_in_place_invalidates_what_autograd_saved(target):
    x = random(target, 2, 5, 3, 16)
    weight = random(target, 2, 5, 3, 16).requires_grad_()
    product = weight * x  # saves x
    serve(target, rope, x, *tables(target), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("views", ["whole", "slices", "splits"])
def test_in_place_under_autograd(target, views):
    """On a result of other work, and on ``q`` and ``k`` that are parts of one projection."""
    cos, sin = tables(target)
    leaf = random(target, 2, 5, 6, 16).requires_grad_()
    gradients = []
    for inplace in (False, True):
        qkv = leaf * 1.5
        if views == "whole":
            y = serve(target, rope, qkv, cos, sin, inplace=inplace)
            total = (y * y * y).sum()
        else:
            q, k, v = qkv[:, :, :3], qkv[:, :, 3:5], qkv[:, :, 5:]
            if views == "splits":  # a reshaped view of a view
                q, k = q.view(2, 5, 3, 16), k.transpose(1, 2).transpose(1, 2)
            rotated = serve(target, rope_qk, q, k, cos, sin, inplace=inplace)
            if inplace:
                assert same_bits(qkv[:, :, :3].detach(), rotated.q.detach())
                assert same_bits(qkv[:, :, 3:5].detach(), rotated.k.detach())
            total = (rotated.q**3).sum() + (rotated.k**3).sum() + (v**3).sum()
        gradients.append(torch.autograd.grad(total, leaf)[0])
    assert same_bits(*gradients)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("views", ["leaf", "view of a leaf", "chunks"])
def test_in_place_refused_by_autograd_changes_nothing(target, views):
    cos, sin = tables(target)
    leaf = random(target, 2, 5, 4, 16).requires_grad_()
    tensor = {"leaf": leaf, "view of a leaf": leaf[:, :, :2]}.get(views)
    memory = leaf if tensor is not None else leaf * 1
    if tensor is None:
        tensor = memory.chunk(2, 2)[0]
    before = memory.detach().clone()
    with pytest.raises((ArgumentError, RuntimeError)) as caught:
        rope(tensor, cos, sin, inplace=True, impl=target.implementation)
    if views == "leaf":
        assert isinstance(caught.value, ArgumentError)
        assert caught.value.argument == "x"
    assert same_bits(memory.detach(), before)


@pytest.mark.parametrize("target", TARGETS)
def test_in_place_refuses_expanded_tensors(target):
    cos, sin = tables(target)
    q, k = random(target, 2, 5, 3, 16), random(target, 1, 5, 1, 16).expand(2, 5, 1, 16)
    before = q.clone()
    with pytest.raises(ArgumentError) as caught:
        rope_qk(q, k, cos, sin, inplace=True, impl=target.implementation)
    assert caught.value.argument == "k"
    assert same_bits(q, before)


# Other modes of autograd.


@pytest.mark.parametrize("target", TARGETS)
def test_checkpointing(target):
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16).requires_grad_()

    def block(x):
        return serve(target, rope, x * 2, cos, sin).square()

    (expected,) = torch.autograd.grad(block(x).sum(), x)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum(), x)
    assert same_bits(got, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_forward_mode_is_right_or_refused(target):
    """A rotation is linear, so its derivative along ``t`` is ``t`` rotated; to drop it silently would be wrong."""
    cos, sin = tables(target)
    x, t = random(target, 2, 5, 3, 16), random(target, 2, 5, 3, 16, seed=1)
    expected = serve(target, rope, t, cos, sin)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        try:
            y = rope(dual, cos, sin, impl=target.implementation)
        except (RuntimeError, TilewrightError):  # refused
            return
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert tangent is not None, "the derivative was dropped"
    assert numerics.compare(tangent, expected, rope(t.double(), cos, sin, impl="reference")).ok
