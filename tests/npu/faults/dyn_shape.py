from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def count(table, at, N: tl.constexpr):
    pointer = tl.make_block_ptr(table, (1, N), (N, 1), (0, at), (1, 1), (1, 0))
    return rblib.to_dynamic_index(pointer, 64).cast(tl.int32)


@triton.jit
def sizes(x_ptr, table, out_ptr, n, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, n, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#       ^ DYN_SHAPE
    x = tl.load(rows(x_ptr, B, R, C))
    i = count(table, 0, R)
    y = tl.zeros((B, i, C), dtype=tl.float32)
#       ^ DYN_SHAPE
    y = tl.reshape(x, (B, R, 2, C / 2))
#       ^ DYN_SHAPE
    y = tl.broadcast_to(x, (B, R, 1.5))
#       ^ DYN_SHAPE
    y = tl.advance(rows(x_ptr, B, R, C), (0, i, 0))
#       ^ DYN_SHAPE
    y = tl.max(x, axis=n, keep_dims=True)
#       ^ DYN_SHAPE
    y = tl.permute(x, (0, 2, n))
#       ^ DYN_SHAPE
    y = rblib.window_slice(x, i, 1, n)
#       ^ DYN_SHAPE
    y = tl.zeros("abc", dtype=tl.float32)
#       ^ DYN_SHAPE
    tl.store(rows(out_ptr, B, R, C), x)


@triton.jit
def static(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SHAPE: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.zeros([B, R, C // 1], dtype=tl.float32)
    y = tl.reshape(x, (B, R, 2, C // 2))
    y = tl.reshape(x, SHAPE)
    y = tl.zeros((SHAPE[0], len(SHAPE)), dtype=tl.float32)
    tl.store(rows(out_ptr, B, R, C), x)
