"""The kernel language, as ``triton.language`` has it: ``from tilewright.npu import language as tl``.

Tiles have up to six dimensions of any size, :func:`dot` multiplies matrices in the last two dimensions of tensors of
any equal rank, and the offsets of a block pointer may be read from memory. What stands here are signatures: a kernel's
source is read, never run. Which of the functions a target takes is its profile's affair
(:mod:`tilewright.npu.profiles`); the special operations of RBLN are in :mod:`tilewright.npu.language.rblib`.
"""

from __future__ import annotations

import sys
from typing import Any

from tilewright.npu.language.core import Builtin, builtin
from tilewright.npu.language.core import block_type as block_type
from tilewright.npu.language.core import constexpr as constexpr
from tilewright.npu.language.core import dtype as dtype
from tilewright.npu.language.core import pointer_type as pointer_type

float64 = dtype("fp64", 64)
float32 = dtype("fp32", 32)
float16 = dtype("fp16", 16)
bfloat16 = dtype("bf16", 16)
int64 = dtype("int64", 64)
int32 = dtype("int32", 32)
int16 = dtype("int16", 16)
int8 = dtype("int8", 8)
int1 = dtype("int1", 1)
uint8 = dtype("uint8", 8)

DTYPES = {each.name: each for each in (float64, float32, float16, bfloat16, int64, int32, int16, int8, int1, uint8)}

_tl = builtin("tl")

# Memory


@_tl
def make_block_ptr(base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any, order: Any) -> Any:
    """A pointer to a block of a tensor.

    Args:
        base: a parameter of the kernel.
        shape: the tensor's shape.
        strides: its strides in elements; those of a contiguous tensor.
        offsets: where the block begins; each is static, or an index that was read from memory.
        block_shape: the block's sizes.
        order: any permutation of the dimensions; it has no effect.
    """


@_tl
def advance(base: Any, offsets: Any) -> Any:
    """The block pointer moved by ``offsets``, one for each dimension."""


@_tl
def load(
    pointer: Any,
    mask: Any = None,
    other: Any = None,
    boundary_check: Any = (),
    padding_option: Any = "",
    cache_modifier: Any = "",
    eviction_policy: Any = "",
    volatile: Any = False,
) -> Any:
    """The block that a block pointer points to. Nothing but ``pointer`` may be given."""


@_tl
def store(
    pointer: Any,
    value: Any,
    mask: Any = None,
    boundary_check: Any = (),
    cache_modifier: Any = "",
    eviction_policy: Any = "",
) -> Any:
    """Write a tensor to the block that a block pointer points to. Only ``pointer`` and ``value`` may be given."""


# Creation and shape


@_tl
def zeros(shape: Any, dtype: Any) -> Any:
    """A tensor of zeros."""


@_tl
def tensor(value: Any, dtype: Any = None) -> Any:
    """A value as a tensor."""


@_tl
def broadcast(input: Any, other: Any) -> Any:
    """``input`` and ``other``, both with the shape that they have together."""


@_tl
def broadcast_to(input: Any, *shape: Any) -> Any:
    """``input`` repeated along its dimensions of size 1 up to ``shape``."""


@_tl
def expand_dims(input: Any, axis: Any) -> Any:
    """``input`` with a dimension of size 1 more at ``axis``, or at each of several."""


@_tl
def permute(input: Any, *dims: Any) -> Any:
    """``input`` with its dimensions in the order ``dims``."""


@_tl
def trans(input: Any, *dims: Any) -> Any:
    """As :func:`permute`; without ``dims`` the last two dimensions change places."""


@_tl
def reshape(input: Any, *shape: Any, can_reorder: Any = False) -> Any:
    """``input`` with another shape of as many elements, in row-major order."""


# Products


@_tl
def dot(
    input: Any,
    other: Any,
    acc: Any = None,
    input_precision: Any = None,
    allow_tf32: Any = None,
    max_num_imprecise_acc: Any = None,
    out_dtype: Any = float32,
) -> Any:
    """The product of the matrices in the last two dimensions, float32. The dimensions before them are equal.

    Only ``input`` and ``other`` may be given.
    """


# Elementwise, between tensors of shapes that broadcast, and numbers


@_tl
def abs(x: Any) -> Any:
    """The absolute value."""


@_tl
def ceil(x: Any) -> Any:
    """The least integer that is not less."""


@_tl
def cos(x: Any) -> Any:
    """The cosine."""


@_tl
def erf(x: Any) -> Any:
    """The error function."""


@_tl
def exp(x: Any) -> Any:
    """E to the power of ``x``."""


@_tl
def exp2(x: Any) -> Any:
    """2 to the power of ``x``."""


