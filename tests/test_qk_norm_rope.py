"""Norms and rotation of queries and keys in one launch: held against the two steps, with its gradients and graphs."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch._dynamo.testing import CompileCounter

import tilewright
from rope_helpers import TARGETS, integers, random, same_bits, serve, tables
from tilewright import numerics, qk_norm_rope, rms_norm, rope_qk, use
from tilewright.errors import ArgumentError
from tilewright.ops.qk_norm_rope import op
from tilewright.ops.qk_norm_rope.call import Inputs, Options, describe
from tilewright.ops.qk_norm_rope.launch import launch_parameters
from tilewright.ops.qk_norm_rope.spec import FAMILY
from tilewright.platforms import DeviceFacts, facts
from tilewright.testing import Target, check_backward, check_forward

tilewright.register()
NAMES = ("q", "k", "q_weight", "k_weight")
NORM = ("eps", "weight_offset", "cast")
CASES = {case.id: case for case in FAMILY.cases}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(target, head_dim=16, heads=(3, 1), tokens=(2, 5), dtype=torch.float32, wanted=()):
    """``q``, ``k`` and their weights; those in ``wanted`` require a gradient."""
    q, k = (random(target, *tokens, n, head_dim, dtype=dtype, seed=n) for n in heads)
    weights = (random(target, head_dim, dtype=dtype, seed=seed) for seed in (10, 11))
    return [t.requires_grad_(name in wanted) for name, t in zip(NAMES, (q, k, *weights), strict=True)]


def steps(target, q, k, q_weight, k_weight, *table, **kwargs):
    """The two steps one after the other, by the target's implementation."""
    norm = {name: kwargs.pop(name) for name in NORM if name in kwargs}
    q, k = (
        serve(target, rms_norm, x, weight, **norm) if x.numel() else x for x, weight in ((q, q_weight), (k, k_weight))
    )
    return serve(target, rope_qk, q, k, *table, **kwargs)


# The steps.

MODES = [
    {},
    {"interleaved": True},
    {"cast": "after_weight", "eps": 1e-2},
    {"weight_offset": 1.0, "offsets": 3},
    {"rotary_dim": 8, "rotary_offset": 8},
    {"rotary_dim": 8, "rotary_offset": 4, "interleaved": True},
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_the_steps(target, kwargs, dtype):
    given = tensors(target, dtype=dtype)
    table = tables(target, kwargs.get("rotary_dim", 16))
    got, expected = serve(target, qk_norm_rope, *given, *table, **kwargs), steps(target, *given, *table, **kwargs)
    assert same_bits(got.q, expected.q)
    assert same_bits(got.k, expected.k)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 192, 256, 512])
def test_bits_of_the_steps_at_every_size(target, head_dim, dtype, interleaved):
    """Rows of one chunk and of several, and tiles with empty lanes."""
    for heads, tokens in (((5, 2), (2, 3)), ((1, 1), (1, 1)), ((32, 8), (1, 9))):
        given = tensors(target, head_dim, heads, tokens, dtype)
        table = tables(target, head_dim)
        got = serve(target, qk_norm_rope, *given, *table, interleaved=interleaved)
        expected = steps(target, *given, *table, interleaved=interleaved)
        assert same_bits(got.q, expected.q)
        assert same_bits(got.k, expected.k)


@pytest.mark.parametrize("target", TARGETS)
def test_parts_of_a_fused_projection(target):
    """The heads of ``q`` and ``k`` lie side by side, and nothing is copied."""
    qkv = random(target, 2, 5, 6, 64, dtype=torch.bfloat16)
    given = (qkv[:, :, :3], qkv[:, :, 3:4], *tensors(target, 64, dtype=torch.bfloat16)[2:])
    table = tables(target, 64)
    got, expected = serve(target, qk_norm_rope, *given, *table), steps(target, *given, *table)
    assert same_bits(got.q, expected.q)
    assert same_bits(got.k, expected.k)
    assert got.q.is_contiguous()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("missing", ["q_weight", "k_weight", "both"])
