"""The special operations, in kernels of a few lines, against NumPy."""

from functools import lru_cache
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tilewright.errors import NpuKernelError, NpuLanguageError, NpuRunError
from tilewright.npu import jit, rblib
from tilewright.npu import language as tl
from tilewright.npu.kernel import JitFunction
from tilewright.npu.program import Program
from tilewright.numerics import compare

properties = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)

Array = np.ndarray[Any, Any]


@lru_cache(maxsize=512)
def compiled(
    kernel: JitFunction, kinds: tuple[tuple[tuple[int, ...], torch.dtype], ...], constexprs: tuple[Any, ...]
) -> Program:
    """A kernel for tensors of these shapes and dtypes; compiled once."""
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds]
    return kernel.warmup(*tensors, *constexprs, grid=(1,))


def run(kernel: JitFunction, arrays: list[Any], *constexprs: Any, check: bool = False) -> list[Array]:
    """Run a kernel on arrays; integers and lists of them become tables. All arrays afterwards."""
    tensors = []
    for each in arrays:
        table = isinstance(each, int | list)
        tensors.append(torch.tensor(np.atleast_2d(each), dtype=torch.int32 if table else torch.float32))
    program = compiled(kernel, tuple((tuple(each.shape), each.dtype) for each in tensors), constexprs)
    program.run(*tensors, check=check)
    return [each.numpy() for each in tensors]


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nothing(*shape: int) -> Array:
    return np.full(shape, np.nan, dtype=np.float32)


def agree(result: Array, reference: Array, truth: Array, columns: int) -> None:
    """Hold a result that sums over columns against the same formula in float32 and in float64."""
    tensors = (torch.from_numpy(np.ascontiguousarray(each)) for each in (result, reference, truth))
    agreement = compare(*tensors, reduced=columns)
    assert agreement.ok, str(agreement)


@jit
def whole(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(x, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0))


@jit
def number(table, at, COUNT: tl.constexpr, BOUND: tl.constexpr = -1):
    pointer = tl.make_block_ptr(table, (1, COUNT), (COUNT, 1), (0, at), (1, 1), (1, 0))
    return rblib.to_dynamic_index(pointer, BOUND).cast(tl.int32)


# Rows


@jit
def inserting(
    data, updates, index, out, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, AXIS: tl.constexpr
):
    x = tl.load(whole(data, A, B, C))
    if AXIS == 0:
        new = tl.load(whole(updates, ROWS, B, C))
    elif AXIS == 1:
        new = tl.load(whole(updates, A, ROWS, C))
    else:
        new = tl.load(whole(updates, A, B, ROWS))
    tl.store(whole(out, A, B, C), rblib.insert(x, new, AXIS, number(index, 0, 1)))


def inserted(data: Array, updates: Array, axis: int, index: int) -> Array:
    """Rows in the place of others; those that lie behind the end are lost."""
    rows = np.concatenate((np.moveaxis(data, axis, 0)[:index], np.moveaxis(updates, axis, 0)))[: data.shape[axis]]
    result = np.moveaxis(data.copy(), axis, 0)
    result[: len(rows)] = rows
    return np.moveaxis(result, 0, axis)


@properties
@hypothesis.given(data=st.data(), axis=st.integers(0, 2), size=st.sampled_from([4, 9]), rows=st.integers(1, 4))
def test_insert(data: st.DataObject, axis: int, size: int, rows: int) -> None:
    shape = tuple(size if n == axis else 2 + n for n in range(3))
    new = tuple(rows if n == axis else 2 + n for n in range(3))
    index = data.draw(st.integers(0, size))
    x, updates = numbers(0, *shape), numbers(1, *new)
    *_, result = run(inserting, [x, updates, index, nothing(*shape)], *shape, rows, axis)
    np.testing.assert_array_equal(result, inserted(x, updates, axis, index))
    lost = index + rows > size
    if lost:
        with pytest.raises(NpuRunError, match="STRADDLE"):
            run(inserting, [x, updates, index, nothing(*shape)], *shape, rows, axis, check=True)


@jit
def moving(
    source,
    index,
    loaded,
    target,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    AXIS: tl.constexpr,
    MORE: tl.constexpr,
):
    until = number(index, 0, 1)
    x = rblib.dynamic_load(whole(source, A, B, C), AXIS, until)
    tl.store(whole(loaded, A, B, C), x)
    rblib.dynamic_store(whole(target, A, B, C), tl.load(whole(source, A, B, C)), AXIS, until + MORE)


