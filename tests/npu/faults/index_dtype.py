from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


# args: f32[4,8,64] i64[1,2] f32[1,8,64] 4 8 64 2
# args: f32[4,8,64] f32[1,2] f32[1,8,64] 4 8 64 2
@triton.jit
def wide(x_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    p = tl.make_block_ptr(table, (1, N), (N, 1), (0, 0), (1, 1), (1, 0))
    i = rblib.to_dynamic_index(p).cast(tl.int32)
#       ^ INDEX_DTYPE
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (i, 0, 0), (1, R, C), (2, 1, 0))
    tl.store(rows(out_ptr, 1, R, C), tl.load(p))


# args: f32[4,8,64] i32[1,2] f32[1,8,64] 4 8 64 2
@triton.jit
def narrow(x_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    p = tl.make_block_ptr(table, (1, N), (N, 1), (0, 0), (1, 1), (1, 0))
    i = rblib.to_dynamic_index(p).cast(tl.int64)
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (i, 0, 0), (1, R, C), (2, 1, 0))
    tl.store(rows(out_ptr, 1, R, C), tl.load(p))
