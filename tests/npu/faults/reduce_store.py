from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def stored(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, 64))
    m = tl.max(x, axis=2, keep_dims=True)
    one = tl.make_block_ptr(  # npu: ignore[LAST_DIM_64]
        out_ptr, (B, R, 1), (R, 1, 1), (0, 0, 0), (B, R, 1), (2, 1, 0)
    )
    tl.store(one, m)
#   ^ REDUCE_STORE
    flat = tl.make_block_ptr(out_ptr, (B, R), (R, 1), (0, 0), (B, R), (1, 0))
    tl.store(flat, tl.reshape(tl.sum(x, axis=2, keep_dims=True), (B, R)))
#   ^ REDUCE_STORE


@triton.jit
def calculated(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, 64))
    m = tl.max(x, axis=2, keep_dims=True)
    tl.store(rows(out_ptr, B, R, 64), x - m)
