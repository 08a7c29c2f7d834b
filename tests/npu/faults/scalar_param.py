from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def scalars(x_ptr, scale, shift, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = x + shift
#       ^ SCALAR_PARAM
    y = scale - x
#       ^ SCALAR_PARAM
    y = x / scale
#       ^ SCALAR_PARAM
    y = tl.maximum(x, shift)
#       ^ SCALAR_PARAM
    y = tl.exp(scale) * x
#       ^ SCALAR_PARAM
    y = x * (scale * 2.0)
#            ^ SCALAR_PARAM
    y = x * (scale * shift)
#            ^ SCALAR_PARAM
    y = x * scale.to(tl.float32)
#           ^ SCALAR_PARAM
    condition = x > shift
#               ^ SCALAR_PARAM
    tl.store(rows(out_ptr, B, R, C), y)


# args: f32[1,4,64] 0.5 f32[1,4,64] 1 4 64
@triton.jit
def number(x_ptr, scale, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
#                 ^ SCALAR_PARAM
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)) * scale)


# args: f32[1,4,64] f32[1] f32[1,4,64] 1 4 64
@triton.jit
def one_element(x_ptr, scale, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)) * scale)
#                                    ^ SCALAR_PARAM


# args: f32[1,4,64] f32[] f32[1,4,64] f32[] 1 4 64 0.5
@triton.jit
def multiplied(
    x_ptr, scale, out_ptr, unread, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr = 0.5
):
    x = tl.load(rows(x_ptr, B, R, C)) * scale
    x = scale * x + SHIFT
    x *= scale
    tl.store(rows(out_ptr, B, R, C), x)
