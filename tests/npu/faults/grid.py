from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def add(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)) + 1.0)


def host(x, out):
    add.warmup(x, out, 1, 4, 64, grid=(4,))
#                                     ^ GRID
    add[(1, 2)](x, out, 1, 4, 64)
#   ^ GRID
    add.warmup(x, out, 1, 4, 64, grid=(1,))
    return out
