from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def count(table, at, N: tl.constexpr):
    pointer = tl.make_block_ptr(table, (1, N), (N, 1), (0, at), (1, 1), (1, 0))
    return rblib.to_dynamic_index(pointer, 64).cast(tl.int32)


@triton.jit
def loops(x_ptr, table, out_ptr, n, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    for i in range(4):
#            ^ RANGE
        x = x + 1.0
    for i in tl.range(0, R):
#            ^ RANGE
        x = x + 1.0
    while n:
#   ^ RANGE
        x = x + 1.0
    x = tl.load(rows(x_ptr, B, R, C))
    for i in (1, 2):
#            ^ RANGE
        x = x + i
    for i in tl.static_range(0, 4, 0):
#            ^ RANGE
        x = x + i
    for i in tl.static_range(n):
#            ^ RANGE
        x = x + 1.0
    x = tl.load(rows(x_ptr, B, R, C))
    for i in tl.static_range(count(table, 0, R)):
#            ^ RANGE
        x = x + 1.0
    for i in tl.static_range(R / 2):
#            ^ RANGE
        x = x + 1.0
    for i in tl.static_range(0, 65537):
#            ^ RANGE
        x = x + 1.0
    x = tl.load(rows(x_ptr, B, R, C))
    tl.store(rows(out_ptr, B, R, C), x)


@triton.jit
def unrolled(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    for i in tl.static_range(B):
        x = x + i
    for i in tl.static_range(1, R):
        for j in tl.static_range(i, R, 2):
            x = x + j
    for i in tl.static_range(R - 1, -1, -1):
        x = x + i
    for i in tl.static_range(8, step=2):
        x = x + i
    for i in tl.static_range(0):
        x = x + undefined
    tl.store(rows(out_ptr, B, R, C), x)
