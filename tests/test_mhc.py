"""What hyper-connections compute: the mathematics by hand, and what holds between the functions and their calls."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from mhc_helpers import (
    CALLS,
    HALVES,
    INPUTS,
    TARGETS,
    TRITON,
    call,
    flat,
    judged_in_chunks,
    kernels_compiled,
    layer,
    plain_pre,
    random,
    same_bits,
    serve,
)
from tilewright import (
    mhc_expand,
    mhc_head,
    mhc_post,
    mhc_post_pre,
    mhc_pre,
    mhc_pre_broadcast,
    mhc_pre_delayed,
    mhc_recompute_layers,
    numerics,
    register,
    rms_norm,
)
from tilewright.ops.mhc import reference, spec
from tilewright.ops.mhc.cases import BROADCAST, DELAYED, HEAD, POST, POST_PRE, PRE, MhcCase
from tilewright.testing import check_backward, check_forward

OPTIONS = {"rms_eps": 1e-3, "pre_eps": 1e-2, "sinkhorn_eps": 1e-2, "post_mult": 1.5, "sinkhorn_iters": 3}
SHAPES = [
    (1, 4, 1280, torch.bfloat16, True),
    (5, 3, 100, torch.bfloat16, False),
    (5, 3, 100, torch.float16, True),
    (5, 3, 100, torch.float32, True),
    (17, 1, 72, torch.float16, False),
    (130, 4, 136, torch.float32, False),
    (130, 4, 136, torch.bfloat16, True),
    (3, 8, 4096, torch.float16, True),
]
"""Tokens, streams, columns, dtype, and whether there is a norm."""

# By hand.


@pytest.mark.parametrize("target", TARGETS)
def test_post_contracts_the_first_index(target):
    """Old stream 0 goes to new stream 1 with weight 1/2, old stream 1 to new stream 0 with weight 1/4."""
    residual = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]], device=target.device)
    comb = torch.tensor([[[0.75, 0.5], [0.25, 0.5]]], device=target.device)
    x, post = torch.tensor([[100.0, 0.0]], device=target.device), torch.tensor([[2.0, 3.0]], device=target.device)
    expected = torch.tensor([[[203.25, 6.5], [305.5, 11.0]]], device=target.device)
    assert torch.equal(serve(target, mhc_post, x, residual, post, comb), expected)
    assert torch.equal(serve(target, mhc_post, x, residual, post[..., None], comb), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_mixes_are_laid_out_as_the_models_have_them(target):
    """Each logit is set by one row of ``fn`` alone: rows of pre, of post, then comb's, the old stream outer."""
    n, h = 3, 2
    residual = torch.zeros(1, n, h, device=target.device)
    residual[0, 1, 0] = math.sqrt(n * h)  # so that rstd is 1 and the column of stream 1 counts
    column = 1 * h + 0
    fn = torch.zeros(n * (n + 2), n * h, device=target.device)
    fn[:, column] = torch.arange(n * (n + 2), device=target.device) / math.sqrt(n * h)
    scale = torch.tensor([0.25, -0.125, 0.0625], device=target.device)
    base = torch.zeros(n * (n + 2), device=target.device)
    got = serve(
        target, mhc_pre, residual, fn, scale, base, rms_eps=1e-30, pre_eps=0.0, sinkhorn_iters=1, return_pre_mix=True
    )
    rows = torch.arange(n * (n + 2), dtype=torch.float64, device=target.device)
    logits = (rows[2 * n :] * 0.0625).view(1, n, n)
    matrix = logits.softmax(-1) + 1e-6
    truths = {
        "pre_mix": (rows[:n] * 0.25).sigmoid()[None],
        "post_mix": 2 * (rows[n : 2 * n] * -0.125).sigmoid()[None, :, None],
        "comb_mix": matrix / (matrix.sum(-2, keepdim=True) + 1e-6),
    }
    for name, truth in truths.items():
        # What is right to float32's rounding a few times over.
        agreement = numerics.compare(getattr(got, name), truth.float(), truth, reduced=n * h * n * (n + 2))
        assert agreement.ok, (name, agreement)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_definition_by_hand(n, iters):
    target = TARGETS[0].values[0]
    given = layer(target, 3, n=n, h=5, dtype=torch.float64, fn_scale=1.0)
    options = OPTIONS | {"sinkhorn_iters": iters}
    got = serve(target, mhc_pre, *given.pre, **options, return_pre_mix=True)
    tokens = [plain_pre(r, *(t.tolist() for t in given[1:4]), **options) for r in given.residual.tolist()]
    for name, values in zip(("post_mix", "comb_mix", "layer_input", "pre_mix"), zip(*tokens, strict=True), strict=True):
        truth = torch.tensor(values, dtype=torch.float64).view(getattr(got, name).shape)
        agreement = numerics.compare(getattr(got, name), truth, truth, reduced=2 * iters * n * 5)
        assert agreement.ok, (name, agreement)


