from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))

GROUP = 96 // 64


# args: f32[1,8,64] f32[1,8,64] 100 32 8 64
@triton.jit
def left_out(x_ptr, out_ptr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    COUNT: tl.constexpr = C // P
#                         ^ PARTITION_DIV
    x = tl.load(rows(x_ptr, 1, R, D))
    for i in tl.static_range((C + 2) // P):
#                            ^ PARTITION_DIV
        x = x + i
    for i in tl.static_range(COUNT // 2):
#                            ^ PARTITION_DIV
        x = x + i
    tl.store(rows(out_ptr, 1, R, D), x)


# args: f32[1,8,64] f32[1,8,64] i32[1,1] f32[1,8,64] 8 64
@triton.jit
def one_partition(q_ptr, k_ptr, table, out_ptr, R: tl.constexpr, D: tl.constexpr):
    i = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, 1), (1, 1), (0, 0), (1, 1), (1, 0)))
    k = tl.load(rows(k_ptr, 1, R, D))
    scores = tl.dot(tl.load(rows(q_ptr, 1, R, D)), tl.permute(k, (0, 2, 1)))  # npu: ignore[LAST_DIM_64]
    m, e, s = rblib.dynamic_flash_attn_tile(scores, i)
#             ^ PARTITION_DIV
    tl.store(rows(out_ptr, 1, R, D), tl.dot(e, k) / s)


# args: f32[1,8,64] f32[1,8,64] 96 32 8 64
# args: f32[1,8,64] f32[1,8,64] 100 32 8 64
@triton.jit
def divided(x_ptr, out_ptr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    x = tl.load(rows(x_ptr, 1, R, D))
    for i in tl.static_range((C + P - 1) // P):
        x = x + i // 2 + GROUP
    for i in tl.static_range(-(-C // P)):
        x = x + (i * P) // C
    for i in tl.static_range(triton.cdiv(C, P)):
        x = x + i % 3
    for i in tl.static_range((C - 1) // P + 1):
        x = x + i
    for i in tl.static_range((31 + C) // 32):
        x = x + i
    tl.store(rows(out_ptr, 1, R, D), x)


# args: f32[1,64,64] f32[1,64,64] i32[1,2] f32[1,64,64] 64 64
@triton.jit
def two_partitions(q_ptr, k_ptr, table, out_ptr, R: tl.constexpr, D: tl.constexpr):
    q, k = tl.load(rows(q_ptr, 1, R, D)), tl.load(rows(k_ptr, 1, R, D))
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)))
    i = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, 2), (2, 1), (0, 0), (1, 1), (1, 0)))
    m, e, s = rblib.dynamic_flash_attn_tile(scores, i)
    out = tl.dot(e, k)
    j = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, 2), (2, 1), (0, 1), (1, 1), (1, 0)))
    n, e, t = rblib.dynamic_flash_attn_tile(scores, j, m)
    s, out = rblib.flash_attn_recompute(m, n, s, t, out, tl.dot(e, k))
    tl.store(rows(out_ptr, 1, R, D), out / s)
