"""Gradients of hyper-connections, what is kept for them, results in given memory, and rebuilding layers."""

from functools import partial

import pytest
import torch
import torch.utils.checkpoint

import tilewright
from mhc_autograd_helpers import (
    FUNCTIONS,
    IN_MODES,
    KINDS,
    LEAD,
    MODES,
    REFERENCE,
    H,
    N,
    as_tuple,
    by_reference,
    call,
    gradients,
    leaves,
    total,
)  # fmt: skip
from operation_helpers import TARGETS, random, same_bits, serve
from tilewright import numerics
from tilewright.errors import ArgumentError, ImplementationError
from tilewright.ops.mhc import reference
from tilewright.ops.mhc.call import Options

tilewright.register()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Gradients.


@pytest.mark.parametrize("target", REFERENCE)
@pytest.mark.parametrize(("function", "mode"), [*IN_MODES, ("mhc_post", "plain"), ("mhc_expand", "plain")])
def test_gradients_of_gradients(target, function, mode):
    kwargs = dict(MODES[mode])
    made = leaves(target, function, torch.float64, lead=(2,), h=5, norm=kwargs.pop("norm", False))

    def run(*tensors):
        return call(target, function, dict(zip(made, tensors, strict=True)), **kwargs)

    assert torch.autograd.gradcheck(run, tuple(made.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(made.values()), fast_mode=True)


@pytest.mark.parametrize("target", REFERENCE)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_gradients_of_delayed(target, mixed, one):
    """With and without a mix from the layer before, with streams and with one tensor that all of them are."""
    made = leaves(target, "mhc_pre_delayed", torch.float64, lead=(2,), h=5)
    if one:
        first = leaves(target, "mhc_pre_broadcast", torch.float64, lead=(2,), h=5)
        made = first | {"pre_mix": made["pre_mix"]}
    if not mixed:
        del made["pre_mix"]

    def run(*tensors):
        given = dict(zip(made, tensors, strict=True)) | ({"residual": None} if one else {})
        return call(target, "mhc_pre_delayed", given)

    assert torch.autograd.gradcheck(run, tuple(made.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(made.values()), fast_mode=True)


@pytest.mark.parametrize("target", REFERENCE)
def test_inputs_that_depend_on_each_other(target):
    """Gradients of gradients where all tensors of a call are made of one."""
    leaf = random(target, 2, 3, 3, dtype=torch.float64).requires_grad_()

    def run(leaf):
        x = leaf[:, 0].expand(2, 3)
        fn, scale, base = leaf.view(2, 9)[:1].expand(15, 9) * 0.1, leaf[0, 0], leaf.view(-1)[:15]
        return as_tuple(tilewright.mhc_post_pre(x, leaf, leaf[..., 0], leaf.sin(), fn, scale, base, impl="reference"))

    assert torch.autograd.gradcheck(run, (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (leaf,), fast_mode=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_one_requires_a_gradient(target, function):
    """The bits that it has with the others; on a GPU, whose compiler may add its sums up otherwise, the value."""
    made = leaves(target, function, torch.bfloat16)
    together = gradients(target, function, made)
    expected = torch.autograd.grad(total(as_tuple(by_reference(function)(**made))), tuple(made.values()))
    exact = {name: t.detach().double().requires_grad_() for name, t in made.items()}
    truths = torch.autograd.grad(total(as_tuple(by_reference(function)(**exact))), tuple(exact.values()))
    for place, name in enumerate(made):
        alone = {other: t.detach().requires_grad_(other == name) for other, t in made.items()}
        results = [y for y in call(target, function, alone) if y.requires_grad]
        grads = torch.autograd.grad(total(results), alone[name])
        if target.on_gpu:
            one = slice(place, place + 1)
            wrong = numerics.disagreement(name, grads, expected[one], truths[one], [N * H * 6])
            assert not wrong, wrong
        else:
            assert same_bits(*grads, together[place]), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", KINDS)
def test_only_one_result_is_used(target, function):
    """The others' gradients count as zeros."""
    kwargs = {} if function in ("mhc_head", "mhc_pre_delayed") else {"return_pre_mix": True}
    made = leaves(target, function)
    tensors = tuple(made.values())
    exact = {name: t.detach().double().requires_grad_() for name, t in made.items()}
    wide = tuple(exact.values())

    def of_one(place, run, grad, tensors):
        y = as_tuple(run(**kwargs))[place]
        return torch.autograd.grad(y, tensors, grad.to(y.dtype), allow_unused=True, materialize_grads=True)

    for place, y in enumerate(call(target, function, made, **kwargs)):
        grad = random(target, *y.shape, seed=9)
        got = of_one(place, partial(call, target, function, made), grad, tensors)
        expected = of_one(place, partial(by_reference(function), **made), grad, tensors)
        truths = of_one(place, partial(by_reference(function), **exact), grad, wide)
        wrong = numerics.disagreement(f"result {place}", got, expected, truths, [N * H * 6] * len(truths))
        assert not wrong, wrong


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", ["mhc_post_pre", "mhc_pre_broadcast"])
def test_streams_alone_are_used(target, function):
    """What has no part in them gets no gradient."""
    made = leaves(target, function, torch.bfloat16)
    streams = call(target, function, made)[0]
    grad = random(target, *streams.shape, dtype=torch.bfloat16, seed=9)
    grads = dict(zip(made, torch.autograd.grad(streams, tuple(made.values()), grad, allow_unused=True), strict=True))
    assert {name for name, g in grads.items() if g is None} == {"fn", "scale", "base"}
    alone = "mhc_post" if function == "mhc_post_pre" else "mhc_expand"
    tensors = {name: t for name, t in made.items() if grads[name] is not None}
    (expected,) = call(target, alone, tensors)
    for name, g in zip(tensors, torch.autograd.grad(expected, tuple(tensors.values()), grad), strict=True):
        assert same_bits(grads[name], g), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_streams_gradient_is_rounded_once(target, dtype):
    """Through the fusion the old streams' gradient is as exact as float32, where two steps round in between."""
    made = leaves(target, "mhc_post_pre", dtype)
    made["fn"] = reference.rounded_fn(made["fn"]).detach().requires_grad_()  # as every implementation has it
    results = call(target, "mhc_post_pre", made)
    incoming = [random(target, *y.shape, dtype=dtype, seed=30 + i).to(y.dtype) for i, y in enumerate(results)]
    fused = torch.autograd.grad(results, tuple(made.values()), incoming)
    wide = {name: t.detach().double().requires_grad_() for name, t in made.items()}
    layer, weights = list(wide.values())[:4], list(wide.values())[4:]
    streams = tilewright.mhc_post(*layer, impl="reference")
    streams = streams + (results[0].detach().double() - streams).detach()  # rounded, and the gradient passes as it is
    exact = (streams, *tilewright.mhc_pre(streams, *weights, impl="reference"))
    truths = torch.autograd.grad(exact, tuple(wide.values()), [g.double() for g in incoming])
    for name, got, truth in zip(made, fused, truths, strict=True):
        agreement = numerics.compare(got, truth.to(got.dtype), truth, reduced=N * H * 6)
        assert agreement.ok, f"{name}: {agreement}"


@pytest.mark.parametrize("target", TARGETS)
def test_the_fusion_is_its_steps(target):
    made = leaves(target, "mhc_post_pre", torch.bfloat16, norm=True)
    results = call(target, "mhc_post_pre", made, return_pre_mix=True)
    layer = {name: made.pop(name) for name in ("x", "residual", "post_mix", "comb_mix")}
    (streams,) = call(target, "mhc_post", layer)
    for got, expected in zip(results, (streams, *call(target, "mhc_pre", made | {"residual": streams},
                                                      return_pre_mix=True)), strict=True):  # fmt: skip
        assert same_bits(got.detach(), expected.detach())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", KINDS[:1] + KINDS[4:])
def test_recompute_changes_what_is_kept_and_nothing_else(target, function):
    made = leaves(target, function)
    kept, outcomes = {}, {}
    for recompute in (False, True):
        sizes, results = sizes_saved(partial(call, target, function, made, recompute=recompute, sinkhorn_iters=7))
        kept[recompute] = sum(sizes)
        outcomes[recompute] = results, torch.autograd.grad(total(results), tuple(made.values()))
    assert kept[False] - kept[True] == 6 * 2 * 7 * N * 4, "the scalings, and nothing else"
    for plain, other in zip(outcomes[False][0], outcomes[True][0], strict=True):
        assert torch.equal(plain, other)
    exact = {name: t.detach().double().requires_grad_() for name, t in made.items()}
    results = getattr(tilewright, function)(**exact, sinkhorn_iters=7, impl="reference")
    truths = torch.autograd.grad(total(results), tuple(exact.values()))
    for _, grads in outcomes.values():
        wrong = numerics.disagreement("gradient", grads, outcomes[False][1], truths, [N * H * 6] * len(truths))
        assert not wrong, wrong


def sizes_saved(function):
    saved = {}
    hooks = (
        lambda t: saved.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t,
        lambda t: t,
    )
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        result = function()
    return tuple(saved.values()), result


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(target, function, mode):
    made = leaves(target, function)
    expected = call(target, function, made)
    with mode():
        got = call(target, function, made)
    for ours, theirs in zip(got, expected, strict=True):
        assert not ours.requires_grad
        assert ours.is_contiguous()
        assert same_bits(ours, theirs.detach())


@pytest.mark.parametrize("target", TARGETS)
def test_no_tokens(target):
    for function in FUNCTIONS:
        made = leaves(target, function, lead=(0, 3), norm=function not in ("mhc_head", "mhc_post", "mhc_expand"))
        results = call(target, function, made)
        assert all(y.shape[:2] == (0, 3) for y in results)
        grads = torch.autograd.grad([y.sum() for y in results], tuple(made.values()), materialize_grads=True,
                                    allow_unused=True)  # fmt: skip
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("target", TARGETS)
def test_checkpointing(target):
    made = leaves(target, "mhc_pre")

    def block(residual):
        return call(target, "mhc_pre", made | {"residual": residual * 2})[2].square()

    x = made["residual"]
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum(), x)
    assert same_bits(got, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_the_new_streams_are_guarded(target):
    made = leaves(target, "mhc_post_pre")
    streams, *_, y = call(target, "mhc_post_pre", made)
    with torch.no_grad():
        streams.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Writing into given memory.


def test_out_is_written():
    made = {name: t.detach() for name, t in leaves(TARGETS[0].values[0], "mhc_post").items()}
    expected = tilewright.mhc_post(**made)
    for out in (
        torch.empty(*LEAD, N, H),
        torch.empty(*LEAD, H, N).transpose(-1, -2),
        torch.empty(3, 2, N, H).transpose(0, 1),
    ):
        version = out._version
        assert tilewright.mhc_post(**made, out=out) is out
        assert torch.equal(out, expected)
        assert out._version > version


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["contiguous", "columns", "tokens"])
@pytest.mark.parametrize("compiled", [False, True])
def test_in_place(target, layout, compiled):
    made = {name: t.detach() for name, t in leaves(target, "mhc_post", torch.bfloat16).items()}
    streams = made.pop("residual")
    if layout == "columns":
        streams = streams.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "tokens":
        streams = streams.transpose(0, 1).contiguous().transpose(0, 1)
    expected = tilewright.mhc_post(residual=streams, **made, impl=target.implementation)
    assert not torch.equal(expected, streams)

    def run(streams):
        tilewright.mhc_post(residual=streams, out=streams, **made, impl=target.implementation)
        return streams + 0

    given = streams.clone()
    got = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(given)
    assert torch.equal(given, expected)
    assert torch.equal(got, expected)


def test_out_that_overlaps():
    made = {name: t.detach() for name, t in leaves(TARGETS[0].values[0], "mhc_post").items()}
    memory = torch.zeros(2, *LEAD, N, H)
    shifted = memory.view(-1)[H : H + memory[0].numel()].view(memory[0].shape)
    with pytest.raises(ArgumentError, match="shares memory with 'residual'"):
        tilewright.mhc_post(**made | {"residual": memory[0]}, out=shifted)
    with pytest.raises(ArgumentError, match="shares memory with 'x'"):
        tilewright.mhc_post(**made | {"x": memory[0, :, :, 0]}, out=memory[0])
    with torch.inference_mode():
        out = torch.empty(*LEAD, N, H)
    with pytest.raises(ArgumentError, match="inference tensor"):
        tilewright.mhc_post(**made, out=out)
    tilewright.mhc_post(**made | {"residual": memory[0]}, out=memory[1])


@pytest.mark.parametrize("watched", [False, True])
def test_out_where_a_gradient_is_recorded(watched):
    made = leaves(TARGETS[0].values[0], "mhc_post")
    out = torch.empty(*LEAD, N, H)
    write = torch.ops.tilewright.mhc_post_ if watched else lambda out, *args: tilewright.mhc_post(*args, out=out)
    with pytest.raises(ArgumentError, match="where a gradient is recorded") as caught:
        write(out, *made.values())
    assert caught.value.argument == "out"
    with torch.no_grad():
        assert torch.equal(tilewright.mhc_post(**made, out=out), tilewright.mhc_post(**made))


# Rebuilding layers.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_recompute_layers(target, last, norm):
    """A block of layers is rebuilt bit for bit from what the layers themselves returned."""
    made = {name: t.detach() for name, t in leaves(target, "mhc_pre", torch.bfloat16, norm=norm).items()}
    streams = first = made.pop("residual")
    inputs, outputs, residuals, mixes = [], [], [], []
    for layer in range(3):
        post, comb, y, pre = call(target, "mhc_pre", made | {"residual": streams}, return_pre_mix=True)
        inputs.append(y)
        mixes.append((pre, post, comb))
        if layer < 2 or last:
            outputs.append(y.sin())
            streams = tilewright.mhc_post(outputs[-1], streams, post, comb, impl=target.implementation)
            residuals.append(streams)
    weights = [made["norm_weight"]] * 3 if norm else None
    arguments = (first, outputs, *map(list, zip(*mixes, strict=True)))
    rebuilt = serve(target, tilewright.mhc_recompute_layers, *arguments, norm_weights=weights)
    for got, expected in zip((*rebuilt.layer_inputs, *rebuilt.residuals), (*inputs, *residuals), strict=True):
        assert same_bits(got, expected)


def test_recompute_layers_has_no_gradient():
    x, streams, mix, comb = torch.ones(2, 4), torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 3, 3)
    with pytest.raises(ArgumentError, match="what is recomputed has none"):
        tilewright.mhc_recompute_layers(streams.requires_grad_(), [x], [mix], [mix], [comb], impl="reference")
    with torch.no_grad():
        tilewright.mhc_recompute_layers(streams.requires_grad_(), [x], [mix], [mix], [comb], impl="reference")


# The definition.


def test_scalings_rebuild_every_step():
    options = Options(sinkhorn_eps=1e-3, sinkhorn_iters=4)
    logits = random(TARGETS[0].values[0], 5, N, N, dtype=torch.float64)
    start = torch.softmax(logits, -1) + options.sinkhorn_eps
    stored = reference.scalings(logits, options)
    assert stored.shape == (5, 8, N)
    assert not stored[:, -1].any()
    rows, columns = stored[:, -3], stored[:, -2]
    rebuilt = rows[:, :, None] * start * columns[:, None, :]
    agreement = numerics.compare(rebuilt, rebuilt, reference.sinkhorn(logits, options), reduced=N * 8)
    assert agreement.ok, agreement


def test_rounded_weights_are_sums_of_two():
    fn = random(TARGETS[0].values[0], 64, 64)
    rounded = reference.rounded_fn(fn)
    high = fn.bfloat16().float()
    assert torch.equal((rounded - high).bfloat16().float(), rounded - high)
    assert not torch.equal(rounded, fn)
    assert ((rounded - fn).abs() <= torch.finfo(torch.bfloat16).eps ** 2 * fn.abs()).all()


# Which implementation serves.


def test_float64_is_not_for_triton():
    made = leaves(TARGETS[0].values[0], "mhc_pre", torch.float64)
    with pytest.raises(ImplementationError, match="float64"):
        tilewright.mhc_pre(**made, impl="triton")


@pytest.mark.parametrize("implementation", ["tilelang", "aiter"])
def test_those_without_a_backward_are_not_for_the_cpu(implementation):
    made = leaves(TARGETS[0].values[0], "mhc_pre", torch.bfloat16)
    with pytest.raises(ImplementationError, match=f"'{implementation}' was asked for"):
        tilewright.mhc_pre(**made, impl=implementation)


def test_autocast_changes_nothing():
    """A product of float32 would become one of 16 bits."""
    torch.manual_seed(0)
    streams = torch.randn(5, 4, 64).bfloat16().requires_grad_()
    fn = (torch.randn(24, 256) * 0.05).requires_grad_()

    def everything():
        results = tilewright.mhc_pre(streams, fn, torch.ones(3), torch.zeros(24), impl="reference")
        return *results, *torch.autograd.grad([result.float().sum() for result in results], (streams, fn))

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