@pytest.mark.parametrize("target", TARGETS)
def test_head_is_the_gated_sum(target):
    given = layer(target, 6, n=3, h=40, dtype=torch.float32)
    residual, fn, scale, base = given.head
    got = serve(target, mhc_head, residual, fn, scale, base, eps=1e-2)
    row = residual.double().flatten(1)
    mixes = row @ fn.double().T * torch.rsqrt(row.square().mean(1, keepdim=True) + 1e-6)
    gates = (mixes * scale.double() + base.double()).sigmoid() + 1e-2
    truth = (gates[..., None] * residual.double()).sum(1)
    agreement = numerics.compare(
        got, mhc_head(residual, fn, scale, base, eps=1e-2, impl="reference"), truth, reduced=120
    )
    assert agreement.ok, agreement


# What holds of the results.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [1, 3, 8])
def test_columns_sum_to_one_rows_nearly(target, n):
    given = layer(target, 64, n=n, h=128, fn_scale=1 / math.sqrt(n * 128))
    comb = serve(target, mhc_pre, *given.pre).comb_mix.double()
    # The last division is by the columns' sums plus eps, and those sums are near 1; each element is rounded.
    slack = n * torch.finfo(torch.float32).eps
    sums = comb.sum(-2)
    assert (sums <= 1 + slack).all()
    assert (sums >= 1 - 2 * 1e-6 - slack).all()
    if n > 1:
        once = serve(target, mhc_pre, *given.pre, sinkhorn_iters=1).comb_mix.double()
        assert (once.sum(-1) - 1).abs().max() > 100 * (once.sum(-2) - 1).abs().max(), "columns are divided last"
        assert (once.sum(-1) - 1).abs().max() > 100 * (comb.sum(-1) - 1).abs().max(), "iterations even the rows out"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weight_dtype", ["same", torch.float32])
def test_the_norm_is_rms_norm_of_the_layer_input(target, dtype, weight_dtype):
    given = layer(target, 9, n=3, h=96, dtype=dtype)
    weight = 1 + random(target, 96, dtype=dtype if weight_dtype == "same" else weight_dtype) / 2
    plain = serve(target, mhc_pre, *given.pre)
    normed = serve(target, mhc_pre, *given.pre, norm_weight=weight, norm_eps=1e-5)
    expected = rms_norm(plain.layer_input, weight, 1e-5, cast="after_weight", impl="reference")
    truth = rms_norm(plain.layer_input.double(), weight.double(), 1e-5, cast="after_weight", impl="reference")
    agreement = numerics.compare(normed.layer_input, expected, truth)
    assert agreement.ok, agreement
    assert same_bits(normed.post_mix, plain.post_mix)
    assert same_bits(normed.comb_mix, plain.comb_mix)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("tokens", "n", "h", "dtype", "normed"), SHAPES)
def test_post_pre_has_the_bits_of_its_two_steps(target, tokens, n, h, dtype, normed):
    given = layer(target, tokens, n=n, h=h, dtype=dtype)
    kwargs = {"norm_weight": torch.linspace(0.5, 2, h, device=target.device).to(dtype)} if normed else {}
    kwargs["return_pre_mix"] = True
    fused = serve(target, mhc_post_pre, *given.post_pre, **kwargs)
    residual = serve(target, mhc_post, *given.post)
    steps = serve(target, mhc_pre, residual, *given.pre[1:], **kwargs)
    assert same_bits(fused.residual, residual)
    for name in steps._fields:
        assert same_bits(getattr(fused, name), getattr(steps, name)), name


