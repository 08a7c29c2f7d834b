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
def arithmetic(x_ptr, table, out_ptr, R: tl.constexpr, N: tl.constexpr):
    x = tl.load(rows(x_ptr, 1, R, 64))
    i = count(table, 0, N)
    j = i * 2
#       ^ DYN_USE
    j = i - 1
#       ^ DYN_USE
    j = i + i
#       ^ DYN_USE
    j = i + 1.5
#       ^ DYN_USE
    y = x * i
#       ^ DYN_USE
    y = tl.maximum(x, i)
#       ^ DYN_USE
    j = i.cast(tl.float32)
#       ^ DYN_USE
    larger = i > 4
#            ^ DYN_USE
    j = -i
#       ^ DYN_USE
    tl.store(rows(out_ptr, 1, R, 64), x)


@triton.jit
def places(x_ptr, table, out_ptr, R: tl.constexpr, N: tl.constexpr):
    x = tl.load(rows(x_ptr, 1, R, 64))
    i = count(table, 0, N)
    p = tl.make_block_ptr(table, (1, N), (N, 1), (0, i), (1, 1), (1, 0))
    j = rblib.to_dynamic_index(p)
#       ^ DYN_USE
    p = tl.make_block_ptr(x_ptr, (N, R, 64), (R * 64, 64, 1), (i, 0, 0), (1, R, 64), (2, 1, 0))
    q = tl.advance(p, (1, 0, 0))
#       ^ DYN_USE
    q = tl.make_block_ptr(x_ptr, (N, R, 64), (R * 64, 64, 1), (x, 0, 0), (1, R, 64), (2, 1, 0))
#       ^ DYN_USE
    y = rblib.dynamic_load(p, 1, 4)
#       ^ DYN_USE
    y = rblib.insert(x, x, 1, R)
#       ^ DYN_USE
    y = rblib.dynamic_masked_softmax(x, x)
#       ^ DYN_USE
    if rblib.partition_skip(i + 1) == False:
#      ^ DYN_USE
        y = x
    if rblib.partition_skip(R) == False:
#      ^ DYN_USE
        y = x
    k = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, 0), (1, 1), (1, 0)), 1.5)
#       ^ DYN_USE
    tl.store(rows(out_ptr, 1, R, 64), i)
#   ^ DYN_USE


@triton.jit
def allowed(cache, new, table, out_ptr, B: tl.constexpr, R: tl.constexpr, L: tl.constexpr, N: tl.constexpr):
    i = count(table, 0, N)
    block = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, 1), (1, 1), (1, 0))).cast(tl.int32)
    p = tl.make_block_ptr(cache, (B, R, 64), (R * 64, 64, 1), (block, 0, 0), (1, R, 64), (2, 1, 0))
    q = tl.advance(p, (0, 0, 0))
    rows_ = rblib.insert(rblib.dynamic_load(p, 1, i), tl.load(rows(new, 1, L, 64)), 1, i)
    if rblib.partition_skip(i) == False:
        rblib.dynamic_store(q, rows_, 1, i + L)
    x = rblib.dynamic_masked_softmax(rows_, L + i)
    tl.store(rows(out_ptr, 1, R, 64), x)
