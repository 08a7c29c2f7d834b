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
def conditions(x_ptr, table, scale, out_ptr, R: tl.constexpr, N: tl.constexpr):
    x = tl.load(rows(x_ptr, 1, R, 64))
    i = count(table, 0, N)
    if i == 0:  # npu: ignore[DYN_USE]
#      ^ DYN_IF
        x = x + 1.0
    if x > 0.0:
#      ^ DYN_IF
        x = x + 1.0
    if scale:
#      ^ DYN_IF
        x = x + 1.0
    x = x + 1.0 if scale else x
#                  ^ DYN_IF
    if i and R > 4:
#      ^ DYN_IF
        x = x + 1.0
    if rblib.partition_skip(i):
#      ^ DYN_IF
        x = x + 1.0
    if not rblib.partition_skip(i):
#      ^ DYN_IF
        x = x + 1.0
    if rblib.partition_skip(i) == True:
#      ^ DYN_IF
        x = x + 1.0
    if rblib.partition_skip(i) != True:
#      ^ DYN_IF
        x = x + 1.0
    if rblib.partition_skip(i) is False:
#      ^ DYN_IF
        x = x + 1.0
    if rblib.partition_skip(i) == False and R > 4:
#      ^ DYN_IF
        x = x + 1.0
    tl.store(rows(out_ptr, 1, R, 64), x)


@triton.jit
def skipped(x_ptr, table, out_ptr, R: tl.constexpr, N: tl.constexpr, FLAG: tl.constexpr):
    x = tl.load(rows(x_ptr, 1, R, 64))
    for p in tl.static_range(N):
        i = count(table, p, N)
        if rblib.partition_skip(i) == False:
            if p == 0:
                x = x + 1.0
            else:
                x = x + 2.0
        if False == rblib.partition_skip(i):
            x = x + 3.0
        else:
            x = x + 4.0
        if p > 0 and FLAG:
            if rblib.partition_skip(i) == False:
                x = x + 5.0
    tl.store(rows(out_ptr, 1, R, 64), x)
