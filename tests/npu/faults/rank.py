from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def ranks(x_ptr, seven_ptr, table, out_ptr, N: tl.constexpr):
    flat = tl.make_block_ptr(x_ptr, (N * 64,), (1,), (0,), (64,), (0,))
#          ^ RANK
    x = tl.load(flat)
    y = tl.load(
        tl.make_block_ptr(
#       ^ RANK
            seven_ptr,
            (N, 1, 1, 1, 1, 1, 64),
            (64, 64, 64, 64, 64, 64, 1),
            (0, 0, 0, 0, 0, 0, 0),
            (N, 1, 1, 1, 1, 1, 64),
            (6, 5, 4, 3, 2, 1, 0),
        )
    )
    i = rblib.to_dynamic_index(tl.make_block_ptr(table, (1, 1, N), (N, N, 1), (0, 0, 0), (1, 1, 1), (2, 1, 0)))
#                              ^ RANK
    block = tl.make_block_ptr(out_ptr, (N, 64), (64, 1), (i, 0), (1, 64), (1, 0))
    tl.store(block, tl.reshape(x, (1, 64)))


@triton.jit
def allowed(x_ptr, six_ptr, list_table, table, out_ptr, N: tl.constexpr):
    i = rblib.to_dynamic_index(tl.make_block_ptr(list_table, (N,), (1,), (0,), (1,), (0,)))
    j = rblib.to_dynamic_index(tl.make_block_ptr(table, (N, N), (N, 1), (1, 0), (1, 1), (1, 0)))
    x = tl.load(tl.make_block_ptr(x_ptr, (N, 64), (64, 1), (i, 0), (1, 64), (1, 0)))
    six = tl.make_block_ptr(
        base=six_ptr,
        shape=(1, 1, 1, 1, N, 64),
        strides=(N * 64, N * 64, N * 64, N * 64, 64, 1),
        offsets=(0, 0, 0, 0, j, 0),
        block_shape=(1, 1, 1, 1, 1, 64),
        order=(5, 4, 3, 2, 1, 0),
    )
    y = tl.reshape(tl.load(six), (1, 64))
    tl.store(tl.make_block_ptr(out_ptr, (N, 64), (64, 1), (0, 0), (1, 64), (1, 0)), x + y)
