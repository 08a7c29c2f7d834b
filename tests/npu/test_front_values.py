"""Branches and tensors of kernels, each against the same in torch, and what is refused rather than built wrong."""

import pytest
import torch
from front_helpers import (
    all_of,
    computed,
    exactly,
    meta,
    number,
    row,
    run,
)
from xdsl.dialects.scf import IfOp

from tilewright.errors import ArgumentError, NpuKernelError, NpuLanguageError
from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.kernel import JitFunction


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


# Run-time branches


@jit
def branches(x_ptr, counts, out_ptr, N: tl.constexpr, P: tl.constexpr):
    x = tl.load(row(x_ptr, 0, 1))
    kept = x
    total = x * 0.0
    n = 0
    for p in tl.static_range(N):
        count = number(counts, p, N, P)
        if rblib.partition_skip(count) == False:  # noqa: E712
            x = x + 1.0
            total = total + x
            local = x * 2.0
            n = 0
            total = total + local
        else:
            total = total - 100.0
    tl.store(row(out_ptr, 0, 3), x)
    tl.store(row(out_ptr, 1, 3), total + n)
    tl.store(row(out_ptr, 2, 3), kept)


@pytest.mark.parametrize("counts", [(0, 0, 0), (4, 0, 0), (8, 0, 0), (8, 8, 3), (8, 8, 8)])
def test_what_a_branch_changes_and_what_it_does_not(counts: tuple[int, ...]) -> None:
    x, table, out = torch.randn(1, 64), torch.tensor([counts], dtype=torch.int32), torch.empty(3, 64)
    run(branches, x, table, out, 3, 8)
    value, total = x.clone(), x * 0.0
    for p, count in enumerate(counts):
        if p > 0 and count == 0 and counts[p - 1] < 8:
            total = total - 100.0
        else:
            value = value + 1.0
            total = total + value + value * 2.0
    exactly(out, torch.cat((value, total, x)))


def test_a_branch_is_an_if_that_gives_what_it_changes() -> None:
    program = branches.warmup(meta(1, 64), meta(1, 1, dtype=torch.int32), meta(3, 64), 1, 8, profile="tile")
    (branch,) = [each for each in program.module.walk() if isinstance(each, IfOp)]
    assert [each.name_hint for each in branch.results] == ["total", "x"]
    assert [str(each.type) for each in branch.results] == ["tensor<1x64xf32>"] * 2
    for region in branch.regions:
        assert region.block.last_op is not None
        assert len(region.block.last_op.operands) == 2


@jit
def swapped_unless_skipped(x, y, count, TIMES: tl.constexpr):
    if rblib.partition_skip(count) == False:  # noqa: E712
        for n in tl.static_range(TIMES):
            x, y = y, x + n
    return x, y


@jit
def nested(x_ptr, counts, out_ptr, P: tl.constexpr):
    x, y = tl.load(row(x_ptr, 0, 2)), tl.load(row(x_ptr, 1, 2))
    n = 7.0
    first, second = number(counts, 1, 3, P), number(counts, 2, 3, P)
    writes = rblib.partition_skip(first) == False  # noqa: E712
    if writes:
        x, y = y, x
        z = x
        if rblib.partition_skip(second) == False:  # noqa: E712
            z = z + n
            x, z = z, x
        else:
            y = y * 2.0
        y = y + z
    if writes:
        x = x + 0.25
    x, y = swapped_unless_skipped(x, y, second, TIMES=3)
    tl.store(row(out_ptr, 0, 2), x)
    tl.store(row(out_ptr, 1, 2), y + n)


