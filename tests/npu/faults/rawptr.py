from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def addresses(x_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(x_ptr)
#       ^ RAWPTR
    x = tl.load(x_ptr + 64)
#               ^ RAWPTR
    tl.store(out_ptr, 1.0)
#   ^ RAWPTR
    i = rblib.to_dynamic_index(table)
#       ^ RAWPTR
    p = tl.make_block_ptr(x_ptr + 64, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#                         ^ RAWPTR
    p = tl.make_block_ptr(rows(x_ptr, B, R, C), (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#       ^ RAWPTR
    x = tl.load(rows(x_ptr, B, R, C), mask=None, other=0.0)
#       ^ RAWPTR
    x = tl.load(rows(x_ptr, B, R, C), x > 0.0)
#       ^ RAWPTR
    tl.store(rows(out_ptr, B, R, C), x, mask=x > 0.0)
#   ^ RAWPTR
    y = tl.reshape(x_ptr, (B, R, C))
#       ^ RAWPTR
    y = tl.dot(x, x_ptr)
#       ^ RAWPTR
    out_ptr += 64
#   ^ RAWPTR


@triton.jit
def block_pointers(x_ptr, scale, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    base = x_ptr
    p = tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (1, R, C), (2, 1, 0))
    x = tl.load(p, mask=None, other=None) * scale
    i = rblib.to_dynamic_index(tl.make_block_ptr(table, (B,), (1,), (0,), (1,), (0,)))
    q = tl.make_block_ptr(out_ptr, (B, R, C), (R * C, C, 1), (i, 0, 0), (1, R, C), (2, 1, 0))
    tl.store(q, tl.max(x, 2, keep_dims=True) + tl.load(q))
