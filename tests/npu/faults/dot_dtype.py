from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def mixed(x_ptr, out_ptr, B: tl.constexpr):
    x = tl.load(rows(x_ptr, B, 64, 64))
    y = tl.dot(x > 0.0, x)
#       ^ DOT_DTYPE
    tl.store(rows(out_ptr, B, 64, 64), tl.dot(x, x == 1.0))
#                                      ^ DOT_DTYPE


@triton.jit
def same(x_ptr, out_ptr, B: tl.constexpr):
    x = tl.load(rows(x_ptr, B, 64, 64))
    tl.store(rows(out_ptr, B, 64, 64), tl.dot(x, x.to(tl.float32)))
