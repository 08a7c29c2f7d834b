from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def checked(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C), boundary_check=(0, 1))
#       ^ BOUNDARY_CHECK
    y = tl.load(rows(x_ptr, B, R, C), padding_option="zero")
#       ^ BOUNDARY_CHECK
    tl.store(rows(out_ptr, B, R, C), x + y, boundary_check=(2,))
#   ^ BOUNDARY_CHECK


@triton.jit
def unchecked(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C), boundary_check=())
    y = tl.load(rows(x_ptr, B, R, C), padding_option="")
    tl.store(rows(out_ptr, B, R, C), x + y, None, ())