@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
def test_without_a_weight(target, missing, cast):
    given = tensors(target, dtype=torch.bfloat16)
    for index in {"q_weight": (2,), "k_weight": (3,), "both": (2, 3)}[missing]:
        given[index] = None
    table = tables(target)
    got = serve(target, qk_norm_rope, *given, *table, cast=cast)
    expected = steps(target, *given, *table, cast=cast)
    assert same_bits(got.q, expected.q)
    assert same_bits(got.k, expected.k)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ["sin", "weight", "cos"])
def test_tensors_that_are_spread(target, what):
    """Tables of unequal strides, and columns that are not adjacent."""
    q, k, q_weight, k_weight = tensors(target)
    cos, sin = tables(target)
    expected = serve(target, qk_norm_rope, q, k, q_weight, k_weight, cos, sin)
    if what == "sin":
        sin = sin.t().contiguous().t()
    elif what == "cos":
        cos, sin = (torch.stack((t, t), -1)[..., 0] for t in (cos, sin))
    else:
        k_weight = torch.stack((k_weight, k_weight), -1)[:, 0]
    got = serve(target, qk_norm_rope, q, k, q_weight, k_weight, cos, sin)
    assert same_bits(got.q, expected.q)
    assert same_bits(got.k, expected.k)


@pytest.mark.parametrize("target", TARGETS)
def test_tables_of_one_position_whose_strides_differ(target):
    given = tensors(target, tokens=(2, 1))
    cos, sin = tables(target, positions=1)
    wide = torch.cat((cos, cos), 1)[:, : cos.shape[1]]
    assert same_bits(serve(target, qk_norm_rope, *given, wide, sin).q, serve(target, qk_norm_rope, *given, cos, sin).q)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strides", [(1, 1, 1, 1), (7, 1, 16, 1), (16, 16, 3, 1)], ids=str)
def test_strides_of_dimensions_of_one(target, strides):
    """They say nothing, and 1 among them is compiled as a constant."""
    q, k, *rest = tensors(target, tokens=(1, 1), heads=(1, 2))
    rest += tables(target)
    expected = serve(target, qk_norm_rope, q, k, *rest, offsets=3)
    got = serve(target, qk_norm_rope, q.as_strided(q.shape, strides), k, *rest, offsets=3)
    assert same_bits(got.q, expected.q)
    assert same_bits(got.k, expected.k)


@pytest.mark.parametrize("target", TARGETS)
def test_outside_the_table_the_norm_alone(target):
    q, k, q_weight, k_weight = tensors(target, dtype=torch.bfloat16)
    positions = integers(target, -1, -7, -1, -2, -1)
    got = serve(target, qk_norm_rope, q, k, q_weight, k_weight, *tables(target), position_ids=positions)
    assert same_bits(got.q, serve(target, rms_norm, q, q_weight))
    assert same_bits(got.k, serve(target, rms_norm, k, k_weight))


@pytest.mark.parametrize("target", TARGETS)
def test_a_token_does_not_depend_on_the_others(target):
    q, k, *weights = tensors(target, 64, (8, 2), (4, 16), torch.bfloat16)
    table = tables(target, 64)
    together = serve(target, qk_norm_rope, q, k, *weights, *table)
    for batch, token in ((0, 0), (2, 7), (3, 15)):
        one = (slice(batch, batch + 1), slice(token, token + 1))
        alone = serve(target, qk_norm_rope, q[one], k[one], *weights, *table, offsets=token)
        assert same_bits(alone.q, together.q[one])
        assert same_bits(alone.k, together.k[one])


@pytest.mark.parametrize("target", TARGETS)
def test_hugging_face_formula(target):
    """``Qwen3RMSNorm`` of each head, then ``apply_rotary_pos_emb``, in float32."""

    def by_hand(q, k, q_weight, k_weight, cos, sin):
        results = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            normed = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            first, second = normed.chunk(2, -1)
            c, s = (torch.cat((t, t), -1)[None, : x.shape[1], None] for t in (cos, sin))
            results.append(normed * c + torch.cat((-second, first), -1) * s)
        return results

    given = (*tensors(target), *tables(target))
    got, truth = serve(target, qk_norm_rope, *given), by_hand(*(t.double() for t in given))
    for result, reference, exact in zip(got, by_hand(*given), truth, strict=True):
        assert numerics.compare(result, reference, exact).ok


