from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def others(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    m = tl.max(x, axis=1, keep_dims=True)
#       ^ REDUCE_AXIS
    s = tl.sum(x, axis=-3, keep_dims=True)
#       ^ REDUCE_AXIS
    a = tl.sum(x, keep_dims=True)
#       ^ REDUCE_AXIS
    p = rblib.softmax(x, axis=1)
#       ^ REDUCE_AXIS
    tl.store(rows(out_ptr, B, R, C), x - m + s + a + p)


@triton.jit
def last(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    m = tl.max(x, axis=2, keep_dims=True)
    s = tl.sum(tl.permute(x, (0, 2, 1)), axis=-1, keep_dims=True)
    p = rblib.softmax(x, axis=2) + rblib.softmax(x, -1) + rblib.softmax(x)
    tl.store(rows(out_ptr, B, R, C), x - m + tl.sum(x, 2, keep_dims=True) + p + tl.permute(s, (0, 2, 1)))
