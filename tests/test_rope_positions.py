"""Where the positions of rotary embedding come from, how far they reach, and what is not rotated."""

import math

import pytest
import torch

from rope_helpers import GPU_TRITON, TARGETS, integers, pair_norms, random, rotated_by_hand, same_bits, serve, tables
from tilewright import numerics, rope, rope_from_angles, rope_qk, rope_table
from tilewright.errors import ArgumentError

# Against transcriptions of other libraries.


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


# Far from the start.


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


# What gives no positions.


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