@pytest.mark.parametrize("counts", [(8, 8, 0), (8, 3, 0), (3, 0, 0), (3, 0, 1), (8, 8, 1)])
def test_branches_in_branches_and_names_that_change_places(counts: tuple[int, ...]) -> None:
    x, out = torch.randint(-8, 9, (2, 64)).float(), torch.empty(2, 64)
    run(nested, x, torch.tensor([counts], dtype=torch.int32), out, 8)
    skips = [p > 0 and counts[p] == 0 and counts[p - 1] < 8 for p in range(3)]
    a, b = x[0], x[1]
    if not skips[1]:
        a, b = b, a
        z = a
        if not skips[2]:
            z = z + 7.0
            a, z = z, a
        else:
            b = b * 2.0
        b = b + z
        a = a + 0.25
    if not skips[2]:
        for n in range(3):
            a, b = b, a + n
    exactly(out, torch.stack((a, b + 7.0)))


@jit
def stores(x_ptr, counts, out_ptr, P: tl.constexpr):
    x = tl.load(row(x_ptr, 0, 1))
    tl.store(row(out_ptr, 0, 2), x)
    before = tl.load(row(out_ptr, 0, 2))
    if rblib.partition_skip(number(counts, 1, 2, P)) == False:  # noqa: E712
        tl.store(row(out_ptr, 0, 2), x + 1.0)
        inside = tl.load(row(out_ptr, 0, 2))
        tl.store(row(out_ptr, 0, 2), inside + x)
    after = tl.load(row(out_ptr, 0, 2))
    tl.store(row(out_ptr, 1, 2), after - before)


def test_stores_happen_where_they_stand(x: torch.Tensor) -> None:
    x = x[:1].round()
    for counts, skipped in (((3, 0), True), ((8, 0), False)):
        out = torch.empty(2, 64)
        run(stores, x, torch.tensor([counts], dtype=torch.int32), out, 8)
        written = x if skipped else x + 1.0 + x
        exactly(out, torch.cat((written, written - x)))


@jit
def defined_on_both_ways(x_ptr, counts, out_ptr, P: tl.constexpr):
    x = tl.load(row(x_ptr, 0, 1))
    if rblib.partition_skip(number(counts, 1, 2, P)) == False:  # noqa: E712
        y = x + 1.0
        factor = 2.0
    else:
        y = x
        factor = 2.0
    tl.store(row(out_ptr, 0, 1), y * factor)


def test_names_that_both_ways_define(x: torch.Tensor) -> None:
    for counts, plus in (((3, 0), 0.0), ((8, 0), 1.0)):
        out = torch.empty(1, 64)
        run(defined_on_both_ways, x[:1].contiguous(), torch.tensor([counts], dtype=torch.int32), out, 8)
        exactly(out, (x[:1] + plus) * 2.0)


# Tensors


@jit
def shapes_of(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(all_of(x_ptr, R, C))
    column = tl.max(x, axis=1)[:, None]
    line = x.sum(axis=0)[None, :]
    x = x - column + line[:, :] + tl.expand_dims(tl.sum(x, axis=-2), 0)
    x = tl.trans(tl.trans(x) + x.T) / 2
    x = x.reshape(1, R, C).permute(0, 2, 1).trans(0, 2, 1).reshape((R, -1))
    wide, _ = tl.broadcast(tl.reshape(column, (R, 1)), x)
    x = x + wide + x.exp().to(tl.float32) * x.shape[0]
    tl.store(all_of(out_ptr, R, C), x)


def test_shapes_and_methods() -> None:
    x = torch.randn(5, 7)
    column, line = x.amax(1, keepdim=True), x.sum(0, keepdim=True)
    y = x - column + line + x.sum(-2, keepdim=True)
    y = (y.T + y.T).T / 2
    torch.testing.assert_close(computed(shapes_of, x, 5, 7), y + column + y.exp() * 5)


@jit
def reductions(x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0)))
    a = tl.sum(tl.sum(x, 2), 1)
    b = tl.max(tl.min(x, axis=-3), axis=0)
    c = tl.sum(x, axis=1, keep_dims=True)
    d = tl.max(tl.max(x, 0, keep_dims=True), -1)
    e = tl.sum(x)
    x = x + a[:, None, None] + b[None, None] + c + d[:, :, None] + e + tl.max(x, keep_dims=True)
    tl.store(tl.make_block_ptr(out_ptr, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0)), x)


