from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def products(x_ptr, y_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr):
    x = tl.load(rows(x_ptr, 1, 32, 64))
    y = tl.load(rows(y_ptr, 1, 128, 64))
    z = tl.dot(x, y)
#       ^ DOT_SHAPE
    z = tl.dot(x, tl.reshape(tl.permute(y, (0, 2, 1)), (64, 128)))
#       ^ DOT_SHAPE
    z = tl.dot(x, tl.reshape(y, (2, 64, 64)))
#       ^ DOT_SHAPE
    z = tl.dot(x, 2.0)
#       ^ DOT_SHAPE
    acc = tl.zeros((1, 32, 128), dtype=tl.float32)
    z = tl.dot(x, tl.permute(y, (0, 2, 1)), acc)
#       ^ DOT_SHAPE
    z = tl.dot(x, tl.permute(y, (0, 2, 1)), input_precision="tf32")
#       ^ DOT_SHAPE
    z = tl.dot(x, tl.permute(y, (0, 2, 1)), out_dtype=tl.float16)
#       ^ DOT_SHAPE
    tl.store(rows(out_ptr, 1, 32, 64), x)


@triton.jit
def fits(x_ptr, y_ptr, out_ptr, H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    q = tl.reshape(tl.load(rows(x_ptr, H * G, L, 64)), (1, H, G, L, 64))
    k = tl.permute(tl.reshape(tl.load(rows(y_ptr, H, P, 64)), (1, H, 1, P, 64)), (0, 1, 2, 4, 3))
    s = tl.dot(q, tl.broadcast_to(k, (1, H, G, 64, P)), out_dtype=tl.float32)
    s = tl.reshape(s, (H * G, L, P))
    two = tl.dot(tl.reshape(q, (H * G * L, 64)), tl.zeros((64, 64), dtype=tl.float32))
    tl.store(rows(out_ptr, H * G, L, P), s)
