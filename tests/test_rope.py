"""Properties of rotary embedding that the grid of cases does not state: what it undoes, preserves and shares."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import tilewright
from rope_helpers import TARGETS, TRITON, integers, pair_norms, random, same_bits, serve, tables
from tilewright import numerics, rope, rope_qk
from tilewright.errors import ArgumentError, DTypeError, SettingError
from tilewright.ops.rope import op

HALVES = [torch.float32, torch.bfloat16, torch.float16]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def truncates(target, dtype):
    """Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest."""
    return target.implementation == "triton" and not target.on_gpu and dtype == torch.bfloat16


# What a rotation is.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("numeric", ["exact", "hf"])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "scaled"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_undoes(target, dtype, numeric, scaling, interleaved):
    x = random(target, 2, 6, 3, 16, dtype=dtype)
    cos, sin = tables(target, scaling=scaling)
    kwargs = {"interleaved": interleaved, "numerics": numeric, "offsets": 7}
    there = serve(target, rope, x, cos, sin, **kwargs)
    back = serve(target, rope, there, cos, sin, inverse=True, **kwargs)
    assert not torch.equal(there, x)
    roundings = 2 if truncates(target, dtype) else 1
    # Each way ends in one rounding, half a unit in the last place of at most the pair's length. On the way, in float32,
    # lie a product and a sum forward, and a determinant (two products, a sum), a quotient, a product and a sum back.
    arithmetic = (2 + 3 + 3) * torch.finfo(torch.float32).eps
    bound = (roundings * torch.finfo(dtype).eps + arithmetic) * pair_norms(x, interleaved)
    assert ((back.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_relative_position_alone(target, interleaved):
    positions = 64
    cos, sin = tables(target, 16, positions, dtype=torch.float64)
    q, k = (random(target, 1, 1, 1, 16, dtype=torch.float64, seed=s).expand(1, positions, 1, 16) for s in (1, 2))
    q_out, k_out = serve(target, rope_qk, q, k, cos, sin, interleaved=interleaved)
    scores = q_out[0, :, 0] @ k_out[0, :, 0].T  # [query position, key position]
    # The angle `position * frequency` is rounded once, which moves it by up to `positions` half units; then D products
    # are summed.
    bound = torch.finfo(torch.float64).eps * (positions + 16) * q[0, 0, 0].norm() * k[0, 0, 0].norm()
    for distance in range(-positions + 1, positions):
        diagonal = scores.diagonal(distance)
        assert diagonal.max() - diagonal.min() <= 2 * bound
    assert scores[0].max() - scores[0].min() > bound * positions, "the score does not depend on the distance"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_are_preserved(target, interleaved):
    x = random(target, 2, 6, 3, 16, dtype=torch.float64)
    y = serve(target, rope, x, *tables(target, dtype=torch.float64), interleaved=interleaved)
    before, after = pair_norms(x, interleaved), pair_norms(y, interleaved)
    # Cosine, sine, two products, a sum and the norm itself, each rounded.
    assert ((after - before).abs() <= 6 * torch.finfo(torch.float64).eps * before).all()


@pytest.mark.parametrize("target", TARGETS)
def test_hugging_face_formula(target):
    """``apply_rotary_pos_emb`` of Hugging Face's Llama, in float32."""

    def rotate_half(x):
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)

    q, k = random(target, 2, 4, 5, 16), random(target, 2, 2, 5, 16, seed=1)
    position_ids = integers(target, [3, 4, 5, 6, 7], [0, 1, 2, 3, 4], dtype=torch.int64)
    cos, sin = tables(target)
    full_cos, full_sin = (torch.cat((t, t), -1)[position_ids].unsqueeze(1) for t in (cos, sin))
    expected_q = (q * full_cos) + (rotate_half(q) * full_sin)
    expected_k = (k * full_cos) + (rotate_half(k) * full_sin)
    got = serve(target, rope_qk, q, k, cos, sin, layout="bhsd", position_ids=position_ids)
    assert torch.equal(got.q, expected_q)
    assert torch.equal(got.k, expected_k)


# The same numbers, bit for bit, however the call is made.