@pytest.mark.parametrize("target", TARGETS)
def test_first_layer(target):
    """``mhc_pre_broadcast`` is ``mhc_pre`` of expanded streams, if ``fn`` is summed over them."""
    n, h = 4, 40
    given = layer(target, 3, 2, n=n, h=h, dtype=torch.float32)
    narrow = given.fn.view(-1, n, h).sum(1)
    exact = given.fn.double().view(-1, n, h).sum(1)
    got = serve(target, mhc_pre_broadcast, given.x, narrow, *given.pre[2:])
    streams = serve(target, mhc_expand, given.x, n)
    assert torch.equal(streams, given.x[..., None, :].expand(3, 2, n, h))
    assert torch.equal(got.residual, streams)
    same = mhc_pre_broadcast(given.x, narrow, *given.pre[2:], impl="reference")
    wide = [t.double() for t in given.pre[2:]]
    truth = mhc_pre(streams.double(), given.fn.double(), *wide, impl="reference")
    check = mhc_pre_broadcast(given.x.double(), exact, *wide, impl="reference")
    for name in truth._fields:
        ours, theirs, true = (getattr(r, name) for r in (got, same, truth))
        agreement = numerics.compare(ours, theirs, true, reduced=n * h)
        assert agreement.ok, (name, agreement)
        agreement = numerics.compare(getattr(check, name), true, true, reduced=n * h)
        assert agreement.ok, (name, agreement)


