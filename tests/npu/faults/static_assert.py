from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def broken(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, 128))
    tl.static_assert(x.shape[2] == 64)
#   ^ STATIC_ASSERT
    tl.static_assert(len(x.shape) == 4, "four dimensions are wanted")
#   ^ STATIC_ASSERT
    assert x.shape[2] % 3 == 0
#   ^ STATIC_ASSERT
    tl.static_assert(x > 0.0)
#   ^ STATIC_ASSERT
    tl.static_assert(x.shape == (B, R, 64))
#   ^ STATIC_ASSERT
    tl.store(rows(out_ptr, B, R, 128), x)


# args: f32[1,4,64] f32[1,4,64] 1 4 64
@triton.jit
def told(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    tl.static_assert(C % 128 == 0, "C is to be a multiple of 128")
#   ^ STATIC_ASSERT
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)))


# args: f32[1,4,64] f32[1,4,64] 1 4 64 0
# args: f32[1,4,64] f32[1,4,64] 1 4 64 1
@triton.jit
def holds(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr):
    tl.static_assert(C % 64 == 0)
    tl.static_assert(B == 1 and R > 1)
    x = tl.load(rows(x_ptr, B, R, C))
    tl.static_assert(x.shape == (B, R, C))
    tl.static_assert(x.dtype == tl.float32)
    if MODE == 0:
        x = tl.exp(x)
    elif MODE == 1:
        x = tl.abs(x)
    else:
        tl.static_assert(False, "there is no such mode")
    tl.store(rows(out_ptr, B, R, C), x)