@properties
@hypothesis.given(axis=st.integers(0, 2), index=st.integers(0, 4), more=st.integers(0, 3))
def test_dynamic_load_and_store(axis: int, index: int, more: int) -> None:
    shape = tuple(4 if n == axis else 2 + n for n in range(3))
    x = numbers(0, *shape)
    _, _, loaded, target = run(moving, [x, index, nothing(*shape), numbers(1, *shape)], *shape, axis, more)
    before = [slice(None)] * 3
    before[axis] = slice(0, index)
    expected = np.zeros_like(x)
    expected[tuple(before)] = x[tuple(before)]
    np.testing.assert_array_equal(loaded, expected)
    before[axis] = slice(0, min(index + more, 4))
    expected = numbers(1, *shape)
    expected[tuple(before)] = x[tuple(before)]
    np.testing.assert_array_equal(target, expected)


@jit
def rolling(
    base, state, start, end, joined, sliced, A: tl.constexpr, W: tl.constexpr, L: tl.constexpr, C: tl.constexpr
):
    x = rblib.window_insert(
        rblib.dynamic_load(whole(base, A, W, C)), tl.load(whole(state, A, L, C)), 1, number(start, 0, 1)
    )
    tl.store(whole(joined, A, W + L, C), x)
    rblib.dynamic_store(whole(sliced, A, W, C), rblib.window_slice(x, number(end, 0, 1), 1, W))


@properties
@hypothesis.given(data=st.data(), window=st.sampled_from([1, 5, 8]), rows=st.sampled_from([1, 3, 11]))
def test_window_insert_and_slice(data: st.DataObject, window: int, rows: int) -> None:
    start = data.draw(st.integers(0, window))
    end = data.draw(st.integers(0, window + rows))
    base, state = numbers(0, 2, window, 3), numbers(1, 2, rows, 3)
    arrays = [base, state, start, end, nothing(2, window + rows, 3), nothing(2, window, 3)]
    *_, joined, sliced = run(rolling, arrays, 2, window, rows, 3)
    every = np.concatenate((base[:, :start], state, np.zeros((2, window - start, 3), np.float32)), axis=1)
    np.testing.assert_array_equal(joined, every)
    last = every[:, max(0, end - window) : end]
    np.testing.assert_array_equal(sliced[:, : last.shape[1]], last)
    assert not sliced[:, last.shape[1] :].any()


@jit
def padding(
    x,
    out,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    OUT_B: tl.constexpr,
    OUT_C: tl.constexpr,
    AXIS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    padded = rblib.nn_pad(tl.load(whole(x, A, B, C)), 2.5, AXIS, (LOW, HIGH), "constant")
    tl.store(whole(out, A, OUT_B, OUT_C), padded)


@properties
@hypothesis.given(axis=st.integers(1, 2), low=st.integers(0, 3), high=st.integers(0, 3))
def test_pad(axis: int, low: int, high: int) -> None:
    x = numbers(0, 2, 3, 4)
    widths = [(0, 0), (0, 0), (0, 0)]
    widths[axis] = (low, high)
    expected = np.pad(x, widths, constant_values=2.5)
    _, result = run(padding, [x, nothing(*expected.shape)], 2, 3, 4, *expected.shape[1:], axis, low, high)
    np.testing.assert_array_equal(result, expected)


# Softmax


@jit
def softmaxes(
    x,
    mask,
    index,
    plain,
    masked,
    causal,
    windowed,
    A: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    scores = tl.load(whole(x, A, L, N))
    first = number(index, 0, 1)
    tl.store(whole(plain, A, L, N), rblib.softmax(scores, axis=2))
    tl.store(whole(masked, A, L, N), rblib.masked_softmax(scores, tl.load(whole(mask, 1, L, N))))
    tl.store(whole(causal, A, L, N), rblib.dynamic_masked_softmax(scores, first))
    tl.store(whole(windowed, A, L, N), rblib.window_softmax(scores, first, window_size=WINDOW))


def softmax(x: Array, seen: Array | bool = True) -> Array:
    with np.errstate(invalid="ignore"):
        hidden = np.where(seen, x, -np.inf)
        e = np.exp(hidden - hidden.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def rows_and_columns(rows: int, columns: int) -> tuple[Array, Array]:
    return np.arange(rows)[:, None], np.arange(columns)[None, :]


@properties
@hypothesis.given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(1, 16), (3, 16), (5, 40)]),
    index=st.integers(0, 45),
    window=st.sampled_from([1, 7, 64]),
    hidden=st.booleans(),
)
def test_softmax(seed: int, shape: tuple[int, int], index: int, window: int, hidden: bool) -> None:
    rows, columns = shape
    x = 5 * numbers(seed, 2, rows, columns)
    mask = (np.random.default_rng(seed).random((1, rows, columns)) < 0.5).astype(np.float32)
    mask[..., -1] = 1
    if hidden:  # a row that sees nothing has no softmax
        mask[:, 0] = 0
    results = [nothing(2, rows, columns) for _ in range(4)]
    _, _, _, *results = run(softmaxes, [x, mask, index, *results], 2, rows, columns, window)
    i, j = rows_and_columns(rows, columns)
    seen = (True, mask > 0, j <= index + i, (j <= index + i) & (j > index + i - window))
    for result, shown in zip(results, seen, strict=True):
        agree(result, softmax(x, shown), softmax(x.astype(np.float64), shown), columns)
    assert np.isnan(results[1][:, 0]).all() == hidden


