from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib


@triton.jit
def rows(base, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.make_block_ptr(base, (B, R, C), (R * C, C, 1), (0, 0, 0), (B, R, C), (2, 1, 0))


@triton.jit
def functions(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.arange(0, C)
#       ^ UNSUPPORTED_OP
    y = tl.full((B, R, C), 1.0, tl.float32)
#       ^ UNSUPPORTED_OP
    y = tl.clamp(x, 0.0, 1.0)
#       ^ UNSUPPORTED_OP
    y = tl.cat(x, x)
#       ^ UNSUPPORTED_OP
    y = tl.zeros_like(x)
#       ^ UNSUPPORTED_OP
    y = tl.math.tanh(x)
#       ^ UNSUPPORTED_OP
    y = tl.PropagateNan
#       ^ UNSUPPORTED_OP
    y = rblib.gelu(x)
#       ^ UNSUPPORTED_OP
    n = tl.cdiv(C, 64)
#       ^ UNSUPPORTED_OP
    y, at = tl.max(x, axis=2, return_indices=True, keep_dims=True)
#           ^ UNSUPPORTED_OP
    y = tl.maximum(x, 0.0, propagate_nan=True)
#       ^ UNSUPPORTED_OP
    y = tl.load(rows(x_ptr, B, R, C), cache_modifier=".cg")
#       ^ UNSUPPORTED_OP
    y = rblib.nn_pad(x, 0.0, 1, (0, 1), "reflect")
#       ^ UNSUPPORTED_OP
    tl.store(rows(out_ptr, B, R, C), x)


@triton.jit
def operators(x_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = x % 2.0
#       ^ UNSUPPORTED_OP
    y = x // 2.0
#       ^ UNSUPPORTED_OP
    y = x**2
#       ^ UNSUPPORTED_OP
    y = x @ x
#       ^ UNSUPPORTED_OP
    y = (x > 0.0) & (x < 1.0)
#       ^ UNSUPPORTED_OP
    y = ~(x > 0.0)
#       ^ UNSUPPORTED_OP
    y = (x > 0.0) * 1.0
#       ^ UNSUPPORTED_OP
    y = tl.exp(x > 0.0)
#       ^ UNSUPPORTED_OP
    y = x[0]
#       ^ UNSUPPORTED_OP
    y = x[:, 0, None]
#       ^ UNSUPPORTED_OP
    y = x.to(tl.float16)
#       ^ UNSUPPORTED_OP
    y = (x > 0.0).to(tl.float32)
#       ^ UNSUPPORTED_OP
    y = x.gather(0)
#       ^ UNSUPPORTED_OP
    tl.store(rows(out_ptr, B, R, C), x > 0.0)
#   ^ UNSUPPORTED_OP


@triton.jit
def supported(x_ptr, y_ptr, out_ptr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    x = tl.load(rows(x_ptr, B, R, C))
    y = tl.load(rows(y_ptr, B, R, C))
    x = tl.abs(x) + tl.ceil(x) + tl.cos(x) + tl.exp(x) + tl.floor(x) + tl.log(x) + tl.log2(x) + tl.rsqrt(x) + tl.sin(x)
    x = tl.fdiv(x, y) - tl.maximum(x, y) * tl.minimum(x, y) / tl.sqrt(x)
    x = -x + x.sum(axis=2, keep_dims=True) + tl.math.exp(x) + tl.tensor(2.0)
    x = tl.trans(tl.trans(x)) + x.T.T + tl.reshape(x[None], (B, R, C)) + x[:, :]
    tl.store(rows(out_ptr, B, R, C), x.to(tl.float32))
