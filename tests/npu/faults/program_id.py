from rebel import triton
from rebel.triton import language as tl


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def programs(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    pid = tl.program_id(0)
#         ^ PROGRAM_ID
    count = tl.num_programs(axis=0)
#           ^ PROGRAM_ID
    p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (pid, 0, 0), (1, R, C), (2, 1, 0))
    for i in tl.static_range(tl.program_id(1), B):
#                            ^ PROGRAM_ID
        pass
    tl.store(rows(out_ptr, B, R, C), tl.load(rows(x_ptr, B, R, C)))


@triton.jit
def loop(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    for program_id in tl.static_range(B):
        p = tl.make_block_ptr(x_ptr, (B, R, C), (R * C, C, 1), (program_id, 0, 0), (1, R, C), (2, 1, 0))
        q = tl.make_block_ptr(out_ptr, (B, R, C), (R * C, C, 1), (program_id, 0, 0), (1, R, C), (2, 1, 0))
        tl.store(q, tl.load(p))
