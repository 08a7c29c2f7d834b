# Every rule is broken, nearly all of them in one kernel: no fault hides another.

from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))
#          ^ LAST_DIM_64 OUT_OF_BOUNDS STRIDE_MISMATCH


# args: f32[2,48,64].T i64[1,4] bf16[2,64,48] f32[1] f32[2,64,48] 2 64 48 4 100
@triton.jit
def everything(
    x_ptr,
#   ^ NONCONTIG_INPUT
    table,
    half_ptr,
    scale,
    out_ptr,
    B: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    LENGTH: tl.constexpr,
):
    pid = tl.program_id(0)
#         ^ PROGRAM_ID
    flat = tl.make_block_ptr(x_ptr, (B * R * C,), (1,), (0,), (64,), (0,))
#          ^ OUT_OF_BOUNDS RANK STRIDE_MISMATCH
    raw = tl.load(flat)
    x = tl.load(rows(x_ptr, B, R, C))
    offsets = tl.arange(0, C)
#             ^ UNSUPPORTED_OP
    raw = tl.load(x_ptr + offsets)
#                 ^ RAWPTR
    raw = tl.load(x_ptr + 64, mask=x > 0.0)
#         ^ RAWPTR
#                 ^ RAWPTR
    half = tl.load(tl.make_block_ptr(half_ptr, (B, R, C), (C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0)))
#                  ^ DTYPE LAST_DIM_64 STRIDE_MISMATCH
    count = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, 0), (1, 1), (1, 0)))
#           ^ INDEX_DTYPE
    twice = count * 2
#           ^ DYN_USE
    if count == 0:
#      ^ DYN_IF DYN_USE
        x = x + undefined
#               ^ NAME
    m = tl.max(x, axis=1)
#       ^ KEEP_DIMS REDUCE_AXIS
    e = tl.exp2(x - tl.reshape(m, (B, 1, C)))
#       ^ OP_DOC_ONLY
    s = tl.sum(e, axis=2, keep_dims=True)
    tl.store(tl.make_block_ptr(out_ptr, (B, R, 1), (R, 1, 1), (0, 0, 0), (B, R, 1), (2, 1, 0)), s)
#   ^ REDUCE_STORE
#            ^ LAST_DIM_64 STRIDE_MISMATCH
    y = tl.reshape(half, (B, R, C + 1))
#       ^ SHAPE
    y = tl.dot(half, half)
#       ^ DOT_SHAPE
    for i in range(LENGTH // 64):
#            ^ RANGE
#                  ^ PARTITION_DIV
        e = e + scale
#           ^ SCALAR_PARAM
    while LENGTH:
#   ^ RANGE
        z = tl.dot(e, e)
    k = tl.permute(tl.broadcast_to(tl.reshape(e, (1, B * R, C)), (B, B * R, C)), (0, 2, 1))
#       ^ MATMUL_ORDER
    z = tl.dot(e, k)
    z = tl.dot(e, e > 0.0)
#       ^ DOT_DTYPE
    tl.static_assert(LENGTH % 64 == 0, "whole partitions")
#   ^ STATIC_ASSERT
    v = tl.zeros((B, pid, LENGTH / 2), dtype=tl.float32)
#       ^ DYN_SHAPE
    w = [i for i in tl.static_range(4)]
#       ^ SYNTAX
    tl.store(rows(out_ptr, B + 1, R, C), e, boundary_check=(0,))
#   ^ BOUNDARY_CHECK


def host(x, table, half, scale, out):
    everything.warmup(x, table, half, scale, out, 2, 64, 48, 4, 100, grid=(2, 3))
#                                                                         ^ GRID
