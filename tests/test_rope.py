"""Properties of rotary embedding that the grid of cases does not state: what it undoes, preserves, shares and saves."""

import math
import threading

import hypothesis
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import strategies as st

import tilewright
from tilewright import numerics, rope, rope_from_angles, rope_qk, rope_table
from tilewright.errors import ArgumentError, SettingError, TilewrightError
from tilewright.testing import targets

TARGETS = [pytest.param(t, id=str(t), marks=[pytest.mark.gpu] if t.on_gpu else []) for t in targets()]
TRITON = [p for p in TARGETS if p.values[0].implementation == "triton"]
GPU_TRITON = [p for p in TRITON if p.values[0].on_gpu] or [
    pytest.param(None, marks=[pytest.mark.gpu, pytest.mark.skip(reason="no GPU on this machine")], id="no-gpu")
]
HALVES = [torch.float32, torch.bfloat16, torch.float16]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


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


def truncates(target, dtype):
    """Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest."""
    return target.implementation == "triton" and not target.on_gpu and dtype == torch.bfloat16


def pair_norms(x, interleaved=False):
    """Length of each feature's pair, at each feature, in float64."""
    x = x.double()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    norm = torch.hypot(first, second)
    return torch.stack((norm, norm), -1).flatten(-2) if interleaved else torch.cat((norm, norm), -1)


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


# Where positions come from, against transcriptions of other libraries.


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


def transformer_engine_position(token, length, start, rank, size):
    """Position of a rank's token as ``fused_rope_block_forward`` of Transformer Engine finds it."""
    position = token + start
    if size > 1:
        if token < length // 2:
            position += rank * length // 2
        else:
            position += length * size - (rank + 1) * length // 2 - length // 2
    return position


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_context_parallel_positions_are_transformer_engines(target, size):
    length, start = 4, 3
    frequencies = [100.0 ** (-i / 4) for i in range(4)]
    cos, sin = tables(target, 8, length * size + start, base=100.0, dtype=torch.float64)
    for rank in range(size):
        x = random(target, 1, length, 2, 8, dtype=torch.float64, seed=rank)
        positions = [transformer_engine_position(t, length, start, rank, size) for t in range(length)]
        truth = rotated_by_hand(x[0], positions, frequencies)
        got = serve(target, rope, x, cos, sin, context_parallel=(rank, size), offsets=start)
        agreement = numerics.compare(got[0], truth, truth)
        assert agreement.ok, agreement


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "thd"])
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_together_rotate_the_whole(target, layout, size):
    """Each rank takes chunk ``rank`` and its mirror image, as Transformer Engine and Megatron cut a sequence."""
    lengths = [2 * size, 6 * size, 0, 4 * size] if layout == "thd" else [4 * size]
    token_axis = layout.index("t" if layout == "thd" else "s")
    shape = [{"b": 2, "s": lengths[0], "t": sum(lengths), "h": 3, "d": 8}[axis] for axis in layout]
    x, (cos, sin) = random(target, *shape), tables(target, 8)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    kwargs = {"layout": layout} | ({"cu_seqlens": integers(target, *ends)} if layout == "thd" else {})
    whole = serve(target, rope, x, cos, sin, **kwargs)
    seen = 0
    for rank in range(size):
        kept = []
        for begin, length in zip(ends, lengths, strict=False):
            chunk = length // (2 * size)
            for index in (rank, 2 * size - 1 - rank):
                kept += range(begin + index * chunk, begin + (index + 1) * chunk)
        tokens = integers(target, *kept, dtype=torch.int64)
        part = serve(
            target, rope, x.index_select(token_axis, tokens), cos, sin, context_parallel=(rank, size), **kwargs
        )
        assert same_bits(part, whole.index_select(token_axis, tokens))
        seen += len(kept)
    assert seen == sum(lengths)


