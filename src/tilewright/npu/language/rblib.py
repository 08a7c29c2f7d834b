"""The special operations of RBLN, under the names of ``rebel.triton.language.extra.rbln.libdevice``.

What each computes is written as mathematics in its docstring; an index is what :func:`to_dynamic_index` gives, or such
an index plus a constexpr. The functions at the end run on the host, in the wrapper of an operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilewright.npu.language.core import builtin

if TYPE_CHECKING:
    import torch

_rblib = builtin("rblib")

LAST_DIM_MULTIPLE = 64

# Indices


@_rblib
def to_dynamic_index(pointer: Any, max: Any = -1) -> Any:
    """The integer that a block pointer to one element of an int32 table points to.

    Args:
        pointer: the block pointer; its block has one element.
        max: the largest value that it can have, as a hint; -1 if it is not known.
    """


@_rblib
def partition_skip(index: Any) -> Any:
    """Whether the partition that ``index`` counts the rows of lies behind the one that is being written.

    ``index`` is element ``[b, p]`` of a table ``c`` of how many rows each partition of ``P`` rows has:
    ``p > 0 and c[b, p] == 0 and c[b, p - 1] < P``.
    """


# Memory


@_rblib
def dynamic_load(pointer: Any, axis: Any = -1, index: Any = None) -> Any:
    """The block of a block pointer. With ``index`` only ``[0, index)`` of ``axis`` is sure to be what is in memory."""


@_rblib
def dynamic_store(pointer: Any, value: Any, axis: Any = -1, index: Any = None) -> Any:
    """Write a tensor to a block; with ``index`` only its first ``index`` entries along ``axis``."""


# Rows


@_rblib
def insert(data: Any, updates: Any, axis: Any, index: Any) -> Any:
    """``data`` with ``updates`` in the place of ``[index, index + len(updates))`` of ``axis``."""


@_rblib
def window_insert(base: Any, state: Any, axis: Any, start: Any) -> Any:
    """``concat(base[:start], state)`` along ``axis``, and zeros behind up to ``len(base) + len(state)``."""


@_rblib
def window_slice(x: Any, end: Any, axis: Any, size: Any) -> Any:
    """``x[max(0, end - size) : end]`` along ``axis``, and zeros behind up to ``size``."""


@_rblib
def nn_pad(x: Any, value: Any, axis: Any, pad: Any, mode: Any = "constant") -> Any:
    """``x`` with ``pad[0]`` entries of ``value`` before and ``pad[1]`` behind along ``axis``."""


# Softmax, along the last axis


@_rblib
def softmax(x: Any, axis: Any = -1) -> Any:
    """``exp(x - max(x)) / sum(exp(x - max(x)))``."""


@_rblib
def masked_softmax(x: Any, mask: Any) -> Any:
    """:func:`softmax` of ``where(mask > 0, x, -inf)``."""


@_rblib
def dynamic_masked_softmax(x: Any, index: Any) -> Any:
    """:func:`masked_softmax` where row ``i`` sees the columns ``j <= index + i``."""


@_rblib
def window_softmax(x: Any, start: Any, window_size: Any) -> Any:
    """:func:`masked_softmax` where row ``i`` sees the columns ``start + i - window_size < j <= start + i``."""


# Flash attention


@_rblib
def flash_attn_tile(qk: Any, mask: Any, row_max_prev: Any = None) -> Any:
    """One partition of a softmax: ``(m, e, s)``.

    With ``x = where(mask > 0, qk, -inf)``: ``m`` the row's maximum, and that of ``row_max_prev``;
    ``e = exp(x - m)``; ``s`` the row's sum of ``e``. ``m`` and ``s`` have a last dimension of size 1.
    """


@_rblib
def dynamic_flash_attn_tile(qk: Any, index: Any, row_max_prev: Any = None) -> Any:
    """:func:`flash_attn_tile` where row ``i`` sees the columns ``j <= index + i``."""


@_rblib
def causal_flash_attn_tile(qk: Any, index: Any, row_max_prev: Any = None) -> Any:
    """The older name of :func:`dynamic_flash_attn_tile`."""


@_rblib
def flash_attn_recompute(
    row_max_prev: Any, row_max: Any, row_sum_prev: Any, row_sum: Any, out_prev: Any, out: Any
) -> Any:
    """Partitions put together: with ``a = exp(row_max_prev - row_max)``,
    ``(a * row_sum_prev + row_sum, a * out_prev + out)``.
    """


# On the host


def align_tensor_last_dim_to_64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with zeros behind its last dimension up to a multiple of 64; itself where that is one already."""
    from torch.nn.functional import pad

    missing = -tensor.shape[-1] % LAST_DIM_MULTIPLE
    return pad(tensor, (0, missing)) if missing else tensor


def write_rtosa(kernel: Any, args: Any) -> None:
    """On the device's host this writes the input of the vendor's compiler. Here the program is at hand already."""


def warmup(kernel: Any, conf: dict[str, Any], *args: Any) -> Any:
    """The form of a kernel's ``warmup`` that takes ``vector_inputs``, ``host_layout`` and ``indices`` as a dict."""
    layout = ":".join(str(each) for each in conf.get("host_layout", ()))
    compiled = kernel.warmup(*args, grid=(1,), host_layout=layout or None)
    write_rtosa(compiled, args)
    return compiled


def collect_triton_op_files() -> list[str]:
    """The vendor's way to find modules that have to be compiled again; there are none here."""
    return []


def attach_triton_op_files_to_loaded_modules(package: str) -> None:
    """The vendor's way to mark modules that have to be compiled again; nothing is to be done here."""