# Flash attention


@jit
def tiles(
    x,
    mask,
    before,
    index,
    m,
    e,
    s,
    m_after,
    e_after,
    s_after,
    m_causal,
    e_causal,
    s_causal,
    L: tl.constexpr,
    N: tl.constexpr,
):
    scores, shown = tl.load(whole(x, 1, L, N)), tl.load(whole(mask, 1, L, N))
    a, b, c = rblib.flash_attn_tile(scores, shown)  # npu: ignore[PARTITION_DIV]
    tl.store(whole(m, 1, L, 1), a)
    tl.store(whole(e, 1, L, N), b)
    tl.store(whole(s, 1, L, 1), c)
    a, b, c = rblib.flash_attn_tile(scores, shown, tl.load(whole(before, 1, L, 1)))
    tl.store(whole(m_after, 1, L, 1), a)
    tl.store(whole(e_after, 1, L, N), b)
    tl.store(whole(s_after, 1, L, 1), c)
    a, b, c = rblib.causal_flash_attn_tile(scores, number(index, 0, 1), tl.load(whole(before, 1, L, 1)))
    tl.store(whole(m_causal, 1, L, 1), a)
    tl.store(whole(e_causal, 1, L, N), b)
    tl.store(whole(s_causal, 1, L, 1), c)


def tile(x: Array, seen: Array, before: Array | None = None) -> tuple[Array, Array, Array]:
    hidden = np.where(seen, x, -np.inf).astype(x.dtype)
    m = hidden.max(-1, keepdims=True)
    m = m if before is None else np.maximum(m, before)
    e = np.exp(hidden - m)
    return m, e, e.sum(-1, keepdims=True)


@properties
@hypothesis.given(seed=st.integers(0, 99), rows=st.sampled_from([16, 21]), index=st.integers(0, 40))
def test_flash_tile(seed: int, rows: int, index: int) -> None:
    columns = 32
    x, before = 5 * numbers(seed, 1, rows, columns), 5 * numbers(seed + 1, 1, rows, 1)
    mask = (np.random.default_rng(seed).random((1, rows, columns)) < 0.5).astype(np.float32)
    mask[..., 0] = 1
    results = [nothing(1, rows, size) for _ in range(3) for size in (1, columns, 1)]
    after = run(tiles, [x, mask, before, index, *results], rows, columns)[4:]
    i, j = rows_and_columns(rows, columns)
    for n, (seen, previous) in enumerate(((mask > 0, None), (mask > 0, before), (j <= index + i, before))):
        reference = tile(x, seen, previous)
        truth = tile(x.astype(np.float64), seen, previous)
        np.testing.assert_array_equal(after[3 * n], reference[0])
        for result, plain, exact in zip(after[3 * n + 1 : 3 * n + 3], reference[1:], truth[1:], strict=True):
            agree(result, plain, exact, columns)


@jit
def columns(x, p, L: tl.constexpr, P: tl.constexpr, NP: tl.constexpr):
    return tl.make_block_ptr(x, (1, L, NP * P), (L * NP * P, NP * P, 1), (0, 0, p * P), (1, L, P), (2, 1, 0))


@jit
def flash(x, values, mask, counts, out, causal, L: tl.constexpr, P: tl.constexpr, NP: tl.constexpr, D: tl.constexpr):
    for kind in tl.static_range(2):
        m = tl.zeros((1, L, 1), dtype=tl.float32)
        s = tl.zeros((1, L, 1), dtype=tl.float32)
        o = tl.zeros((1, L, D), dtype=tl.float32)
        for p in tl.static_range(NP):
            scores = tl.load(columns(x, p, L, P, NP))
            shown = tl.load(columns(mask, p, L, P, NP))
            v = tl.load(tl.make_block_ptr(values, (NP, P, D), (P * D, D, 1), (p, 0, 0), (1, P, D), (2, 1, 0)))
            count = number(counts, p, NP, P)
            if rblib.partition_skip(count) == False:  # noqa: E712
                if p == 0:
                    if kind == 0:
                        m, e, s = rblib.flash_attn_tile(scores, shown)
                    else:
                        m, e, s = rblib.dynamic_flash_attn_tile(scores, count)
                    o = tl.dot(e, v)
                else:
                    if kind == 0:
                        m_now, e, s_now = rblib.flash_attn_tile(scores, shown, m)
                    else:
                        m_now, e, s_now = rblib.dynamic_flash_attn_tile(scores, count, m)
                    s, o = rblib.flash_attn_recompute(m, m_now, s, s_now, o, tl.dot(e, v))
                    m = m_now
        tl.store(whole(out if kind == 0 else causal, 1, L, D), o / s)