def views_of(x):
    """The same values in every layout, as arguments of ``rope`` and a function back to ``[B, S, H, D]``."""
    batch, seqlen = x.shape[:2]
    starts = torch.arange(0, (batch + 1) * seqlen, seqlen, device=x.device, dtype=torch.int32)
    return {
        "bshd": (x, {}, lambda y: y),
        "sbhd": (x.transpose(0, 1).contiguous(), {}, lambda y: y.transpose(0, 1)),
        "bhsd": (x.transpose(1, 2).contiguous(), {}, lambda y: y.transpose(1, 2)),
        "thd": (x.reshape(batch * seqlen, *x.shape[2:]), {"cu_seqlens": starts}, lambda y: y.view(x.shape)),
        "bhsd view": (x.transpose(1, 2), {"layout": "bhsd"}, lambda y: y.transpose(1, 2)),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_agree_bitwise(target, dtype, interleaved):
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16, dtype=dtype)
    incoming = views_of(random(target, 2, 5, 3, 16, dtype=dtype, seed=1))
    results = {}
    for name, (values, given, back) in views_of(x).items():
        leaf = values.detach().requires_grad_()
        kwargs = {"layout": name} | given
        y = serve(target, rope, leaf, cos, sin, interleaved=interleaved, offsets=2, **kwargs)
        (grad,) = torch.autograd.grad(y, leaf, incoming[name][0])
        results[name] = (back(y.detach()), back(grad))
    for name, (y, grad) in results.items():
        assert same_bits(y, results["bshd"][0]), name
        assert same_bits(grad, results["bshd"][1]), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("partial", [{}, {"rotary_dim": 16, "rotary_offset": 6}], ids=["whole", "partial"])
def test_two_tensors_and_in_place_agree_bitwise(target, interleaved, partial):
    cos, sin = tables(target)
    width = 24 if partial else 16
    kwargs = {"interleaved": interleaved} | partial
    q, k = random(target, 2, 5, 5, width), random(target, 2, 5, 2, width, seed=1)
    apart = serve(target, rope, q, cos, sin, **kwargs), serve(target, rope, k, cos, sin, **kwargs)
    together = serve(target, rope_qk, q, k, cos, sin, **kwargs)
    written = rope_qk(q.clone(), k.clone(), cos, sin, inplace=True, impl=target.implementation, **kwargs)
    written_alone = rope(q.clone(), cos, sin, inplace=True, impl=target.implementation, **kwargs)
    for each in (together, written):
        assert same_bits(each.q, apart[0])
        assert same_bits(each.k, apart[1])
    assert same_bits(written_alone, apart[0])
    start = partial.get("rotary_offset", 0)
    untouched = [f for f in range(width) if not start <= f < start + 16]
    assert same_bits(apart[0][..., untouched], q[..., untouched])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_duplicated_full_table_is_the_half_table(target, interleaved):
    x, (cos, sin) = random(target, 2, 5, 3, 16), tables(target)
    double = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    results = []
    for c, s in ((cos, sin), (double(cos), double(sin))):
        leaf = x.clone().requires_grad_()
        y = serve(target, rope, leaf, c, s, interleaved=interleaved)
        results.append((y, *torch.autograd.grad(y, leaf, x)))
    for half, full in zip(*results, strict=True):
        assert same_bits(half, full)


@pytest.mark.parametrize("target", TRITON)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("numeric", ["exact", "hf"])
@pytest.mark.parametrize("full", [False, True], ids=["half", "full"])
def test_kernel_and_reference_agree_bitwise(target, dtype, interleaved, numeric, full):
    """Contraction is off in the kernel, so products are rounded as the reference rounds them."""
    if truncates(target, dtype):
        pytest.skip("Triton's interpreter truncates to bfloat16")
    x, cos, sin = random(target, 2, 5, 3, 16, dtype=dtype), *tables(target)
    if full:
        cos, sin = torch.cat((cos, cos.flip(0)), -1), torch.cat((sin, sin.flip(0)), -1)
    kwargs = {"interleaved": interleaved, "numerics": numeric}
    results = []
    for implementation in (target.implementation, "reference"):
        leaf = x.clone().requires_grad_()
        y = rope(leaf, cos, sin, impl=implementation, **kwargs)
        results.append((y, *torch.autograd.grad(y, leaf, x)))
    assert tilewright.explain("rope", x, cos, sin, impl="triton", **kwargs).chosen == "triton"
    for kernel, reference in zip(*results, strict=True):
        assert same_bits(kernel, reference)


