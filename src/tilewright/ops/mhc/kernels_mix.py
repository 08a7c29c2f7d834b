"""The Triton kernels that multiply streams by the mixing weights: ``x @ fn^T`` and the squares of each token.

A program takes ``BLOCK_T`` tokens and a range of column chunks, for each chunk all streams in turn, and stores a
partial sum for each of its tokens; whoever uses them adds them in order. So no atomics are needed, and few tokens still
fill the machine. The last column in use of a partial sum holds the sum of squares.

16-bit streams run on bfloat16 tensor cores: ``fn`` is the sum of two bfloat16 numbers there, and float16 streams are,
exactly, too. A tensor core drops low bits of a long sum, so the product of each chunk starts from zero and is added in
float32. That it is waited for before the next loads are issued is also what makes the loop right: where a product is
left running, Triton 3.6 lets the copy of a later tile overwrite the streams that it still reads, as two read them.

Squares are added in pairs, so that a sum has the same bits whatever the layout of its tile, and tiles of any number of
tokens give a token the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gdc_wait", "mix_kernel", "pack_kernel"]

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton without NVIDIA's back end; then no launch asks for them
    gdc_launch_dependents = gdc_wait = None

# A Triton that lacks one of these fails here, at import, where dispatch takes note, and not at a launch.
_NEEDED = (tl.static_range, tl.fma, tl.split, tl.debug_barrier)


@triton.jit
def add_neighbours(t):
    """[A, B] to [A, B / 2]: a sum of two has one value, whatever the layout."""
    left, right = tl.split(tl.reshape(t, (t.shape[0], t.shape[1] // 2, 2)))
    return left + right


@triton.jit
def squares_of_eight(x):
    """Sums of squares of eight neighbours, [BLOCK_T, BLOCK_H / 8] fp32; a thread has them all."""
    left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    left = left.to(tl.float32)
    right = right.to(tl.float32)
    return add_neighbours(add_neighbours(tl.fma(left, left, right * right)))


@triton.jit
def product(x, high, low, PARTS: tl.constexpr):
    """``x @ (high + low)^T`` of one chunk, [BLOCK_T, MIXES] fp32; ``x @ high^T`` if PARTS is 1."""
    if PARTS == 1:
        total = tl.dot(x, tl.trans(high), input_precision="ieee")
    elif x.dtype == tl.bfloat16:
        total = tl.dot(x, tl.trans(low), tl.dot(x, tl.trans(high)))
    else:
        wide = x.to(tl.float32)
        x_high = wide.to(tl.bfloat16)
        x_low = (wide - x_high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(x_low, tl.trans(high), tl.dot(x_high, tl.trans(high)))
        total = tl.dot(x_low, tl.trans(low), tl.dot(x_high, tl.trans(low), total))
    return total


@triton.jit
def load_weights(
    fn_ptr, mix, stream, column, column_mask,
    N_SOURCES: tl.constexpr, N_COLS: tl.constexpr, PADDED: tl.constexpr, N_MIXES: tl.constexpr, MIXES: tl.constexpr,
    PACKED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One chunk of the weights, [MIXES, BLOCK_H], as (high, low), or as fp32 twice where PARTS is 1.

    PACKED weights are split already, padded with zeros, and need no mask.
    """
    if PACKED:
        at = mix.to(tl.int64)[:, None] * (N_SOURCES * PADDED) + (stream * PADDED + column)[None, :]
        high = tl.load(fn_ptr + at)
        low = tl.load(fn_ptr + MIXES * N_SOURCES * PADDED + at)
    else:
        at = mix.to(tl.int64)[:, None] * (N_SOURCES * N_COLS) + (stream * N_COLS + column)[None, :]
        high = tl.load(fn_ptr + at, (mix < N_MIXES)[:, None] & column_mask[None, :], 0.0)
        low = high
        if PARTS == 2:
            wide = high
            high = wide.to(tl.bfloat16)
            low = (wide - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def store_partial(
    partial_ptr, total, squares, split, token, n_tokens,
    N_MIXES: tl.constexpr, MIXES: tl.constexpr, EIGHTHS: tl.constexpr,
):  # fmt: skip
    """The sums of one range of columns, [n_splits, n_tokens, MIXES], that of squares behind the mixes."""
    for _ in tl.static_range(EIGHTHS):
        squares = add_neighbours(squares)
    mix = tl.arange(0, MIXES)
    total = tl.where((mix == N_MIXES)[None, :], tl.reshape(squares, (squares.shape[0],))[:, None], total)
    at = (split.to(tl.int64) * n_tokens + token)[:, None] * MIXES + mix[None, :]
    tl.store(partial_ptr + at, total, (token < n_tokens)[:, None] & (mix <= N_MIXES)[None, :])


@triton.jit(do_not_specialize=["n_tokens", "n_splits"])
def mix_kernel(
    residual_ptr, fn_ptr, partial_ptr,
    stride_token, stride_stream,
    n_tokens, n_splits,
    N_SOURCES: tl.constexpr, N_COLS: tl.constexpr, PADDED: tl.constexpr, N_MIXES: tl.constexpr, MIXES: tl.constexpr,
    PACKED: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EIGHTHS: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Partial products of BLOCK_T tokens' streams, over one of ``n_splits`` ranges of their columns."""
    if DEPENDENTS:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    split = pid % n_splits
    token = (pid // n_splits).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.minimum(token, n_tokens - 1) * stride_token
    mix = tl.arange(0, MIXES)
    total = tl.zeros((BLOCK_T, MIXES), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_H // 8), tl.float32)
    n_steps: tl.constexpr = PADDED // BLOCK_H * N_SOURCES
    for step in tl.range(split * n_steps // n_splits, (split + 1) * n_steps // n_splits, num_stages=STAGES):
        stream = step % N_SOURCES
        column = step // N_SOURCES * BLOCK_H + tl.arange(0, BLOCK_H)
        column_mask = column < N_COLS
        offset = row[:, None] + (stream.to(tl.int64) * stride_stream + column)[None, :]
        if N_COLS % BLOCK_H == 0 and PACKED:
            x = tl.load(residual_ptr + offset)  # [BLOCK_T, BLOCK_H]; rows past the end are the last one
        else:
            x = tl.load(residual_ptr + offset, (token < n_tokens)[:, None] & column_mask[None, :], 0.0)
        high, low = load_weights(
            fn_ptr, mix, stream, column, column_mask, N_SOURCES, N_COLS, PADDED, N_MIXES, MIXES, PACKED, PARTS
        )
        squares += squares_of_eight(x)
        total += product(x, high, low, PARTS)
    store_partial(partial_ptr, total, squares, split, token, n_tokens, N_MIXES, MIXES, EIGHTHS)


@triton.jit
def pack_kernel(
    fn_ptr, packed_ptr,
    N_SOURCES: tl.constexpr, N_COLS: tl.constexpr, PADDED: tl.constexpr, N_MIXES: tl.constexpr, MIXES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights [N_MIXES, N_SOURCES, N_COLS] fp32 to [2, MIXES, N_SOURCES, PADDED] bf16: high parts, then low ones."""
    n_blocks: tl.constexpr = (N_SOURCES * PADDED + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    mix = (pid // n_blocks).to(tl.int64)
    k = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    column = k % PADDED
    live = (mix < N_MIXES) & (k < N_SOURCES * PADDED) & (column < N_COLS)
    wide = tl.load(fn_ptr + (mix * N_SOURCES + k // PADDED) * N_COLS + column, live, 0.0)
    high = wide.to(tl.bfloat16)
    low = (wide - high.to(tl.float32)).to(tl.bfloat16)
    at = mix * (N_SOURCES * PADDED) + k
    tl.store(packed_ptr + at, high, k < N_SOURCES * PADDED)
    tl.store(packed_ptr + MIXES * N_SOURCES * PADDED + at, low, k < N_SOURCES * PADDED)
