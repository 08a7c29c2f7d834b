from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def literals(x_ptr, out_ptr, R: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (4, R, 64), (R * 64, 64, 1), (3, 0, 0), (2, R, 64), (2, 1, 0))
#       ^ OUT_OF_BOUNDS
    p = tl.make_block_ptr(x_ptr, (4, R, 64), (R * 64, 64, 1), (-1, 0, 0), (1, R, 64), (2, 1, 0))
#       ^ OUT_OF_BOUNDS
    p = tl.make_block_ptr(x_ptr, (4, R, 64), (R * 64, 64, 1), (0, 0, 0), (4, R + 1, 64), (2, 1, 0))
#       ^ OUT_OF_BOUNDS
    tl.store(rows(out_ptr, 4, R, 64), tl.load(rows(x_ptr, 4, R, 64)))


# args: f32[2,4,64] f32[2,4,64] 2 4 64
@triton.jit
def advanced(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0))
    q = tl.make_block_ptr(out_ptr, (B, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0))
    for i in tl.static_range(3):
        x = tl.load(p)
        p = tl.advance(p, (1, 0, 0))
#           ^ OUT_OF_BOUNDS
    back = tl.advance(p, (-4, 0, 0))
#          ^ OUT_OF_BOUNDS
    tl.store(q, x + tl.load(back))


# args: f32[2,4,64] f32[2,4,64] 2 5 64
@triton.jit
def larger(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, R - 1, C), ((R - 1) * C, C, 1), (0, 0, 0), (B, R - 1, C), (2, 1, 0))
    x = tl.load(p)
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))  # npu: ignore[STRIDE_MISMATCH]
#       ^ OUT_OF_BOUNDS
    y = tl.load(p)
    tl.store(tl.make_block_ptr(out_ptr, (B, R - 1, C), ((R - 1) * C, C, 1), (0, 0, 0), (B, R - 1, C), (2, 1, 0)), x)


# args: f32[2,4,64] i32[1,2] f32[2,4,64] 2 4 64
@triton.jit
def inside(x_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (B - 1, 0, 0), (1, R, C), (2, 1, 0))
    i = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, B), (B, 1), (0, 0), (1, 1), (1, 0)))
    q = tl.make_block_ptr(out_ptr, (B, R, C), (R * C, C, 1), (i, 0, 0), (1, R, C), (2, 1, 0))
    for _ in tl.static_range(B):
        tl.store(q, tl.load(p))
        p = tl.advance(p, (-1, 0, 0))