@pytest.mark.parametrize("target", TARGETS)
def test_negated_views(target):
    """A tensor that torch negates only when it is read, as ``x.imag`` of a conjugate is."""
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16)
    assert same_bits(serve(target, rope, torch._neg_view(x), cos, sin), serve(target, rope, -x, cos, sin))


@st.composite
def calls(draw):
    """A valid call of any shape, strides, layout and way to give positions, as a function of the target."""
    layout = draw(st.sampled_from(["bshd", "sbhd", "bhsd", "thd"]))
    batch, seqlen = draw(st.integers(0, 2)), draw(st.integers(0, 9))
    heads, kv_heads = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    head_dim = 2 * draw(st.integers(1, 12))
    rotary_dim = 2 * draw(st.integers(1, head_dim // 2))
    kwargs = {
        "layout": layout,
        "rotary_dim": rotary_dim,
        "rotary_offset": draw(st.integers(0, head_dim - rotary_dim)),
        "interleaved": draw(st.booleans()),
        "inverse": draw(st.booleans()),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    width = rotary_dim if draw(st.booleans()) else rotary_dim // 2
    mode = draw(st.sampled_from(["counted", "offset", "offsets", "ids", "mrope", "packed"]))
    if mode == "packed":
        kwargs["layout"] = layout = "thd"
    order = draw(st.permutations(range(3 if layout == "thd" else 4)))
    step, slack = draw(st.sampled_from([1, 2])), draw(st.integers(0, 3))
    cuts = sorted(draw(st.lists(st.integers(0, seqlen), max_size=4)))
    seed, positions = draw(st.integers(0, 99)), 24

    def build(target):
        def tensor(n_heads, seed):
            sizes = {"b": batch, "s": seqlen, "t": seqlen, "h": n_heads, "d": head_dim}
            shape = [sizes[axis] for axis in layout]
            stored = [shape[axis] for axis in order]
            stored[-1] = stored[-1] * step + slack
            lying = random(target, *stored, dtype=dtype, seed=seed)[..., slack:][..., ::step]
            return lying.permute([order.index(axis) for axis in range(len(shape))])

        rows = (seqlen,) if layout == "thd" else (batch, seqlen)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(-3, positions, (3, *rows), generator=generator).to(target.device)
        starts = torch.arange(1 if layout == "thd" else batch, device=target.device) - 1
        given = {
            "counted": {},
            "offset": {"offsets": 4 - seed % 9},
            "offsets": {"offsets": starts},
            "ids": {"position_ids": ids[0]},
            "mrope": {"position_ids": ids, "mrope_section": (rotary_dim // 2, 0, 0)},
            "packed": {"cu_seqlens": integers(target, 0, *cuts)},
        }[mode]
        if mode == "mrope" and rotary_dim >= 6:
            third = rotary_dim // 6
            given["mrope_section"] = (rotary_dim // 2 - 2 * third, third, third)
            given["mrope_interleaved"] = seed % 2 == 0
        angle = random(target, positions, width, dtype=torch.float64, seed=seed + 1)
        if width == rotary_dim and kwargs["inverse"]:  # halves that differ by too much have no inverse
            first = angle[:, : width // 2]
            angle = first.repeat_interleave(2, -1) if kwargs["interleaved"] else torch.cat((first, first), -1)
        rotated = (tensor(heads, seed), tensor(kv_heads, seed + 2)) if kv_heads else (tensor(heads, seed),)
        return rotated, (angle.cos().float(), angle.sin().float()), kwargs | given

    return build


@pytest.mark.parametrize("target", TRITON)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(build=calls())
def test_any_call_agrees_with_reference_and_truth(target, build):
    rotated, table, kwargs = build(target)
    function = rope_qk if len(rotated) == 2 else rope
    kernel = serve(target, function, *rotated, *table, **kwargs)
    reference = function(*rotated, *table, impl="reference", **kwargs)
    truth = function(*(x.double() for x in rotated), *(t.double() for t in table), impl="reference", **kwargs)
    if function is rope:
        kernel, reference, truth = (kernel,), (reference,), (truth,)
    for x, result, same_dtype, exact in zip(rotated, kernel, reference, truth, strict=True):
        agreement = numerics.compare(result, same_dtype, exact)
        assert agreement.ok, agreement
        assert result.stride() == torch.empty_like(x).stride()
        if not kwargs["inverse"] and not truncates(target, x.dtype):  # a GPU divides approximately
            assert same_bits(result, same_dtype)


# Values of settings.


def test_a_setting_that_is_neither_yes_nor_no(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CHECK_DEVICE_VALUES", "maybe")
    x, table = torch.empty(1, 4, 2, 8, device="meta"), torch.empty(4, 4, device="meta")
    with pytest.raises(SettingError, match="TILEWRIGHT_CHECK_DEVICE_VALUES='maybe'"):
        rope(x, table, table, position_ids=torch.empty(4, dtype=torch.int32, device="meta"))
    assert rope(x, table, table).shape == x.shape, "a call that has no values to check does not read the setting"


# Calls that were wrong leave nothing behind.


@pytest.mark.parametrize("wrong", [{"rotary_dim": 16.0}, {"rotary_offset": 0.0}, {"interleaved": 0}, {"inverse": 0}])
@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_call_does_not_spoil_the_right_one(target, wrong):
    """Options that compare equal but are of another type are refused and not remembered."""
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16)
    right = {name: int(value) if isinstance(value, float) else bool(value) for name, value in wrong.items()}
    expected = rope(x, cos, sin, **right, impl=target.implementation)
    op._PLANS._plans.clear()
    with pytest.raises(DTypeError) as caught:
        rope(x, cos, sin, **wrong, impl=target.implementation)
    assert caught.value.argument == next(iter(wrong))
    assert same_bits(rope(x, cos, sin, **right, impl=target.implementation), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_features_far_apart(target):
    """Features whose offsets pass 2**31 elements, in a view of memory that is mostly never touched."""
    far = 2**31 // 6 + 7
    base = torch.empty(7 * far + 8, dtype=torch.float16, device=target.device)
    x = base.as_strided((1, 1, 1, 8), (1, 1, 1, far))
    x.copy_(random(target, 1, 1, 1, 8))
    cos, sin = (t[:, :4] for t in tables(target))
    dense = serve(target, rope, x.contiguous(), cos, sin)
    assert same_bits(serve(target, rope, x, cos, sin), dense)


@pytest.mark.parametrize("target", TARGETS)
def test_heads_shared_by_q_and_k_are_not_rotated_twice(target):
    cos, sin = tables(target)
    heads = random(target, 2, 5, 6, 16)
    for q, k in ((heads, heads), (heads[:, :, :4], heads[:, :, 3:])):
        with pytest.raises(ArgumentError) as caught:
            rope_qk(q, k, cos, sin, inplace=True, impl=target.implementation)
        assert caught.value.argument == "k"
    rope_qk(heads[:, :, :4], heads[:, :, 4:], cos, sin, inplace=True, impl=target.implementation)


def test_the_operator_refuses_to_drop_the_gradient_of_a_table():
    tilewright.register()
    x, table = torch.ones(1, 4, 1, 8, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    with pytest.raises(ArgumentError) as caught:
        torch.ops.tilewright.rope(x, table.detach(), table)
    assert caught.value.argument == "sin"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [2, 16])
def test_tables_of_one_position_whose_strides_differ(target, head_dim):
    """The stride of a dimension of one is anything, and copying does not change it."""
    cos, sin = tables(target, head_dim, 1)
    x = random(target, 2, 1, 3, head_dim)
    wide = torch.cat((cos, cos, cos), 1)[:, : head_dim // 2]
    assert same_bits(serve(target, rope, x, wide, sin), serve(target, rope, x, cos, sin))
