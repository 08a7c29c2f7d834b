from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


# args: bf16[1,8,64] f32[1,8,64] 1 8 64
# args: f16[1,8,64] f32[1,8,64] 1 8 64
# args: i32[1,8,64] f32[1,8,64] 1 8 64
@triton.jit
def inputs(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#       ^ DTYPE
    tl.store(rows(out_ptr, B, R, C), tl.load(p))


# args: f32[1,8,64] f64[1,8,64] 1 8 64
@triton.jit
def outputs(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    q = tl.make_block_ptr(out_ptr, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#       ^ DTYPE
    tl.store(q, tl.load(rows(x_ptr, B, R, C)))


@triton.jit
def made(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.zeros((B, R, C), dtype=tl.float16)
#       ^ DTYPE
    y = tl.tensor(1, tl.int32)
#       ^ DTYPE
    y = tl.sum(x, axis=2, keep_dims=True, dtype=tl.float64)
#       ^ DTYPE
    y = x * 1e39
#       ^ DTYPE
    tl.store(rows(out_ptr, B, R, C), x)


# args: f32[1,8,64] f32[1,8,64] bf16[2,2] 1 8 64
@triton.jit
def float32(x_ptr, out_ptr, unread, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.zeros((B, R, C), dtype=tl.float32)
    y = tl.zeros((B, R, C), x.dtype)
    x = tl.sum(x, axis=2, keep_dims=True, dtype=tl.float32) * x + 3e38
    tl.store(rows(out_ptr, B, R, C), x)
