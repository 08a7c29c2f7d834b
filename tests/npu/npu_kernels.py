"""Small kernels that several tests use."""

from tilewright.npu import jit, rblib
from tilewright.npu import language as tl


@jit
def scaled_sum(x, y, scale, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x_block = tl.make_block_ptr(
        base=x, shape=(ROWS, COLUMNS), strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    y_block = tl.make_block_ptr(
        base=y, shape=(ROWS, COLUMNS), strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    out_block = tl.make_block_ptr(
        base=out, shape=(ROWS, COLUMNS), strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    tl.store(out_block, tl.load(x_block) + tl.load(y_block) * scale)


@jit
def matmul(a, b, out, BATCH: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    a_block = tl.make_block_ptr(
        base=a,
        shape=(BATCH, M, K),
        strides=(M * K, K, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, M, K),
        order=(2, 1, 0),
    )
    b_block = tl.make_block_ptr(
        base=b,
        shape=(BATCH, K, N),
        strides=(K * N, N, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, K, N),
        order=(2, 1, 0),
    )
    out_block = tl.make_block_ptr(
        base=out,
        shape=(BATCH, M, N),
        strides=(M * N, N, 1),
        offsets=(0, 0, 0),
        block_shape=(BATCH, M, N),
        order=(2, 1, 0),
    )
    tl.store(out_block, tl.dot(tl.load(a_block), tl.load(b_block)))


@jit
def append(row, cache, count, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a row into the cache behind ``count`` others; the cache is the result as well."""
    row_block = tl.make_block_ptr(
        base=row, shape=(1, COLUMNS), strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(1, COLUMNS), order=(1, 0)
    )
    cache_block = tl.make_block_ptr(
        base=cache,
        shape=(ROWS, COLUMNS),
        strides=(COLUMNS, 1),
        offsets=(0, 0),
        block_shape=(ROWS, COLUMNS),
        order=(1, 0),
    )
    out_block = tl.make_block_ptr(
        base=out, shape=(ROWS, COLUMNS), strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    place = rblib.to_dynamic_index(
        tl.make_block_ptr(base=count, shape=(1,), strides=(1,), offsets=(0,), block_shape=(1,), order=(0,)), ROWS
    )
    rows = rblib.insert(rblib.dynamic_load(cache_block, 0, place), tl.load(row_block), 0, place)
    rblib.dynamic_store(cache_block, rows, 0, place + 1)
    tl.store(out_block, rows)


@jit
def by_mode(
    x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr, SHAPE: tl.constexpr, REST: tl.constexpr
):
    x_block = tl.make_block_ptr(
        base=x, shape=SHAPE, strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    out_block = tl.make_block_ptr(
        base=out, shape=SHAPE, strides=(COLUMNS, 1), offsets=(0, 0), block_shape=(ROWS, COLUMNS), order=(1, 0)
    )
    if MODE == "exp":
        tl.store(out_block, tl.exp(tl.load(x_block)))
    else:
        tl.store(out_block, tl.load(x_block))