@properties
@hypothesis.given(
    data=st.data(), seed=st.integers(0, 99), rows=st.sampled_from([1, 3, 8]), partitions=st.sampled_from([2, 3, 5])
)
def test_partitions_make_a_softmax(data: st.DataObject, seed: int, rows: int, partitions: int) -> None:
    size = 8
    partition, within = data.draw(st.integers(0, partitions - 1)), data.draw(st.integers(0, size - rows))
    position = partition * size + within
    x, v = 5 * numbers(seed, 1, rows, partitions * size), numbers(seed + 1, 1, partitions * size, 16)
    i, j = rows_and_columns(rows, partitions * size)
    below = j <= position + i
    seen = below & (np.random.default_rng(seed).random((1, rows, partitions * size)) < 0.5)
    seen[..., 0] = True
    counts, results = counts_at(position, size, partitions), [nothing(1, rows, 16), nothing(1, rows, 16)]
    arrays = [x, v.reshape(partitions, size, 16), seen.astype(np.float32), counts, *results]
    *_, masked, causal = run(flash, arrays, rows, size, partitions, 16)
    for result, shown in ((masked, seen), (causal, below)):
        exact = softmax(x.astype(np.float64), shown) @ v.astype(np.float64)
        agree(result, softmax(x, shown) @ v, exact, partitions * size)


def counts_at(position: int, size: int, partitions: int) -> list[int]:
    """How many rows each partition has."""
    return [min(max(position - p * size, 0), size) for p in range(partitions)]


@jit
def counting(counts, one, out, P: tl.constexpr, NP: tl.constexpr):
    total = tl.load(whole(one, 1, 1, 64))
    for p in tl.static_range(NP):
        if rblib.partition_skip(number(counts, p, NP, P)) == False:  # noqa: E712
            total = total + tl.load(whole(one, 1, 1, 64))
    tl.store(whole(out, 1, 1, 64), total)


@pytest.mark.parametrize("partitions", [2, 3, 6])
def test_partitions_behind_the_one_that_is_written_are_skipped(partitions: int) -> None:
    size = 4
    for position in range(partitions * size):
        one, out = np.ones((1, 1, 64), np.float32), nothing(1, 1, 64)
        *_, total = run(counting, [counts_at(position, size, partitions), one, out], size, partitions)
        skipped = partitions - (int(total[0, 0, 0]) - 1)
        assert skipped == partitions - 1 - position // size, position


@jit
def without_bound(counts, x, out, P: tl.constexpr, NP: tl.constexpr, USED: tl.constexpr):
    total = tl.load(whole(x, 1, P, 64))
    for p in tl.static_range(NP):
        count = number(counts, p, NP)
        if rblib.partition_skip(count) == False:  # noqa: E712
            total = total + (rblib.dynamic_load(whole(x, 1, P, 64), 1, count) if USED else total)
    tl.store(whole(out, 1, P, 64), total)


def test_a_partition_has_as_many_rows_as_the_block_that_its_count_is_used_for() -> None:
    x = np.ones((1, 4, 64), np.float32)
    *_, out = run(without_bound, [[4, 0, 0], x, nothing(1, 4, 64)], 4, 3, True)
    assert out.flatten().tolist() == [2.0] * 4 * 64
    with pytest.raises(NpuKernelError, match="how many rows the partition has is not known"):
        run(without_bound, [[4, 0, 0], x, nothing(1, 4, 64)], 4, 3, False)


# On the host


@pytest.mark.parametrize(("size", "aligned"), [(1, 64), (63, 64), (64, 64), (65, 128), (80, 128), (128, 128)])
def test_the_last_dimension_is_aligned(size: int, aligned: int) -> None:
    x = torch.randn(2, 3, size)
    result = rblib.align_tensor_last_dim_to_64(x)
    assert result.shape == (2, 3, aligned)
    assert torch.equal(result[..., :size], x)
    assert not result[..., size:].any()
    assert (result is x) == (size == aligned)


def test_operations_mean_nothing_outside_a_kernel() -> None:
    with pytest.raises(NpuLanguageError, match=r"rblib\.insert\(\) means something inside a kernel only"):
        rblib.insert(torch.ones(2), torch.ones(1), 0, 1)
