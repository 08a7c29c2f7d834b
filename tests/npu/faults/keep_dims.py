from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def dropped(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    m = tl.max(x, axis=2)
#       ^ KEEP_DIMS
    e = tl.exp(x - m[:, :, None])
    s = tl.sum(
#       ^ KEEP_DIMS
        e,
        2,
        False,
    )
    t = x.sum(axis=-1, keep_dims=0)
#       ^ KEEP_DIMS
    tl.store(rows(out_ptr, B, R, C), e / s[:, :, None] + t[:, :, None])


@triton.jit
def kept(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    m = tl.max(x, axis=2, keep_dims=True)
    e = tl.exp(x - m)
    s = tl.sum(e, -1, True)
    tl.store(rows(out_ptr, B, R, C), e / s)
