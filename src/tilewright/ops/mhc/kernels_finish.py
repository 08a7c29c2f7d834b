"""The Triton kernel behind the product with the mixing weights: gates, Sinkhorn, and the input of the layer.

Its first programs turn the partial sums of some tokens each into gates and matrices, a token a thread: each number of a
token is a vector over tokens, so that nothing has to cross threads. All others collapse the streams of
``BLOCK_M`` tokens, for which they work out the few gates that they need by themselves, and normalise the result if
there is a norm. The streams are asked for before the gates are known.

The norm shares its functions and its launch parameters with ``rms_norm``, and so its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.ops.mhc.kernels_mix import add_neighbours, gdc_wait
from tilewright.ops.mhc.launch import GROUPS
from tilewright.ops.rms_norm.kernels import add_squares, inverse_rms, load_weight, normalised, tile, tile_mask

_NEEDED = (tl.static_range, tl.fma, tl.rsqrt, tl.exp, tl.permute, tl.debug_barrier)
_GROUPS = tl.constexpr(GROUPS)


@triton.jit
def add_partials(
    partial_ptr, token, n_tokens, n_splits, N_MIXES: tl.constexpr, MIXES: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Sums over all columns, [TOKENS, MIXES] fp32, of those of the ranges.

    Every fourth range belongs to one group; a group is added in order, BLOCK_S loaded at once, and the four in pairs.
    So the threads of a program share the ranges of one token, and no layout decides a bit.
    """
    TOKENS: tl.constexpr = token.shape[0]
    place = tl.arange(0, MIXES * _GROUPS)
    mix = place % MIXES
    group = place // MIXES
    at = partial_ptr + (token * MIXES)[:, None] + mix[None, :]
    total = tl.zeros((TOKENS, MIXES * _GROUPS), tl.float32)
    for first in range(0, n_splits, BLOCK_S * _GROUPS):
        parts = ()
        for k in tl.static_range(BLOCK_S):
            split = first + k * _GROUPS + group
            mask = (split < n_splits) & (mix <= N_MIXES)
            offset = split.to(tl.int64) * n_tokens * MIXES
            # Not through the first cache, which may not know yet what the kernel before has written.
            part = tl.load(at + offset[None, :], mask[None, :], 0.0, cache_modifier=".cg")
            parts = parts + (part,)  # noqa: RUF005 - Triton unpacks no tuple in a tuple
        for k in tl.static_range(BLOCK_S):
            total += parts[k]
    total = tl.permute(tl.reshape(total, (TOKENS, _GROUPS, MIXES)), (0, 2, 1))
    return add_neighbours(add_neighbours(tl.reshape(total, (TOKENS, MIXES * _GROUPS))))


