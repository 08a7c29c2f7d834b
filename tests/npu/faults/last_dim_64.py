from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def literal(x_ptr, out_ptr, B: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, 4, 128), (512, 128, 1), (0, 0, 0), (B, 4, 32), (2, 1, 0))
#       ^ LAST_DIM_64
    q = tl.make_block_ptr(out_ptr, (B, 4, 128), (512, 128, 1), (0, 0, 0), (B, 4, 32), (2, 1, 0))
#       ^ LAST_DIM_64
    tl.store(q, tl.load(p))
    p = tl.advance(p, (0, 0, 32))
    q = tl.advance(q, (0, 0, 32))
    tl.store(q, tl.load(p))


# args: f32[1,4,100] f32[1,4,100] 4 100
@triton.jit
def told(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (1, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0)))
#               ^ LAST_DIM_64
    tl.store(tl.make_block_ptr(out_ptr, (1, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0)), x)
#            ^ LAST_DIM_64


# args: f32[1,48,64] f32[1,48,64] 48 64
@triton.jit
def product(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (1, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0)))
    scores = tl.dot(x, tl.permute(x, (0, 2, 1)))
#            ^ LAST_DIM_64
    y = tl.dot(scores, x)
    tl.store(tl.make_block_ptr(out_ptr, (1, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0)), y)


# args: f32[1,4,80] i32[1,3] f32[1,4,80] 4 128 3
@triton.jit
def padded(x_ptr, table, out_ptr, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (1, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0)))
    i = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, 0), (1, 1), (1, 0)))
    q = tl.make_block_ptr(out_ptr, (1, R, C), (R * C, C, 1), (i, 0, 0), (1, R, C), (2, 1, 0))
    tl.store(q, x - tl.max(x, axis=2, keep_dims=True))
