from rebel import triton
from rebel.triton import language as tl


@triton.jit
def wrong(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, NUM_BLOCK: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, R, C), (C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#       ^ STRIDE_MISMATCH
    q = tl.make_block_ptr(
#       ^ STRIDE_MISMATCH
        base=out_ptr,
        shape=(B, R, C),
        strides=(R * C, 1, R),
        offsets=(0, 0, 0),
        block_shape=(B, R, C),
        order=(2, 1, 0),
    )
    r = tl.make_block_ptr(x_ptr, (B, R, 64), (R * 128, 128, 2), (0, 0, 0), (B, R, 64), (2, 1, 0))
#       ^ STRIDE_MISMATCH
    tl.store(q, tl.load(p))


# args: f32[4,8,64] f32[4,8,64] 4 4 64
@triton.jit
def another_tensor(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#       ^ STRIDE_MISMATCH
    q = tl.make_block_ptr(out_ptr, (B, 2 * R, C), (2 * R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
    r = tl.make_block_ptr(out_ptr, (B, 2 * R, C), (2 * R * C, C, 1), (0, R, 0), (B, R, C), (2, 1, 0))
    tl.store(q, tl.load(p))
    tl.store(r, tl.load(p))


# args: f32[4,8,64] f32[4,8,64] 4 8 64
# args: f32[4,8,80] f32[4,8,80] 4 8 128
@triton.jit
def contiguous(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    AREA: tl.constexpr = C * R
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
    q = tl.make_block_ptr(out_ptr, (B, R, C), (AREA, (C + C) // 2, 1), (0, 0, 0), (B, R, C), (0, 1, 2))
    tl.store(q, tl.load(p))
