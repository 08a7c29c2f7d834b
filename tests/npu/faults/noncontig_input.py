from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


# args: f32[1,64,128].T f32[1,128,64] 1 128 64
@triton.jit
def transposed(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
#              ^ NONCONTIG_INPUT
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)))


# args: f32[1,128,64] f32[1,64,128].T 1 128 64
@triton.jit
def output(
    x_ptr,
    out_ptr,
#   ^ NONCONTIG_INPUT
    B: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)))


# args: f32[1,128,64] f32[1,128,64] 1 128 64
@triton.jit
def contiguous(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)))
