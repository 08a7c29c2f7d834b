import math

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
def no_such_statements(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    with tl.scope("load"):
#   ^ SYNTAX
        x = x + 1.0
    try:
#   ^ SYNTAX
        x = x + 1.0
    except ValueError:
        pass
    for i in tl.static_range(4):
        if i == 2:
            break
#           ^ SYNTAX
        x = x + 1.0

    def double(y):
#   ^ SYNTAX
        return y + y

    x.name = "x"
#   ^ SYNTAX
    tl.store(rows(out_ptr, B, R, C), x)


@triton.jit
def no_such_expressions(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    several = [x + i for i in tl.static_range(4)]
#             ^ SYNTAX
    twice = lambda y: y + y
#           ^ SYNTAX
    table = {"x": x}
#           ^ SYNTAX
    if (y := x + 1.0) is None:
#       ^ SYNTAX
        pass
    tl.store(rows(out_ptr, B, R, C), x)


@triton.jit
def calls(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    print(x)
#   ^ SYNTAX
    root = math.sqrt(64.0)
#          ^ SYNTAX
    y = tl.exp(x, 1.0)
#       ^ SYNTAX
    options = (True,)
    y = tl.sum(x, axis=2, **options)
#                           ^ SYNTAX
    y = tl.sum(x, *2)
#                 ^ SYNTAX
    y = max(x, 0.0)
#       ^ SYNTAX
    y = rows(x_ptr, B, R)
#       ^ SYNTAX
    y = rows(x_ptr, B, R, C, base=x_ptr)
#       ^ SYNTAX
    tl.store(rows(out_ptr, B, R, C), x)


@triton.jit
def values(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    first, second = x.shape
#   ^ SYNTAX
    third = x.shape[3]
#           ^ SYNTAX
    fourth = (1, 2)["a"]
#            ^ SYNTAX
    fifth = 1 / 0
#           ^ SYNTAX
    between = tl.where(0.0 < x < 1.0, x, 0.0)  # npu: ignore[OP_DOC_ONLY]
#                      ^ SYNTAX
    sixth = x.shape.size
#           ^ SYNTAX
    seventh = (*x.shape, 1)
#              ^ SYNTAX
    first, second = x
#   ^ SYNTAX
    tl.store(rows(out_ptr, B, R, C), x)


@triton.jit
def end_inside(x_ptr, table, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    if rblib.partition_skip(count(table, 0, N)) == False:
        tl.store(rows(out_ptr, B, R, C), x)
        return
#       ^ SYNTAX


@triton.jit
def forever(x):
    return forever(x) + forever(x)
#          ^ SYNTAX
#                       ^ SYNTAX


@triton.jit
def calls_forever(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    tl.store(rows(out_ptr, B, R, C), forever(tl.load(rows(x_ptr, B, R, C))))


@triton.jit
def allowed(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ORDER: tl.constexpr = (2, 1, 0)):
    """A docstring."""
    assert B > 0, "an assertion"
    pass
    b, r, c = B, R, C
    (b, r), c = (b, r), c
    HALF: tl.constexpr = C // 2 if C > 64 else C
    b *= 1
    tl.static_print(f"{HALF} of {C}", b, sep=", ")
    order = ORDER if len(ORDER) == 3 else (0, 1, 2)
    x = tl.load(tl.make_block_ptr(x_ptr, (b, r, c), (r * c, c, 1), (0, 0, 0), (b, r, c), order))
    shape = (b, r, c)[0:3]
    x = x + max(1, 2) * min(3.0, 4.0) + abs(-1) + float(2) + int(2.5)
    tl.store(rows(out_ptr, B, R, C), x)
    return
