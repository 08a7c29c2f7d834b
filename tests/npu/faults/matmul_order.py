from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def broadcast_first(q_ptr, k_ptr, out_ptr, H: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    q = tl.load(rows(q_ptr, H, L, 64))
    k = tl.broadcast_to(tl.load(rows(k_ptr, 1, P, 64)), (H, P, 64))
    k = tl.permute(k, (0, 2, 1))
#       ^ MATMUL_ORDER
    v = tl.trans(tl.reshape(tl.broadcast_to(tl.load(rows(k_ptr, 1, P, 64)), (H, P, 64)), (H, 64, P)))
#       ^ MATMUL_ORDER
    tl.store(rows(out_ptr, H, L, 64), tl.dot(tl.dot(q, k), v))


@triton.jit
def transposed_first(q_ptr, k_ptr, out_ptr, H: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    q = tl.load(rows(q_ptr, H, L, 64))
    k = tl.permute(tl.load(rows(k_ptr, 1, P, 64)), (0, 2, 1))
    k = tl.broadcast_to(k, (H, 64, P))
    v = tl.broadcast_to(tl.load(rows(k_ptr, 1, P, 64)), (H, P, 64))
    tl.store(rows(out_ptr, H, L, 64), tl.dot(tl.dot(q, k), v))


@triton.jit
def no_product(q_ptr, out_ptr, H: tl.constexpr, P: tl.constexpr):
    k = tl.broadcast_to(tl.load(rows(q_ptr, 1, P, 64)), (H, P, 64))
    tl.store(rows(out_ptr, H, 64, P), tl.permute(k, (0, 2, 1)))