@pytest.mark.parametrize("target", TARGETS)
def test_one_rank_is_no_context_parallelism(target):
    """A program that passes its rank and world size unconditionally decodes one token at a time on one rank."""
    x, (cos, sin) = random(target, 2, 1, 3, 16), tables(target)
    kwargs = {"offsets": integers(target, 4, 9)}
    expected = serve(target, rope, x, cos, sin, **kwargs)
    assert same_bits(serve(target, rope, x, cos, sin, context_parallel=(0, 1), **kwargs), expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("section", [(4, 2, 2), (3, 3, 2), (6, 1, 1)], ids=str)
def test_mrope_follows_qwen(target, interleaved, section):
    def qwen2(cos):  # apply_multimodal_rotary_pos_emb
        return torch.cat([m[i % 3] for i, m in enumerate(cos.split([*section, *section], dim=-1))], dim=-1)

    def qwen3(freqs):  # apply_interleaved_mrope
        mixed = freqs[0].clone()
        for row, first in enumerate((1, 2), start=1):
            which = slice(first, section[row] * 3, 3)
            mixed[..., which] = freqs[row, ..., which]
        return mixed

    batch, seqlen, pairs = 2, 5, sum(section)
    generator = torch.Generator().manual_seed(3)
    position_ids = torch.randint(0, 20, (3, batch, seqlen), generator=generator)
    frequency = torch.tensor([50.0 ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
    freqs = position_ids.double()[..., None] * frequency  # [3, B, S, pairs]
    if interleaved:
        mixed = qwen3(freqs)
        cos, sin = (torch.cat((f, f), -1) for f in (mixed.cos(), mixed.sin()))
    else:
        cos, sin = (qwen2(torch.cat((f, f), -1)) for f in (freqs.cos(), freqs.sin()))
    x = random(target, batch, 3, seqlen, 2 * pairs, dtype=torch.float64)
    half = torch.cat((-x[..., pairs:], x[..., :pairs]), -1)
    truth = x * cos.unsqueeze(1).to(target.device) + half * sin.unsqueeze(1).to(target.device)
    table = tables(target, 2 * pairs, 20, base=50.0, dtype=torch.float64)
    kwargs = {
        "position_ids": position_ids.to(target.device),
        "mrope_section": section,
        "mrope_interleaved": interleaved,
    }
    got = serve(target, rope, x, *table, layout="bhsd", **kwargs)
    agreement = numerics.compare(got, truth, truth)
    assert agreement.ok, agreement


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_of_transformer_engine(target, interleaved):
    """``[P, 1, 1, D]`` angles of which each feature follows its own, as apex's tests draw them."""
    x = random(target, 5, 2, 3, 8, dtype=torch.float64)
    angles = random(target, 9, 1, 1, 8, dtype=torch.float64, seed=1)
    a = angles[:5]
    if interleaved:
        other = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    else:
        other = torch.cat((-x[..., 4:], x[..., :4]), -1)
    truth = x * a.cos() + other * a.sin()
    got = serve(target, rope_from_angles, x, angles, layout="sbhd", interleaved=interleaved)
    agreement = numerics.compare(got, truth, truth)
    assert agreement.ok, agreement
    assert same_bits(got, serve(target, rope_from_angles, x, angles.view(9, 8), layout="sbhd", interleaved=interleaved))


@pytest.mark.parametrize("target", TARGETS)
def test_many_sequences(target):
    """More sequences than a grid's second axis holds, empty ones among them."""
    n = 70_001
    lengths = torch.arange(n) % 3  # 0, 1, 2, 0, ...
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(target.device, torch.int32)
    position = torch.cat([torch.arange(length) for length in (0, 1, 2)]).repeat(n // 3 + 1)[: int(lengths.sum())]
    x, (cos, sin) = random(target, int(lengths.sum()), 1, 4), tables(target, 4, 2)
    packed = serve(target, rope, x, cos, sin, layout="thd", cu_seqlens=starts)
    given = serve(target, rope, x, cos, sin, layout="thd", position_ids=position.to(target.device))
    assert same_bits(packed, given)


# Tokens that are not rotated.

SPECIAL = [-0.0, math.inf, math.nan, 1.0, -1.0, -math.inf, 2.0, -0.0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("values", ["random", "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tokens_outside_pass_through(target, values, dtype, interleaved):
    """Padding may hold anything, and keeps it: infinities, NaNs and the sign of zero."""
    x = random(target, 7, 2, 8, dtype=dtype)
    if values == "special":
        x[:] = torch.tensor(SPECIAL, dtype=dtype, device=target.device)
    cos, sin = tables(target, 8, 4)
    kwargs = {"layout": "thd", "interleaved": interleaved}
    packed = serve(target, rope, x, cos, sin, cu_seqlens=integers(target, 0, 2, 2, 4), **kwargs)
    none = serve(target, rope, x, cos, sin, cu_seqlens=integers(target, 0), **kwargs)
    before = serve(target, rope, x, cos, sin, position_ids=integers(target, 0, 1, 2, 3, -1, -2, -9), **kwargs)
    counted = serve(target, rope, x, cos, sin, offsets=-4, **kwargs)
    pairs = [(packed[4:], x[4:]), (none, x), (before[4:], x[4:]), (counted[:4], x[:4])]
    assert not same_bits(packed[1:2], x[1:2])
    for got, expected in pairs:
        assert same_bits(got, expected)


@pytest.mark.parametrize("target", [p for p in TARGETS if p.values[0].on_gpu] or GPU_TRITON)
def test_positions_past_the_table_pass_through(target, monkeypatch):
    """On a device, values are not checked, and no access is out of bounds."""
    monkeypatch.delenv("TILEWRIGHT_CHECK_DEVICE_VALUES", raising=False)
    x, (cos, sin) = random(target, 1, 4, 2, 8), tables(target, 8, 4)
    y = serve(target, rope, x, cos, sin, position_ids=integers(target, 1, 4, 2**31 - 1, -1))
    assert not same_bits(y[:, :1], x[:, :1])
    assert same_bits(y[:, 1:], x[:, 1:])


@pytest.mark.parametrize("target", TARGETS)
def test_negative_offsets_count_from_before_the_table(target):
    x, (cos, sin) = random(target, 1, 6, 2, 8), tables(target, 8, 4)
    y = serve(target, rope, x, cos, sin, offsets=-2)
    assert same_bits(y[:, :2], x[:, :2])
    assert same_bits(y[:, 2:], serve(target, rope, x[:, 2:], cos, sin))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8)], ids=["batch", "sequence", "heads"])
def test_nothing_to_rotate(target, shape):
    x = random(target, *shape).requires_grad_()
    cos, sin = tables(target, 8, 8)
    y = serve(target, rope, x, cos, sin)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    q, k = serve(target, rope_qk, x.detach(), x.detach().clone(), cos, sin, inplace=True)
    assert q.shape == k.shape == x.shape


# Gradients and autograd.

MODES = [
    {},
    {"interleaved": True, "offsets": 3},
    {"inverse": True},
    {"rotary_dim": 4, "rotary_offset": 2},
    {"layout": "bhsd", "position_ids": [1, 0, -1]},
]


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


@pytest.mark.parametrize("target", TARGETS)
def test_negated_views(target):
    """A tensor that torch negates only when it is read, as ``x.imag`` of a conjugate is."""
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16)
    assert same_bits(serve(target, rope, torch._neg_view(x), cos, sin), serve(target, rope, -x, cos, sin))


# Values of settings.


def test_a_setting_that_is_neither_yes_nor_no(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CHECK_DEVICE_VALUES", "maybe")
    x, table = torch.empty(1, 4, 2, 8, device="meta"), torch.empty(4, 4, device="meta")
    with pytest.raises(SettingError, match="TILEWRIGHT_CHECK_DEVICE_VALUES='maybe'"):
        rope(x, table, table, position_ids=torch.empty(4, dtype=torch.int32, device="meta"))
    assert rope(x, table, table).shape == x.shape, "a call that has no values to check does not read the setting"


# Beyond 2**31 elements, and other things that only a GPU can show.


def needs_memory(target, gibibytes):
    free, _ = torch.cuda.mem_get_info(target.device)
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of device memory")


@pytest.mark.parametrize("target", GPU_TRITON)
def test_more_than_two_to_the_31_elements(target):
    needs_memory(target, 10)
    seqlen = 65536 + 1
    x = torch.empty(seqlen, 4, 64, 128, dtype=torch.bfloat16, device=target.device)
    assert x.numel() > 2**31
    x[-2:] = random(target, 2, 4, 64, 128, dtype=torch.bfloat16)
    cos, sin = tables(target, 128, seqlen)
    y = serve(target, rope, x, cos, sin, layout="sbhd")
    last = torch.arange(seqlen - 2, seqlen, device=target.device)
    expected = rope(x[-2:], cos, sin, layout="sbhd", position_ids=last, impl="reference")
    assert same_bits(y[-2:], expected)
    del y
    rope(x, cos, sin, layout="sbhd", inplace=True, impl="triton")
    assert same_bits(x[-2:], expected)


@pytest.mark.parametrize("target", GPU_TRITON)
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "token", "head"])
def test_a_view_that_spans_more_than_two_to_the_31_elements(target, axis):
    needs_memory(target, 6)
    shape, strides = [2, 2, 2, 64], [256, 128, 64, 1]
    strides[axis] = 2**31 + 1024
    memory = torch.empty(strides[axis] + 1024, dtype=torch.bfloat16, device=target.device)
    x = memory.as_strided(shape, strides)
    x.copy_(random(target, *shape, dtype=torch.bfloat16))
    cos, sin = tables(target, 64, 2)
    expected = rope(x.contiguous(), cos, sin, impl="reference")
    assert same_bits(serve(target, rope, x, cos, sin), expected)
    rope(x, cos, sin, inplace=True, impl="triton")
    assert same_bits(x, expected)


@pytest.mark.parametrize("target", GPU_TRITON)
def test_graph_capture(target):
    cos, sin = tables(target, 64, 32)
    q, k = random(target, 2, 8, 4, 64), random(target, 2, 8, 2, 64, seed=1)
    starts = integers(target, 0, 5)
    serve(target, rope_qk, q, k, cos, sin, offsets=starts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rope_qk(q, k, cos, sin, offsets=starts, impl="triton")
    for seed, offsets in ((5, (3, 0)), (6, (20, 7))):
        q.copy_(random(target, 2, 8, 4, 64, seed=seed))
        k.copy_(random(target, 2, 8, 2, 64, seed=seed + 10))
        starts.copy_(integers(target, *offsets))
        graph.replay()
        expected = rope_qk(q, k, cos, sin, offsets=starts, impl="reference")
        assert same_bits(captured.q, expected.q)
        assert same_bits(captured.k, expected.k)


@pytest.mark.gpu
@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two devices")
def test_kernels_run_on_the_device_of_their_tensors():
    kind = torch.accelerator.current_accelerator().type
    before = torch.accelerator.current_device_index()
    for index in (1, 0, 1):
        device = torch.device(kind, index)
        cos, sin = rope_table(16, 8, device=device)
        x = torch.randn(1, 8, 2, 16, device=device, requires_grad=True)
        for _ in range(2):  # the first launch of a plan and a repeated one
            y = rope(x, cos, sin, impl="triton")
            (grad,) = torch.autograd.grad(y, x, x.detach())
            assert y.device == grad.device == device
            assert same_bits(y.detach(), rope(x.detach(), cos, sin, impl="reference"))
        assert torch.accelerator.current_device_index() == before


@pytest.mark.parametrize("target", [p for p in TARGETS if p.values[0].on_gpu] or GPU_TRITON)
@pytest.mark.parametrize("position", [131071, 1048575])
def test_far_positions(target, position):
    """A table from float64 angles keeps float32's precision at any position, and so does the kernel that reads it."""
    cos, sin = tables(target, 64, position + 1)
    x = random(target, 1, 2, 3, 64)
    frequencies = [10000.0 ** (-2 * i / 64) for i in range(32)]
    truth = rotated_by_hand(x[0].cpu(), [position - 1, position], frequencies)
    got = serve(target, rope, x, cos, sin, offsets=position - 1)[0].cpu()
    # An entry of the table, a product and the sum are each rounded, by half a unit in the last place of the pair.
    bound = 2 * torch.finfo(torch.float32).eps * pair_norms(x[0].cpu())
    assert ((got.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("target", TARGETS)
def test_far_angles(target):
    """The kernel's own cosine and sine reduce large arguments exactly."""
    angles = torch.tensor([[131071.0, 1048575.0, -1048575.0, 123456.78]], device=target.device)
    x = random(target, 1, 1, 3, 8)
    got = serve(target, rope_from_angles, x, angles)[0, 0].cpu()
    truth = x[0, 0].double().cpu()
    for i, angle in enumerate(angles[0].double().tolist()):
        a, b = x[0, 0, :, i].double().cpu(), x[0, 0, :, i + 4].double().cpu()
        truth[:, i] = a * math.cos(angle) - b * math.sin(angle)
        truth[:, i + 4] = b * math.cos(angle) + a * math.sin(angle)
    # Cosine and sine may be off by two units in the last place, and a product and the sum are rounded.
    bound = (2 + 1) * torch.finfo(torch.float32).eps * pair_norms(x[0, 0].cpu())
    assert ((got.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize(
    "target", [p for p in TARGETS if p.values[0].on_gpu or p.values[0].implementation == "reference"]
)
def test_calls_from_many_threads(target):
    cos, sin = tables(target)
    x = random(target, 2, 5, 3, 16)
    expected = [rope(x[:, : 1 + n], cos, sin, impl="reference") for n in range(5)]
    wrong = []

    def work(n):
        try:
            for turn in range(4):
                size = (n + turn) % 5
                if not same_bits(rope(x[:, : 1 + size], cos, sin, impl=target.implementation), expected[size]):
                    wrong.append(size)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_index_tensors_may_not_be_lists():
    cos, sin = rope_table(8, 8)
    for name in ("position_ids", "cu_seqlens"):
        with pytest.raises(ArgumentError) as caught:
            rope(torch.ones(4, 1, 8), cos, sin, layout="thd", **{name: [0, 1, 2, 3]})
        assert caught.value.argument == name


def test_offsets_may_not_be_fractions():
    cos, sin = rope_table(8, 8)
    with pytest.raises(ArgumentError) as caught:
        rope(torch.ones(1, 4, 1, 8), cos, sin, offsets=1.5)
    assert caught.value.argument == "offsets"