def test_reductions_of_any_axis_to_any_rank() -> None:
    x = torch.randint(-4, 5, (2, 3, 5)).float()
    expected = x + x.sum((1, 2))[:, None, None] + x.amin(0).amax(0) + x.sum(1, keepdim=True)
    expected = expected + x.amax((0, 2))[None, :, None] + x.sum() + x.max()
    exactly(computed(reductions, x, 2, 3, 5), expected)


@jit
def chosen(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    y = tl.where(x > 0.0, x, -x)
    y = tl.where(tl.trans(tl.reshape(tl.trans(x <= 0.5), (64, R))), y, 0.5)
    y = tl.where(tl.broadcast_to(tl.max(x, axis=1, keep_dims=True) >= x, (R, 64)), y, float("inf"))
    y = tl.where(x == 0.0, float("-inf"), y)
    y = tl.where(x != x, 7.0, y)  # noqa: PLR0124 - NaN
    y = tl.where(0.25 < x, y + 1, y)  # noqa: SIM300
    tl.store(all_of(out_ptr, R), y)


def test_comparisons_and_choices() -> None:
    x = torch.tensor([0.0, -0.0, 0.25, 0.3, 0.5, 1.0, -2.0, float("inf"), -float("inf")]).repeat(8)[:64].reshape(1, 64)
    y = torch.where(x > 0.0, x, -x)
    y = torch.where(x <= 0.5, y, 0.5)
    y = torch.where(x == 0.0, -torch.inf, y)
    exactly(computed(chosen, x, 1), torch.where(x > 0.25, y + 1, y))
    missing = torch.full((1, 64), float("nan"))  # no comparison but != holds
    exactly(computed(chosen, missing, 1), torch.full((1, 64), 7.0))


@jit
def extremes(x_ptr, y_ptr, out_ptr, R: tl.constexpr):
    x, y = tl.load(all_of(x_ptr, R)), tl.load(all_of(y_ptr, R))
    tl.store(row(out_ptr, 0, 4), tl.maximum(x, y))
    tl.store(row(out_ptr, 1, 4), tl.minimum(x, y))
    tl.store(row(out_ptr, 2, 4), tl.max(x, axis=1, keep_dims=True) + y * 0.0)
    tl.store(row(out_ptr, 3, 4), tl.min(x, axis=1, keep_dims=True) + y * 0.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_no_number_stays_none() -> None:
    """Extremes of NaN are NaN: an error does not vanish."""
    x, y, out = torch.zeros(1, 64), torch.ones(1, 64), torch.empty(4, 64)
    x[0, 3] = float("nan")
    run(extremes, x, y, out, 1)
    exactly(out[0], torch.maximum(x, y)[0])
    exactly(out[1], torch.minimum(x, y)[0])
    assert out[2:].isnan().all()


@jit
def numbers(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    y = x * (1 / 3) + 0.1 - 1e-40
    y = 2 - y
    y = -(3.0 / (y + True))
    y = y + tl.exp(1.0) + tl.fdiv(1, 3) + tl.maximum(0.1, 0.2) + tl.zeros((R, 64), dtype=tl.float32) + tl.tensor(-0.0)
    tl.store(all_of(out_ptr, R), y)


def test_numbers_are_float32(x: torch.Tensor) -> None:
    third, tenth = torch.tensor(1 / 3), torch.tensor(0.1)
    y = 2.0 - (x * third + tenth - torch.tensor(1e-40))
    y = -(torch.tensor(3.0) / (y + 1.0))  # a number divided by a tensor is a product in torch
    expected = y + torch.tensor(1.0).exp() + torch.tensor(1.0) / 3.0 + torch.tensor(0.2)
    exactly(computed(numbers, x, 4), expected)


@jit
def signed_zeros(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    tl.store(all_of(out_ptr, R), x / (x * 0.0 + tl.where(x > 0.0, 0.0, -0.0)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_negative_zero_is_another_number() -> None:
    x = torch.tensor([1.0, -1.0]).repeat(32).reshape(1, 64)
    exactly(computed(signed_zeros, x, 1), x / torch.where(x > 0.0, 0.0, x * 0.0))


@jit
def backwards(x_ptr, out_ptr, N: tl.constexpr):
    p = row(x_ptr, N - 1, N)
    q = row(out_ptr, 0, N)
    for _ in tl.static_range(N):
        tl.store(q, tl.load(p))
        p, q = tl.advance(p, (-1, 0)), tl.advance(q, [1, 0])


def test_block_pointers_that_go_backwards(x: torch.Tensor) -> None:
    exactly(computed(backwards, x, 4), x.flip(0))


@jit
def softmaxes(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr):
    tl.store(all_of(out_ptr, R, C), rblib.softmax(tl.load(all_of(x_ptr, R, C)), AXIS))


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_softmax_along_either_axis(axis: int) -> None:
    x = torch.randn(3, 5)
    torch.testing.assert_close(computed(softmaxes, x, 3, 5, axis), x.softmax(axis))


# What is refused rather than built wrong


@jit
def unknown_bound(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    for i in tl.range(R / 2):  # npu: ignore[RANGE]
        x = x + i
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_while(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    while R:  # npu: ignore[RANGE]
        tl.store(all_of(x_ptr, R), x)
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_condition(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    if x_ptr:  # npu: ignore[DYN_IF]
        tl.store(all_of(x_ptr, R), x)
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_mask(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R), mask=R > 2)  # npu: ignore[RAWPTR]
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_accumulator(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    x = tl.dot(x, tl.trans(x), x)  # npu: ignore[DOT_SHAPE]
    tl.store(all_of(out_ptr, R), tl.dot(x, tl.load(all_of(x_ptr, R))))


@jit
def ignored_cast(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R)).to(tl.float16)  # npu: ignore[UNSUPPORTED_OP]
    tl.store(all_of(out_ptr, R), x)


@jit
def ignored_end(x_ptr, counts, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    tl.store(all_of(out_ptr, R), x)
    if rblib.partition_skip(number(counts, 0, 1, 8)) == False:  # noqa: E712
        return  # npu: ignore[SYNTAX]
    tl.store(all_of(out_ptr, R), x + 1.0)


@jit
def ignored_statement(x_ptr, out_ptr, R: tl.constexpr):
    x = tl.load(all_of(x_ptr, R))
    del x  # npu: ignore[SYNTAX]
    tl.store(all_of(out_ptr, R), 1.0)


@pytest.mark.parametrize(
    "kernel",
    [
        unknown_bound,
        ignored_while,
        ignored_condition,
        ignored_mask,
        ignored_accumulator,
        ignored_cast,
        ignored_end,
        ignored_statement,
    ],
    ids=lambda kernel: kernel.name,
)
def test_an_ignored_error_never_leads_to_another_program(kernel: JitFunction) -> None:
    arguments = [meta(4, 64), meta(4, 64)]
    if "counts" in kernel.arg_names:
        arguments.insert(1, meta(1, 1, dtype=torch.int32))
    with pytest.raises(NpuKernelError, match="cannot be compiled: something in this is not known, or an ignored error"):
        kernel.warmup(*arguments, 4, profile="tile")


@jit
def copied(x_ptr, out_ptr, R: tl.constexpr):
    tl.store(all_of(out_ptr, R), tl.load(all_of(x_ptr, R)))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="missing a required argument: 'R'; it takes x_ptr, out_ptr, R"):
        copied.warmup(meta(4, 64), meta(4, 64))
    with pytest.raises(ArgumentError, match="'R': got a tensor, expected a number"):
        copied.warmup(meta(4, 64), meta(4, 64), meta(4))
    with pytest.raises(NpuLanguageError, match="cannot be called; compile it"):
        copied(1)
    with pytest.raises(NpuLanguageError, match="is not launched on a grid"):
        copied[(1,)]
    with pytest.raises(NpuLanguageError, match="means something inside a kernel only"):
        tl.exp(1.0)
