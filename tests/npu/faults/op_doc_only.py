from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def fail(x_ptr, y_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.load(rows(y_ptr, B, R, C))
    z = tl.exp2(x)
#       ^ OP_DOC_ONLY
    z = tl.exp2(x + y)
#       ^ OP_DOC_ONLY
    z = tl.erf(x)
#       ^ OP_DOC_ONLY
    z = tl.sigmoid(x)
#       ^ OP_DOC_ONLY
    z = tl.where(x > y, x, y)
#       ^ OP_DOC_ONLY
    z = tl.where(x > 0.0, x, 0.0)
#       ^ OP_DOC_ONLY
    m = tl.min(x, axis=2, keep_dims=True)
#       ^ OP_DOC_ONLY
    z = tl.zeros((B, R, C), dtype=tl.float32) + x
#       ^ OP_DOC_ONLY
    z = tl.maximum(x, tl.zeros((B, R, C), dtype=tl.float32))
#       ^ OP_DOC_ONLY
    tl.store(rows(out_ptr, B, R, C), x - m)


@triton.jit
def instead(x_ptr, y_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.load(rows(y_ptr, B, R, C))
    z = tl.exp(x * 0.6931471805599453)
    z = 1 / (1 + tl.exp(-x))
    z = tl.maximum(x, y)
    m = -tl.max(-x, axis=2, keep_dims=True)
    s = tl.zeros((B, R, C), dtype=tl.float32)
    for i in tl.static_range(4):
        if i == 0:
            s = x
        else:
            s = s + x
    tl.store(rows(out_ptr, B, R, C), s - m + z)
