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
def elements(x_ptr, y_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, 128))
    y = tl.load(rows(y_ptr, B, R, 64))
    z = x + y
#       ^ SHAPE
    z = tl.maximum(x, y)
#       ^ SHAPE
    z = tl.broadcast_to(x, (B, R, 64))
#       ^ SHAPE
    z = tl.broadcast(x, y)
#       ^ SHAPE
    z = x + None
#       ^ SHAPE
    tl.store(rows(out_ptr, B, R, 128), x)


@triton.jit
def dimensions(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, 128))
    y = tl.reshape(x, (B, R, 64))
#       ^ SHAPE
    y = tl.reshape(x, (B, R, 2, 0))
#       ^ SHAPE
    y = tl.permute(x, (0, 1))
#       ^ SHAPE
    y = tl.permute(x, (0, 1, 1))
#       ^ SHAPE
    y = tl.permute(x, (0, 1, 3))
#       ^ SHAPE
    y = tl.expand_dims(x, 4)
#       ^ SHAPE
    y = tl.max(x, axis=3, keep_dims=True)
#       ^ SHAPE
    y = tl.trans(tl.tensor(1.0))
#       ^ SHAPE
    tl.store(rows(out_ptr, B, R, 128), x)


@triton.jit
def memory(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, 64))
    tl.store(rows(out_ptr, B, R, 128), x)
#   ^ SHAPE
    tl.store(rows(out_ptr, B, R, 64), tl.reshape(x, (R, B, 64)))
    tl.store(rows(out_ptr, B, R, 64), tl.reshape(x, (B * R, 64)))
#   ^ SHAPE
    p = tl.make_block_ptr(x_ptr, (B, R, 64), (R * 64, 64, 1), (0, 0), (B, R, 64), (2, 1, 0))
#       ^ SHAPE
    p = tl.make_block_ptr(x_ptr, (B, R, 64), (R * 64, 64, 1), (0, 0, 0), (B, R, 64), (3, 2, 1))
#       ^ SHAPE
    p = tl.make_block_ptr(x_ptr, (B, R, 64), (R * 64, 64, 1), (0, 0, 0), (B, R, 0), (2, 1, 0))
#       ^ SHAPE
    p = tl.advance(rows(x_ptr, B, R, 64), (0, 64))
#       ^ SHAPE


@triton.jit
def special(x_ptr, y_ptr, table, out_ptr, N: tl.constexpr):
    x = tl.load(rows(x_ptr, 1, 32, 64))
    y = tl.load(rows(y_ptr, 1, 48, 64))
    i = count(table, 0, N)
    several = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, N), (N, 1), (0, 0), (1, 2), (1, 0)))
#             ^ SHAPE
    z = rblib.insert(x, y, 1, i)
#       ^ SHAPE
    z = rblib.insert(y, x, 2, i)
#       ^ SHAPE
    z = rblib.window_insert(x, y, 0, i)
#       ^ SHAPE
    z = rblib.window_slice(x, i, 1, 0)
#       ^ SHAPE
    z = rblib.nn_pad(x, 0.0, 1, (0, -1))
#       ^ SHAPE
    z = rblib.nn_pad(x, 0.0, 1, (1, 1, 1))
#       ^ SHAPE
    z = rblib.masked_softmax(x, y)
#       ^ SHAPE
    m, e, s = rblib.dynamic_flash_attn_tile(x, i, y)
#             ^ SHAPE
    top = tl.max(x, axis=2, keep_dims=True)
    s, z = rblib.flash_attn_recompute(top, top, x, top, x, x)
#          ^ SHAPE
    s, z = rblib.flash_attn_recompute(top, top, top, top, x, y)
#          ^ SHAPE
    tl.store(rows(out_ptr, 1, 32, 64), x)


@triton.jit
def fits(x_ptr, y_ptr, row_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.load(rows(y_ptr, B, N, C))  # N may be R
    row = tl.load(rows(row_ptr, 1, 1, C))
    x = x + row + 1.0
    x = x + y
    x = tl.reshape(x, (B, -1, R * C)) + 1.0
    x = tl.permute(tl.reshape(x, (B, C, R)), (0, -1, 1))
    x = tl.expand_dims(tl.expand_dims(x, -4), (0, 2))
    x = tl.reshape(x, B, R, C)
    wide, _ = tl.broadcast(row, x)
    m = tl.max(wide, -1, keep_dims=True)
    tl.store(rows(out_ptr, B, R, C), x - m)
    tl.store(rows(out_ptr, B, R, C), 0.0)
