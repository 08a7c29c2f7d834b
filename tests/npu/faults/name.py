from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib

SCALE = 0.5


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def count(table, at, N: tl.constexpr):
    pointer = tl.make_block_ptr(table, (1, N), (N, 1), (0, at), (1, 1), (1, 0))
    return rblib.to_dynamic_index(pointer, 64).cast(tl.int32)


@triton.jit
def undefined(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = z + x
#       ^ NAME
    z = x * SCALES
#           ^ NAME
    x += w
#        ^ NAME
    tl.store(rows(out_ptr, B, R, D), x)
#                                ^ NAME


@triton.jit
def only_if_not_skipped(x_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    number = 1.0
    if rblib.partition_skip(count(table, 1, N)) == False:
        y = x + 1.0
        number = 2.0
        x = tl.reshape(x, (R, B, C))
    tl.store(rows(out_ptr, B, R, C), y)
#                                    ^ NAME
    tl.store(rows(out_ptr, B, R, C), y * number)
#                                    ^ NAME
#                                        ^ NAME
    tl.store(rows(out_ptr, B, R, C), x)
#                                    ^ NAME


@triton.jit
def defined(
    x_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr
):
    x = tl.load(rows(x_ptr, B, R, C))
    y = x
    if MODE == 0:
        factor = 1.0
    if MODE == 1:
        factor = SCALE
    number = 1.0
    if rblib.partition_skip(count(table, 1, N)) == False:
        y = x * factor
        z = x + y
        number = 1.0
    else:
        z = x
    tl.store(rows(out_ptr, B, R, C), y + z * number)