@triton.jit
def one_mix(total, i: tl.constexpr):
    """One column, [TOKENS]: a sum of one number and zeros."""
    return tl.sum(tl.where((tl.arange(0, total.shape[1]) == i)[None, :], total, 0.0), axis=1)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sinkhorn(
    logits, scalings_row, mask, N_STREAMS: tl.constexpr, EPS: tl.constexpr, ITERS: tl.constexpr, STORE: tl.constexpr
):  # fmt: skip
    """Normalise columns and rows in turn; all are tuples of vectors over tokens.

    Softmax plus EPS stays as it is, and two vectors say by what its rows and columns are multiplied so far.

    Returns:
        The matrix, row by row.
    """
    start = ()
    for i in tl.static_range(N_STREAMS):
        top = logits[i * N_STREAMS]
        for j in tl.static_range(1, N_STREAMS):
            top = tl.maximum(top, logits[i * N_STREAMS + j], propagate_nan=tl.PropagateNan.ALL)
        powers = ()
        total = tl.zeros_like(top)
        for j in tl.static_range(N_STREAMS):
            power = tl.exp(logits[i * N_STREAMS + j] - top)
            powers = powers + (power,)  # noqa: RUF005 - Triton unpacks no tuple in a tuple
            total += power
        for j in tl.static_range(N_STREAMS):
            start = start + (powers[j] / total + EPS,)  # noqa: RUF005
    columns = ()
    for j in tl.static_range(N_STREAMS):
        total = start[j]
        for i in tl.static_range(1, N_STREAMS):
            total += start[i * N_STREAMS + j]
        columns = columns + (1.0 / (total + EPS),)  # noqa: RUF005
        if STORE:
            tl.store(scalings_row + j, columns[j], mask)
    rows = ()
    for _ in tl.static_range(N_STREAMS):
        rows = rows + (tl.full(mask.shape, 1.0, tl.float32),)  # noqa: RUF005
    for step in range(ITERS - 1):
        scaled = ()
        for i in tl.static_range(N_STREAMS):
            total = start[i * N_STREAMS] * columns[0]
            for j in tl.static_range(1, N_STREAMS):
                total = tl.fma(start[i * N_STREAMS + j], columns[j], total)
            scaled = scaled + (rows[i] / tl.fma(rows[i], total, EPS),)  # noqa: RUF005
            if STORE:
                tl.store(scalings_row + (2 * step + 1) * N_STREAMS + i, scaled[i], mask)
        rows = scaled
        scaled = ()
        for j in tl.static_range(N_STREAMS):
            total = start[j] * rows[0]
            for i in tl.static_range(1, N_STREAMS):
                total = tl.fma(start[i * N_STREAMS + j], rows[i], total)
            scaled = scaled + (columns[j] / tl.fma(columns[j], total, EPS),)  # noqa: RUF005
            if STORE:
                tl.store(scalings_row + (2 * step + 2) * N_STREAMS + j, scaled[j], mask)
        columns = scaled
    if STORE:
        for j in tl.static_range(N_STREAMS):
            tl.store(scalings_row + (2 * ITERS - 1) * N_STREAMS + j, tl.zeros_like(columns[j]), mask)
    matrix = ()
    for i in tl.static_range(N_STREAMS):
        for j in tl.static_range(N_STREAMS):
            matrix = matrix + (rows[i] * start[i * N_STREAMS + j] * columns[j],)  # noqa: RUF005
    return matrix