@pytest.mark.parametrize("target", TARGETS)
def test_delayed_collapses_with_the_mix_before(target):
    n, h = 3, 48
    given = layer(target, 7, n=n, h=h, dtype=torch.float32)
    plain = serve(target, mhc_pre, *given.pre, return_pre_mix=True)
    first = serve(target, mhc_pre_delayed, *given.pre)
    assert torch.equal(first.layer_input, given.residual[:, 0])
    for name in ("post_mix", "comb_mix", "pre_mix"):
        assert same_bits(getattr(first, name), getattr(plain, name)), name
    # With the mix that mhc_pre computes, it is mhc_pre.
    again = serve(target, mhc_pre_delayed, *given.pre, pre_mix=plain.pre_mix)
    truth = (plain.pre_mix.double()[..., None] * given.residual.double()).sum(1)
    agreement = numerics.compare(again.layer_input, plain.layer_input, truth, reduced=n)
    assert agreement.ok, agreement
    other = serve(target, mhc_pre_delayed, *given.pre, pre_mix=torch.eye(n, device=target.device)[1].expand(7, n))
    assert torch.equal(other.layer_input, given.residual[:, 1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("given_mix", [False, True])
def test_delayed_with_all_streams_alike(target, given_mix):
    n, h = 3, 48
    given = layer(target, 7, n=n, h=h, dtype=torch.float32)
    poison = torch.full_like(given.residual, math.nan)
    kwargs = {"pre_mix": given.post_mix} if given_mix else {}
    narrow = given.fn[:, :h]
    got = serve(target, mhc_pre_delayed, poison, narrow, *given.pre[2:], x=given.x, **kwargs)
    unread = serve(target, mhc_pre_delayed, None, narrow, *given.pre[2:], x=given.x, **kwargs)
    expected = serve(target, mhc_pre_broadcast, given.x, narrow, *given.pre[2:], return_pre_mix=True)
    assert all(map(same_bits, got, unread))
    for name in ("post_mix", "comb_mix", "pre_mix"):
        assert same_bits(getattr(got, name), getattr(expected, name)), name
    truth = given.x.double() * (given.post_mix.double().sum(-1, keepdim=True) if given_mix else 1)
    agreement = numerics.compare(got.layer_input, truth.float(), truth, reduced=2 * n * n)
    assert agreement.ok, agreement


# Places and numbers of tokens.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["mhc_pre", "mhc_post_pre", "mhc_head"])
@pytest.mark.parametrize(("n", "h"), [(4, 1280), (3, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_invariance(target, name, n, h, dtype):
    """A token's result has the same bits whatever stands beside it, and wherever it stands."""
    function, inputs = CALLS[name]
    given = layer(target, 150, n=n, h=h, dtype=dtype)
    whole = flat(serve(target, function, *inputs(given), batch_invariant=True))
    for start, stop in ((0, 1), (149, 150), (1, 3), (7, 24), (19, 147)):
        part = flat(serve(target, function, *inputs(given.tokens(start, stop)), batch_invariant=True))
        for ours, all_of_them in zip(part, whole, strict=True):
            assert same_bits(ours, all_of_them[start:stop]), (start, stop)


@pytest.mark.parametrize("target", TRITON)
@pytest.mark.parametrize(("n", "h"), [(3, 100), (4, 320)])
def test_batch_invariance_from_few_tokens_to_many(target, n, h):
    """A GPU has a kernel for few tokens and one for many; and each gives the same bits again."""
    given = layer(target, 1000, n=n, h=h)
    whole = flat(serve(target, mhc_pre, *given.pre, batch_invariant=True))
    for start, stop in ((0, 500), (0, 1000), (3, 200), (700, 1000), (999, 1000), (0, 500)):
        part = flat(serve(target, mhc_pre, *given.tokens(start, stop).pre, batch_invariant=True))
        for ours, all_of_them in zip(part, whole, strict=True):
            assert same_bits(ours, all_of_them[start:stop]), (start, stop)


@pytest.mark.parametrize("target", TARGETS)
def test_post_is_batch_invariant_as_it_is(target):
    given = layer(target, 70, n=3, h=100)
    whole = serve(target, mhc_post, *given.post)
    for start, stop in ((0, 1), (69, 70), (5, 22)):
        assert same_bits(serve(target, mhc_post, *given.tokens(start, stop).post), whole[start:stop])


@pytest.mark.parametrize("target", TRITON)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("gradient", [False, True])
def test_one_compiled_kernel_serves_any_number_of_tokens(target, name, gradient, monkeypatch):
    function, inputs = CALLS[name]
    compiled = kernels_compiled(monkeypatch)
    known = None
    h = 88 + 16 * list(CALLS).index(name)  # its own kernels: no other function has compiled them
    for tokens in (3, 1, 2, 15, 16, 17, 128, 129, 1000):
        args = [t.requires_grad_(gradient) for t in inputs(layer(target, tokens, n=3, h=h))]
        results = flat(serve(target, function, *args))
        if gradient:
            torch.autograd.grad([r.float().sum() for r in results], args)
        if known is None:
            known = list(compiled)
            assert known
    assert compiled == known, f"compiled later: {compiled[len(known) :]}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
def test_no_tokens(target, name, lead):
    function, inputs = CALLS[name]
    args = [t.requires_grad_() for t in inputs(layer(target, *lead, n=3, h=40))]
    results = flat(serve(target, function, *args))
    assert all(result.shape[: len(lead)] == lead for result in results)
    grads = torch.autograd.grad([result.sum() for result in results], args)
    for arg, grad in zip(args, grads, strict=True):
        assert grad.shape == arg.shape
        assert not grad.any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_what_lies_around_the_inputs_is_not_read(target, name):
    """Rows, streams and columns of NaN around every tensor change nothing."""
    function, inputs = CALLS[name]
    args = inputs(layer(target, 6, n=3, h=40))

    def amid_nans(t):
        around = torch.full([size + 4 for size in t.shape], math.nan, dtype=t.dtype, device=t.device)
        inner = around[tuple(slice(2, -2) for _ in t.shape)]
        return inner.copy_(t)

    plain = [t.requires_grad_() for t in args]
    inside = [amid_nans(t.detach()).requires_grad_() for t in args]
    expected, got = (flat(serve(target, function, *given)) for given in (plain, inside))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.isfinite().all()
        agreement = numerics.compare(ours.detach(), theirs.detach(), theirs.detach().double(), reduced=120)
        assert agreement.ok, agreement
    grads = torch.autograd.grad([r.float().sum() for r in got], inside)
    assert all(grad.isfinite().all() for grad in grads)


# In place.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "h"), [(4, 1280), (3, 100), (8, 7), (1, 40)])
def test_post_in_place(target, dtype, n, h):
    given = layer(target, 2, 9, n=n, h=h, dtype=dtype)
    expected = serve(target, mhc_post, *given.post)
    out = torch.full_like(given.residual, math.nan)
    assert serve(target, mhc_post, *given.post, out=out) is out
    assert same_bits(out, expected)
    assert serve(target, mhc_post, *given.post, out=given.residual) is given.residual
    assert same_bits(given.residual, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_post_into_part_of_a_tensor(target, inplace):
    given = layer(target, 5, n=3, h=40)
    expected = serve(target, mhc_post, *given.post)
    around = torch.full((7, 5, 56), 7.0, dtype=torch.bfloat16, device=target.device)
    out = around[1:-1, 1:-1, 8:-8]
    residual = out.copy_(given.residual) if inplace else given.residual
    serve(target, mhc_post, given.x, residual, given.post_mix, given.comb_mix, out=out)
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert (around == 7.0).all(), "elements beside the result were written"


# Layers.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_layers_are_rebuilt_bit_for_bit(target, dtype, normed, last):
    """What went through ``mhc_pre`` and ``mhc_post`` comes back from the mixes and the layers' outputs."""
    n, h, count = 4, 72, 3
    weights = [random(target, h, dtype=dtype, seed=9 + i) for i in range(count)]
    residual = first = layer(target, 2, 5, n=n, h=h, dtype=dtype).residual
    inputs, residuals, outputs, mixes = [], [], [], []
    for index in range(count):
        given = layer(target, 2, 5, n=n, h=h, dtype=dtype, seed=index + 1)
        kwargs = {"norm_weight": weights[index], "norm_eps": 1e-5} if normed else {}
        made = serve(target, mhc_pre, residual, *given.pre[1:], return_pre_mix=True, **kwargs)
        inputs.append(made.layer_input)
        mixes.append((made.pre_mix, made.post_mix, made.comb_mix))
        if index < count - 1 or last:
            outputs.append(torch.tanh(made.layer_input))
            residual = serve(target, mhc_post, outputs[-1], residual, made.post_mix, made.comb_mix)
            residuals.append(residual)
    kwargs = {"norm_weights": weights, "norm_eps": 1e-5} if normed else {}
    rebuilt = serve(target, mhc_recompute_layers, first, outputs, *map(list, zip(*mixes, strict=True)), **kwargs)
    for name, expected in (("layer_inputs", inputs), ("residuals", residuals)):
        assert len(getattr(rebuilt, name)) == len(expected)
        for ours, theirs in zip(getattr(rebuilt, name), expected, strict=True):
            assert same_bits(ours, theirs), name


# Precision and shapes.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("h", [4096, 7168])
def test_mixes_are_precise(target, h):
    """As precise as weights of two bfloat16 numbers allow: 5e-5 in mixes of rms 3, where TF32 makes 2e-3."""
    given = layer(target, 8, n=4, h=h, fn_scale=3 / math.sqrt(4 * h))
    row = given.residual.double().flatten(1)
    truth = row @ given.fn.double().T * torch.rsqrt(row.square().mean(1, keepdim=True) + 1e-6)
    assert 2.5 < truth.square().mean().sqrt() < 3.5
    mixes = stored_mixes(target, given)
    same = (
        row.float() @ reference.rounded_fn(given.fn).T * torch.rsqrt(row.float().square().mean(1, keepdim=True) + 1e-6)
    )
    agreement = numerics.compare(mixes, same, truth)
    assert agreement.ok, agreement
    assert (mixes.double() - truth).abs().max() <= MIX_ERROR


MIX_ERROR = 5e-5
"""What the family promises of a mix of rms 3; no tolerance, but a bound that the definition's rounding gives."""


def stored_mixes(target, given):
    """The mixes that a forward keeps for its backward."""
    register()
    results = torch.ops.tilewright.mhc_pre(*given.pre, store=True, impl=target.implementation)
    (mixes,) = (t for t in results if t.shape == (given.residual.shape[0], given.base.shape[0]))
    return mixes


CASES = st.builds(
    MhcCase,
    id=st.just(""),
    function=st.sampled_from([PRE, POST, POST_PRE, HEAD, BROADCAST, DELAYED]),
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    n_streams=st.integers(1, 8),
    n_cols=st.integers(1, 70),
    delayed=st.sampled_from(["first", "mix", "x-first", "x-mix"]),
    trailing=st.booleans(),
    strides=st.sampled_from(["contiguous", "sliced", "streams", "outer", "spread"]),
    dtypes=st.sampled_from([(dtype,) for dtype in HALVES]),
)


@pytest.mark.parametrize("target", TARGETS)
def test_any_shape(target):
    """Fewer of them where each is compiled by a C compiler."""
    on_cpu = target.implementation == "triton" and not target.on_gpu

    @hypothesis.settings(max_examples=4 if on_cpu else 30, deadline=None, derandomize=True, database=None)
    @hypothesis.given(case=CASES)
    def check(case):
        check_forward(case, case.dtypes[0], target)
        check_backward(case, case.dtypes[0], target)

    check()


def test_the_grid_covers_every_pair():
    """Of values of two things that vary, wherever a CPU has time for both together."""

    def pairs(row):
        return set(itertools.combinations(enumerate(row), 2))

    rows = [(name, *row[:3], row[3][0], *row[4:]) for name, rows in spec._COVERING.items() for row in rows]
    columns = [dict.fromkeys(column) for column in zip(*rows, strict=True)]
    post = [(*row[:3], row[3][0], *row[4:]) for row in spec._COVERING_POST]
    post_columns = [dict.fromkeys(column) for column in zip(*post, strict=True)]

    def possible(row):
        tokens, h, n = row[1:4]
        in_time = tokens * h * n <= 1_700_000 or (tokens, h, n) == (8192, 1280, 1)
        plain_head = row[0] != HEAD or (row[5] == 20 and not row[6])
        return in_time and plain_head

    covered = set().union(*map(pairs, rows))
    wanted = (row for row in itertools.product(*columns) if possible(row))
    assert set().union(*map(pairs, wanted)) - covered == set()
    covered = set().union(*map(pairs, post))
    wanted = (row for row in itertools.product(*post_columns) if possible((POST, *row, 20, 0)))
    assert set().union(*map(pairs, wanted)) - covered == set()
    assert [len(column) for column in columns[1:4]] == [len(column) for column in post_columns[:3]] == [7, 5, 5]


def test_every_value_of_the_grid_has_gradients():
    cases = [case for case in spec._covering() if case.has_gradients]
    for function in {case.function for case in spec._covering()}:
        assert any(case.function == function for case in cases)
    rows = [(*row[:3], *row[3]) for rows in (*spec._COVERING.values(), spec._COVERING_POST) for row in rows]
    found = [(math.prod(case.lead), case.n_cols, case.n_streams, *case.dtypes) for case in cases]
    assert [set(column) for column in zip(*found, strict=True)] == [set(column) for column in zip(*rows, strict=True)]


def test_the_judge_sees_what_is_wrong():
    """A transposed comb, and a mean square over one stream's columns: both are refused, and what is right is not."""
    n, reference_target = 3, TARGETS[0].values[0]
    given = layer(reference_target, 5, n=n, h=40)
    wrong = {
        POST: given._replace(comb_mix=given.comb_mix.transpose(-1, -2)),
        PRE: given._replace(scale=given.scale * n**-0.5),
        POST_PRE: given._replace(comb_mix=given.comb_mix.transpose(-1, -2)),
        HEAD: given._replace(scale=given.scale * n**-0.5),
    }
    for name, inputs in INPUTS.items():
        assert not judged_in_chunks(name, given, call(name, inputs(given), "reference"), "reference")
        assert judged_in_chunks(name, given, call(name, inputs(wrong[name]), "reference"), "reference")