@_tl
def floor(x: Any) -> Any:
    """The greatest integer that is not greater."""


@_tl
def log(x: Any) -> Any:
    """The natural logarithm."""


@_tl
def log2(x: Any) -> Any:
    """The logarithm to base 2."""


@_tl
def rsqrt(x: Any) -> Any:
    """One over the square root."""


@_tl
def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""


@_tl
def sin(x: Any) -> Any:
    """The sine."""


@_tl
def sqrt(x: Any) -> Any:
    """The square root."""


@_tl
def fdiv(x: Any, y: Any, ieee_rounding: Any = False) -> Any:
    """``x / y``."""


@_tl
def maximum(x: Any, y: Any, propagate_nan: Any = None) -> Any:
    """The greater of two; NaN where either is."""


@_tl
def minimum(x: Any, y: Any, propagate_nan: Any = None) -> Any:
    """The lesser of two; NaN where either is."""


@_tl
def where(condition: Any, x: Any, y: Any) -> Any:
    """``x`` where the condition holds, else ``y``."""


# Reductions


@_tl
def max(
    input: Any,
    axis: Any = None,
    return_indices: Any = False,
    return_indices_tie_break_left: Any = True,
    keep_dims: Any = False,
) -> Any:
    """The greatest along ``axis``; NaN where one is."""


@_tl
def min(
    input: Any,
    axis: Any = None,
    return_indices: Any = False,
    return_indices_tie_break_left: Any = True,
    keep_dims: Any = False,
) -> Any:
    """The least along ``axis``; NaN where one is."""


@_tl
def sum(input: Any, axis: Any = None, keep_dims: Any = False, dtype: Any = None) -> Any:
    """The sum along ``axis``."""


# Compile time


@_tl
def static_range(arg1: Any, arg2: Any = None, step: Any = None) -> Any:
    """As Python's ``range`` over constexprs, unrolled."""


@_tl
def range_(
    arg1: Any,
    arg2: Any = None,
    step: Any = None,
    num_stages: Any = None,
    loop_unroll_factor: Any = None,
    disallow_acc_multi_buffer: Any = False,
    flatten: Any = False,
    warp_specialize: Any = False,
) -> Any:
    """Triton's run-time loop, which no profile takes."""


@_tl
def static_assert(cond: Any, msg: Any = "") -> Any:
    """Stop the compilation unless ``cond``, a constexpr, holds."""


@_tl
def static_print(*values: Any, sep: Any = " ", end: Any = "\n", file: Any = None, flush: Any = False) -> Any:
    """Print constexprs while compiling."""


UNSUPPORTED_NAMES = frozenset(
    [
        "arange",
        "argmax",
        "argmin",
        "associative_scan",
        "assume",
        "atomic_add",
        "atomic_and",
        "atomic_cas",
        "atomic_max",
        "atomic_min",
        "atomic_or",
        "atomic_xchg",
        "atomic_xor",
        "cast",
        "cat",
        "cdiv",
        "clamp",
        "cumprod",
        "cumsum",
        "debug_barrier",
        "device_assert",
        "device_print",
        "div_rn",
        "dot_scaled",
        "flip",
        "float8e4b15",
        "float8e4b8",
        "float8e4nv",
        "float8e5",
        "float8e5b16",
        "fma",
        "full",
        "gather",
        "histogram",
        "inline_asm_elementwise",
        "interleave",
        "join",
        "load_tensor_descriptor",
        "make_tensor_descriptor",
        "max_constancy",
        "max_contiguous",
        "multiple_of",
        "num_programs",
        "pi32_t",
        "philox",
        "program_id",
        "rand",
        "rand4x",
        "randint",
        "randint4x",
        "randn",
        "ravel",
        "reduce",
        "softmax",
        "sort",
        "split",
        "sqrt_rn",
        "store_tensor_descriptor",
        "swizzle2d",
        "topk",
        "umulhi",
        "view",
        "xor_sum",
        "zeros_like",
    ]
)
"""Names of Triton's language that no profile supports: a kernel may import them, and is told so where it calls one."""

FUNCTIONS: dict[str, Builtin] = {
    value.name: value for value in list(globals().values()) if isinstance(value, Builtin) and value.namespace == "tl"
}
_SELF = sys.modules[__name__]
math = _SELF  # Triton has the elementwise functions in a module of their own as well


def __getattr__(name: str) -> Any:
    if name == "range":
        return FUNCTIONS["range"]
    if name in UNSUPPORTED_NAMES:
        return Builtin(name, "tl", None, "Of Triton's language; no profile supports it.")
    raise AttributeError(f"the kernel language has no '{name}'")