@triton.jit
def mix_tokens(
    partial_ptr, scale_ptr, base_ptr, pre_ptr, post_ptr, comb_ptr, mixes_ptr, rstd_ptr, scalings_ptr,
    first, last, n_tokens, n_splits,
    N_STREAMS: tl.constexpr, N_VALUES: tl.constexpr, N_MIXES: tl.constexpr, MIXES: tl.constexpr,
    RMS_EPS: tl.constexpr, PRE_EPS: tl.constexpr, SINKHORN_EPS: tl.constexpr, POST_MULT: tl.constexpr,
    ITERS: tl.constexpr, MIX_TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gates and matrices of the tokens from ``first`` to before ``last``, at most MIX_TOKENS of them.

    The normalised mixes of BLOCK_P tokens at a time and their 1 / rms are stored, which a backward may want; that is
    also how each token comes to a thread of its own.
    """
    mix = tl.arange(0, MIXES)
    for block in range(first, last, BLOCK_P):
        some = block + tl.arange(0, BLOCK_P)
        total = add_partials(partial_ptr, tl.minimum(some, n_tokens - 1), n_tokens, n_splits, N_MIXES, MIXES, BLOCK_S)
        rstd = tl.rsqrt(one_mix(total, N_MIXES) / N_VALUES + RMS_EPS)
        at = mixes_ptr + (some * N_MIXES)[:, None] + mix[None, :]
        tl.store(at, total * rstd[:, None], (some < last)[:, None] & (mix < N_MIXES)[None, :])
        tl.store(rstd_ptr + some, rstd, some < last)
    tl.debug_barrier()
    token = first + tl.arange(0, MIX_TOKENS)
    mask = token < last
    near = tl.minimum(token, n_tokens - 1)
    row = mixes_ptr + near * N_MIXES
    for i in tl.static_range(N_STREAMS):
        pre = sigmoid(tl.load(row + i) * tl.load(scale_ptr) + tl.load(base_ptr + i)) + PRE_EPS
        tl.store(pre_ptr + token * N_STREAMS + i, pre, mask)
    if comb_ptr is not None:
        for i in tl.static_range(N_STREAMS, 2 * N_STREAMS):
            post = sigmoid(tl.load(row + i) * tl.load(scale_ptr + 1) + tl.load(base_ptr + i)) * POST_MULT
            tl.store(post_ptr + (token - 1) * N_STREAMS + i, post, mask)
        logits = ()
        for i in tl.static_range(2 * N_STREAMS, N_MIXES):
            logit = tl.load(row + i) * tl.load(scale_ptr + 2) + tl.load(base_ptr + i)
            logits = logits + (logit,)  # noqa: RUF005
        scalings_row = None
        if scalings_ptr is not None:
            scalings_row = scalings_ptr + token * (2 * ITERS * N_STREAMS)
        comb = sinkhorn(logits, scalings_row, mask, N_STREAMS, SINKHORN_EPS, ITERS, scalings_ptr is not None)
        for i in tl.static_range(N_STREAMS * N_STREAMS):
            tl.store(comb_ptr + token * (N_STREAMS * N_STREAMS) + i, comb[i], mask)


@triton.jit
def load_sources(
    residual_ptr, row, stride_stream, column, mask, sources,
    N_SOURCES: tl.constexpr,
):  # fmt: skip
    """One chunk of each stream, [BLOCK_M, CHUNK], behind those that there are."""
    for i in tl.static_range(N_SOURCES):
        offset = tile(row + tl.full((), i, tl.int64) * stride_stream, column)
        sources = sources + (tl.load(residual_ptr + offset, mask, 0.0),)  # noqa: RUF005
    return sources


@triton.jit
def collapsed(sources, pre, place: tl.constexpr, N_STREAMS: tl.constexpr, N_SOURCES: tl.constexpr):
    """The weighed sum of one chunk's streams in fp32, added in order; without weights the first stream."""
    if pre is None:
        y = sources[place].to(tl.float32)
    else:
        y = pre[0] * sources[place].to(tl.float32)
        for i in tl.static_range(1, N_STREAMS):
            y = y + pre[i] * sources[place + i % N_SOURCES].to(tl.float32)
    return y


@triton.jit
def load_given(given_ptr, token, N_STREAMS: tl.constexpr):
    """What the streams of tokens are weighed with, from [n_tokens, N_STREAMS]: a tuple of [BLOCK_M, 1]."""
    pre = ()
    for i in tl.static_range(N_STREAMS):
        pre = pre + (tl.load(given_ptr + token * N_STREAMS + i)[:, None],)  # noqa: RUF005
    return pre


@triton.jit
def load_pre(
    partial_ptr, scale_ptr, base_ptr, pre_ptr, token, n_tokens, n_splits,
    N_STREAMS: tl.constexpr, N_VALUES: tl.constexpr, N_MIXES: tl.constexpr, MIXES: tl.constexpr,
    RMS_EPS: tl.constexpr, PRE_EPS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The gates of the partial sums, likewise; of one token, scalars.

    A tile of streams takes the layout of what it is multiplied by where that comes from a sum, and a norm's bits are
    decided by its layout. So one token's gates become scalars, and those of several go through memory, in the place
    where the programs that work out all gates write the same bits.
    """
    total = add_partials(partial_ptr, token, n_tokens, n_splits, N_MIXES, MIXES, BLOCK_S)
    rstd = tl.rsqrt(one_mix(total, N_MIXES) / N_VALUES + RMS_EPS)
    pre = ()
    for i in tl.static_range(N_STREAMS):
        gate = sigmoid(one_mix(total, i) * rstd * tl.load(scale_ptr) + tl.load(base_ptr + i)) + PRE_EPS
        if token.shape[0] == 1:
            pre = pre + (tl.sum(gate, axis=0),)  # noqa: RUF005
        else:
            tl.store(pre_ptr + token * N_STREAMS + i, gate)
    if token.shape[0] > 1:
        tl.debug_barrier()
        pre = load_given(pre_ptr, token, N_STREAMS)
    return pre


@triton.jit
def collapse_tokens(
    residual_ptr, partial_ptr, scale_ptr, base_ptr, given_ptr, norm_weight_ptr, y_ptr, pre_ptr, residual_out_ptr,
    stride_token, stride_stream, token, n_tokens, n_splits,
    N_STREAMS: tl.constexpr, N_SOURCES: tl.constexpr, N_COLS: tl.constexpr, N_MIXES: tl.constexpr,
    MIXES: tl.constexpr, RMS_EPS: tl.constexpr, PRE_EPS: tl.constexpr, NORM_EPS: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """The layer's input of tokens."""
    token_mask = token < n_tokens
    near = tl.minimum(token, n_tokens - 1)
    row = near * stride_token
    READ: tl.constexpr = 1 if FIRST else N_SOURCES
    sources = ()
    if RESIDENT:
        for c in tl.static_range((N_COLS + CHUNK - 1) // CHUNK):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = tile_mask(token_mask, column, N_COLS, CHUNK)
            sources = load_sources(residual_ptr, row, stride_stream, column, mask, sources, READ)
    if WAIT == "partials":
        gdc_wait()
    pre = None
    if given_ptr is not None:
        pre = load_given(given_ptr, near, N_STREAMS)
    elif not FIRST:
        pre = load_pre(
            partial_ptr, scale_ptr, base_ptr, pre_ptr, near, n_tokens, n_splits,
            N_STREAMS, N_SOURCES * N_COLS, N_MIXES, MIXES, RMS_EPS, PRE_EPS, BLOCK_S,
        )  # fmt: skip
    collapse_rows(
        residual_ptr, norm_weight_ptr, y_ptr, residual_out_ptr, sources, pre, token, token_mask, row, stride_stream,
        N_STREAMS, READ, N_COLS, NORM_EPS, BLOCK_M, CHUNK, RESIDENT,
    )  # fmt: skip


@triton.jit
def collapse_rows(
    residual_ptr, norm_weight_ptr, y_ptr, residual_out_ptr, sources, pre, token, token_mask, row, stride_stream,
    N_STREAMS: tl.constexpr, READ: tl.constexpr, N_COLS: tl.constexpr, NORM_EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """The layer's input of tokens, normalised if there is a norm; also copies of the one stream if they are wanted."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    n_chunks: tl.constexpr = (N_COLS + CHUNK - 1) // CHUNK
    y_row = token * N_COLS
    squares = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    kept = ()
    if RESIDENT:
        for c in tl.static_range(n_chunks):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = tile_mask(token_mask, column, N_COLS, CHUNK)
            y = collapsed(sources, pre, c * READ, N_STREAMS, READ).to(DTYPE)
            if residual_out_ptr is not None:
                for i in tl.static_range(N_STREAMS):
                    at = residual_out_ptr + tile((token * N_STREAMS + i) * N_COLS, column)
                    tl.store(at, sources[c * READ + i % READ], mask)
            if norm_weight_ptr is None:
                tl.store(y_ptr + tile(y_row, column), y, mask)
            else:
                squares = add_squares(squares, y, tl.float32)
                kept = kept + (y,)  # noqa: RUF005
    else:
        for c in range(n_chunks):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = tile_mask(token_mask, column, N_COLS, CHUNK)
            here = ()
            here = load_sources(residual_ptr, row, stride_stream, column, mask, here, READ)
            y = collapsed(here, pre, 0, N_STREAMS, READ).to(DTYPE)
            if residual_out_ptr is not None:
                for i in tl.static_range(N_STREAMS):
                    at = residual_out_ptr + tile((token * N_STREAMS + i) * N_COLS, column)
                    tl.store(at, here[i % READ], mask)
            tl.store(y_ptr + tile(y_row, column), y, mask)
            if norm_weight_ptr is not None:
                squares = add_squares(squares, y, tl.float32)
    if norm_weight_ptr is not None:
        rstd = inverse_rms(squares, N_COLS, NORM_EPS, tl.float32)
        if RESIDENT:
            for c in tl.static_range(n_chunks):
                column = c * CHUNK + tl.arange(0, CHUNK)
                mask = tile_mask(token_mask, column, N_COLS, CHUNK)
                weight = load_weight(norm_weight_ptr, column, N_COLS)
                y = normalised(kept[c], rstd, weight, 0.0, False, DTYPE, tl.float32)
                tl.store(y_ptr + tile(y_row, column), y.to(DTYPE), mask)
        else:
            tl.debug_barrier()
            for c in range(n_chunks):
                column = c * CHUNK + tl.arange(0, CHUNK)
                mask = tile_mask(token_mask, column, N_COLS, CHUNK)
                weight = load_weight(norm_weight_ptr, column, N_COLS)
                y = tl.load(y_ptr + tile(y_row, column), mask, 0.0)
                y = normalised(y, rstd, weight, 0.0, False, DTYPE, tl.float32)
                tl.store(y_ptr + tile(y_row, column), y.to(DTYPE), mask)


@triton.jit(do_not_specialize=["n_tokens", "n_splits", "n_mix_programs", "mix_tokens_each"])
def finish_kernel(
    residual_ptr, partial_ptr, scale_ptr, base_ptr, given_ptr, norm_weight_ptr,
    y_ptr, pre_ptr, post_ptr, comb_ptr, residual_out_ptr, mixes_ptr, rstd_ptr, scalings_ptr,
    stride_token, stride_stream,
    n_tokens, n_splits, n_mix_programs, mix_tokens_each,
    N_STREAMS: tl.constexpr, N_SOURCES: tl.constexpr, N_COLS: tl.constexpr, N_MIXES: tl.constexpr,
    MIXES: tl.constexpr, RMS_EPS: tl.constexpr, PRE_EPS: tl.constexpr, SINKHORN_EPS: tl.constexpr,
    POST_MULT: tl.constexpr, ITERS: tl.constexpr, NORM_EPS: tl.constexpr, FIRST: tl.constexpr,
    MIX_TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, RESIDENT: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Gates and matrices, or the layer's input, of some tokens.

    FIRST says that the layer's input is the first stream; RESIDENT, that all streams of a token are in registers before
    the gates are known; WAIT, ``"none"`` or ``"partials"``, whether the kernel that writes the partial sums may still
    be running.
    """
    pid = tl.program_id(0)
    row = (pid - n_mix_programs).to(tl.int64) * BLOCK_M
    if mixes_ptr is not None:  # noqa: SIM102 - settled when compiling
        if pid < n_mix_programs:
            if WAIT != "none":
                gdc_wait()
            mix_tokens(
                partial_ptr, scale_ptr, base_ptr, pre_ptr, post_ptr, comb_ptr, mixes_ptr, rstd_ptr, scalings_ptr,
                pid.to(tl.int64) * mix_tokens_each, tl.minimum((pid + 1).to(tl.int64) * mix_tokens_each, n_tokens),
                n_tokens, n_splits, N_STREAMS, N_SOURCES * N_COLS, N_MIXES, MIXES,
                RMS_EPS, PRE_EPS, SINKHORN_EPS, POST_MULT, ITERS, MIX_TOKENS, BLOCK_P, BLOCK_S,
            )  # fmt: skip
    if row >= 0:
        collapse_tokens(
            residual_ptr, partial_ptr, scale_ptr, base_ptr, given_ptr, norm_weight_ptr, y_ptr, pre_ptr,
            residual_out_ptr, stride_token, stride_stream, row + tl.arange(0, BLOCK_M), n_tokens, n_splits,
            N_STREAMS, N_SOURCES, N_COLS, N_MIXES, MIXES, RMS_EPS, PRE_EPS, NORM_EPS, FIRST,
            BLOCK_S, BLOCK_M, CHUNK, RESIDENT, WAIT,
        )  # fmt: skip