def test_explain_and_use():
    q, k, *weights = tensors(Target("reference", torch.device("cpu")))
    table = tilewright.rope_table(16, 8)
    explained = tilewright.explain("qk_norm_rope", q, k, None, None, *table, impl="reference")
    assert explained.chosen == "reference"
    assert explained.shape == (
        "bshd, 2 x 5 tokens, 3+1 heads, 16 of 16 features rotated, half pairs, no weight, cast before_weight"
    )
    assert "weight for q and k" in tilewright.explain("qk_norm_rope", q, k, *weights, *table).shape
    with use("reference"):
        assert tilewright.explain("qk_norm_rope", q, k, *weights, *table).chosen == "reference"


@pytest.mark.parametrize("target", TARGETS)
def test_plans_are_told_apart(target):
    given, table = tensors(target), tables(target)
    results = [
        serve(target, qk_norm_rope, *given, *table, **kwargs).q
        for kwargs in ({}, {"eps": 0.5}, {"weight_offset": 1.0}, {"interleaved": True}, {"offsets": 2})
    ]
    for index, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[:index])
    before = len(op._PLANS)
    serve(target, qk_norm_rope, *given, *table, offsets=7)
    assert len(op._PLANS) == before, "an offset makes no new plan"


def test_an_offset_past_the_table_is_refused_by_an_old_plan():
    given = tensors(Target("reference", torch.device("cpu")))
    table = tilewright.rope_table(16, 8)
    qk_norm_rope(*given, *table, offsets=3)
    with pytest.raises(ArgumentError, match="position 8") as caught:
        qk_norm_rope(*given, *table, offsets=4)
    assert (caught.value.operation, caught.value.argument) == ("qk_norm_rope", "cos")


# Gradients.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_steps(target, kwargs, dtype):
    outcomes = []
    for call in (partial(serve, target, qk_norm_rope), partial(steps, target)):
        leaves = tensors(target, dtype=dtype, wanted=NAMES)
        results = call(*leaves, *tables(target, kwargs.get("rotary_dim", 16)), **kwargs)
        incoming = [random(target, *y.shape, dtype=dtype, seed=7) for y in results]
        outcomes.append(torch.autograd.grad(tuple(results), leaves, incoming))
    for got, expected in zip(*outcomes, strict=True):
        assert same_bits(got, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_of_gradients(target, kwargs, weighted):
    if not weighted:
        kwargs = {name: value for name, value in kwargs.items() if name != "weight_offset"}
    leaves = tensors(target, heads=(2, 1), tokens=(1, 2), dtype=torch.float64, wanted=NAMES)[: 4 if weighted else 2]
    table = tables(target, kwargs.get("rotary_dim", 16), dtype=torch.float64)

    def call(q, k, q_weight=None, k_weight=None):
        return tuple(serve(target, qk_norm_rope, q, k, q_weight, k_weight, *table, **kwargs))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wanted", NAMES)
def test_only_one_requires_a_gradient(target, wanted):
    def gradients(*names):
        leaves = tensors(target, dtype=torch.bfloat16, wanted=names)
        q, k = serve(target, qk_norm_rope, *leaves, *tables(target))
        (q.square().sum() + k.square().sum()).backward()
        return {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}

    alone, all_of_them = gradients(wanted), gradients(*NAMES)
    assert [name for name, grad in alone.items() if grad is not None] == [wanted]
    assert same_bits(alone[wanted], all_of_them[wanted])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("which", ["q", "k"])
def test_only_one_result_is_used(target, which):
    leaves = tensors(target, wanted=NAMES)
    getattr(serve(target, qk_norm_rope, *leaves, *tables(target)), which).sum().backward()
    used = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    for name, grad in used.items():
        assert grad is None or bool(grad.any()) == name.startswith(which)
    assert used[which] is not None


@pytest.mark.parametrize("target", TARGETS)
def test_saved_tensors(target):
    leaves, table, saved = tensors(target, wanted=NAMES), tables(target), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        serve(target, qk_norm_rope, *leaves, *table)
    allowed = {t.untyped_storage().data_ptr() for t in (*leaves, *table)}
    assert {t.untyped_storage().data_ptr() for t in saved} == allowed


@pytest.mark.parametrize("target", TARGETS)
def test_checkpointing(target):
    """It allows what was saved to be asked for once."""
    table, outcomes = tables(target), []

    def block(*given):
        return [y.square() for y in serve(target, qk_norm_rope, *given, *table)]

    for run in (block, partial(torch.utils.checkpoint.checkpoint, block, use_reentrant=False)):
        leaves = tensors(target, wanted=NAMES)
        outcomes.append(torch.autograd.grad([y.sum() for y in run(*leaves)], leaves))
    for expected, got in zip(*outcomes, strict=True):
        assert same_bits(got, expected)


@pytest.mark.parametrize("which", ["cos", "sin"])
@pytest.mark.parametrize("registered", [False, True])
def test_tables_have_no_gradient(which, registered):
    given = tensors(Target("reference", torch.device("cpu")))
    table = dict(zip(("cos", "sin"), tilewright.rope_table(16, 8), strict=True))
    table[which] = table[which].clone().requires_grad_()
    call = torch.ops.tilewright.qk_norm_rope if registered else qk_norm_rope
    with pytest.raises(ArgumentError) as caught:
        call(*given, table["cos"], table["sin"])
    assert caught.value.argument == which
    with torch.no_grad():
        call(*given, table["cos"], table["sin"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(target, mode):
    leaves, table = tensors(target, wanted=NAMES), tables(target)
    expected = serve(target, qk_norm_rope, *leaves, *table)
    with mode():
        got = serve(target, qk_norm_rope, *leaves, *table)
    assert expected.q.requires_grad
    assert not got.q.requires_grad
    assert same_bits(got.q, expected.q.detach())


# Graphs.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kwargs", MODES, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_equals_eager(target, kwargs, grad):
    table = tables(target, kwargs.get("rotary_dim", 16))

    def model(*given):
        return tuple(qk_norm_rope(*given, *table, **kwargs, impl=target.implementation))

    outcomes = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        leaves = tensors(target, wanted=NAMES if grad else ())
        results = run(*leaves)
        gradients = torch.autograd.grad([y.square().sum() for y in results], leaves) if grad else ()
        outcomes.append((*results, *gradients))
    for eager, other in zip(*outcomes, strict=True):
        assert torch.equal(eager, other)


DYNAMIC = {
    "batch": lambda n: ((n, 5), {}),
    "sequence": lambda n: ((2, n), {}),
    "offset": lambda n: ((2, 5), {"offsets": n}),
    "offsets": lambda n: ((n, 5), {"offsets": torch.arange(n)}),
}


@pytest.mark.parametrize("what", DYNAMIC)
@pytest.mark.parametrize("grad", [False, True])
def test_one_recompilation_at_most(what, grad):
    cpu, counter = Target("reference", torch.device("cpu")), CompileCounter()
    table = tilewright.rope_table(16, 32)
    run = torch.compile(lambda *t, **kwargs: qk_norm_rope(*t, *table, **kwargs), fullgraph=True, backend=counter)
    for n in (2, 3, 5, 6):
        tokens, kwargs = DYNAMIC[what](n)
        given = tensors(cpu, tokens=tokens, wanted=NAMES if grad else ())
        assert torch.equal(run(*given, **kwargs).k, qk_norm_rope(*given, *table, **kwargs).k)
    assert counter.frame_count <= 2


def test_dynamic_from_the_start():
    cpu, counter = Target("reference", torch.device("cpu")), CompileCounter()
    table = tilewright.rope_table(16, 32)
    run = torch.compile(lambda *t: qk_norm_rope(*t, *table), fullgraph=True, backend=counter, dynamic=True)
    for n in (2, 3, 5):
        given = tensors(cpu, heads=(7, 1), tokens=(n, n + 1))
        assert torch.equal(run(*given).q, qk_norm_rope(*given, *table).q)
    assert counter.frame_count == 1


OPCHECK = (
    "small",
    "thd-interleaved",
    "q-weight-alone",
    "offset-after-weight",
    "bshd-offsets",
    "thd-cu_seqlens-offsets",
    "mrope_interleaved",
    "context_parallel",
    "partial-middle-interleaved",
    "angles",
    "permuted-bshd",
    "spread-bhsd",
    "empty-heads",
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [CASES[name] for name in OPCHECK], ids=lambda case: case.id)
def test_opcheck(case, target):
    args, kwargs = case.arguments(target.device, torch.float32)
    kwargs = {name: list(value) if isinstance(value, tuple) else value for name, value in kwargs.items()}
    kwargs["impl"] = target.implementation
    if "offsets" in kwargs and not isinstance(kwargs["offsets"], torch.Tensor):
        kwargs["offset"] = kwargs.pop("offsets")
    leaves = [None if t is None else t.detach().requires_grad_() for t in args[:4]]
    torch.library.opcheck(torch.ops.tilewright.qk_norm_rope.default, (*leaves, *args[4:]), kwargs)


def test_default_arguments_are_the_functions():
    given = tensors(Target("reference", torch.device("cpu")))
    cos, sin = tilewright.rope_table(16, 8)
    operator = torch.ops.tilewright.qk_norm_rope
    for ours, theirs in (
        (qk_norm_rope(*given, cos, sin), operator(*given, cos, sin)),
        (qk_norm_rope(*given, cos), operator(*given, cos)),
        (qk_norm_rope(*given, cos, sin, offsets=2), operator(*given, cos, sin, offset=2)),
    ):
        assert torch.equal(ours.q, theirs[0])
        assert torch.equal(ours.k, theirs[1])


# As on a GPU, on the CPU: the launch parameters of one, which cut long rows into chunks.

GPU = DeviceFacts("nvidia", "sm_90", n_units=3, triton="compiled")


@pytest.mark.skipif(not facts(torch.device("cpu")).triton, reason="Triton kernels do not run on this CPU")
@pytest.mark.parametrize(
    "name",
    ["small", "bshd-half", "bhsd-interleaved", "partial-middle-interleaved", "head_dim-512", "decode", "spread-bhsd"],
)
def test_with_parameters_of_a_gpu(name, monkeypatch):
    from tilewright.ops.qk_norm_rope import kernels

    monkeypatch.setattr(kernels, "facts", lambda device: GPU)
    monkeypatch.setattr(op, "_PLANS", type(op._PLANS)())
    case, cpu = CASES[name], Target("triton", torch.device("cpu"))
    check_forward(case, case.dtypes[-1], cpu)
    check_backward(case, case.dtypes[-1], cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (13, 5)])
@pytest.mark.parametrize("tokens", [(1, 1), (64, 1), (2, 4096)])
def test_every_thread_has_a_wide_load_of_a_row(head_dim, heads, tokens, dtype):
    """So a row lies over the threads as in RMSNorm's kernel, and its sum has the same order."""
    q, k = (torch.empty(*tokens, n, head_dim, dtype=dtype, device="meta") for n in heads)
    table = torch.empty(4096, head_dim // 2, device="meta")
    call = describe(Inputs(q, k, None, None, table, table, None, None, None), 0, Options())
    for device in (GPU, dataclasses.replace(GPU, kind="cpu")):
        tile, row = launch_parameters(call, q, device)
        if device.kind == "cpu":
            assert row.chunk >= head_dim
        else:
            assert tile.tokens * tile.heads * row.chunk >= tile.num_warps * 32 * row.vector
            assert row.chunk >= head_dim or row.chunk == 32 * row.vector
