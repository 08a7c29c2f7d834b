"""The public functions of rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from tilewright.dispatch import Operation
from tilewright.dispatch.eager import record, unobserved
from tilewright.dispatch.selection import bound, override
from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.rope.call import Inputs, Options, argument, check_writable, describe, refuse_table_gradients
from tilewright.ops.rope.op import IMPLEMENTATIONS, described, rotate, run_registered, tail

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.dispatch import Described

_MAX_OFFSET = 2**31
_BY_ANGLES = "rope_from_angles"
_BOTH = "rope_qk"
Layout = Literal["bshd", "sbhd", "bhsd", "thd"]
Numerics = Literal["exact", "hf"]


class RotatedQK(NamedTuple):
    """The rotated ``q`` and ``k``."""

    q: torch.Tensor
    k: torch.Tensor


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: Layout = "bshd",
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
    offsets: int | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    context_parallel: tuple[int, int] | None = None,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    numerics: Numerics = "exact",
    impl: str | None = None,
) -> torch.Tensor:
    """Rotate pairs of features by an angle that grows with the token's position.

    For each pair ``(x1, x2)`` of a token at position ``p``, with ``c1, s1`` and ``c2, s2`` the table's entries of the
    pair's first and second member::

        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2

    A table of half width has one entry for both members. The products and the sum are computed in float32 (float64 for
    float64 input) and rounded once to the dtype of ``x``. Source: Su et al., "RoFormer: Enhanced Transformer with
    Rotary Position Embedding", arXiv:2104.09864.

    Args:
        x: ``[B, S, H, D]`` in the order that ``layout`` says, or ``[T, H, D]`` for packed tokens; bfloat16, float16,
            float32 or float64; any strides; D even, 2 to 512.
        cos: table of cosines, float32 or the dtype of ``x``: ``[P, rotary_dim / 2]``, or ``[P, rotary_dim]`` with an
            entry for each feature, whose halves may differ. See :func:`tilewright.rope_table`.
        sin: table of sines, like ``cos``.
        layout: ``"bshd"``, ``"sbhd"``, ``"bhsd"``, or ``"thd"`` for packed tokens.
        interleaved: a pair is features ``2i, 2i + 1`` (GPT-J) instead of ``i, i + rotary_dim / 2`` (NeoX, Llama).
        position_ids: the position of each token, int32 or int64: ``[S]``, or ``[B, S]`` in every layout with a batch;
            ``[3, ...]`` with ``mrope_section``. By default tokens are counted from 0 in each sequence.
        offsets: added to the counted positions: a number, or int32 or int64 ``[sequences]``; may be negative.
        cu_seqlens: for ``"thd"``: where each packed sequence starts, and the end of the last: int32 or int64
            ``[sequences + 1]``, ascending from 0. Without it all tokens are one sequence.
        context_parallel: ``(rank, size)``: ``x`` holds this rank's two chunks of each sequence, chunk ``rank`` and
            chunk ``2 * size - 1 - rank`` of ``2 * size``; ``cu_seqlens`` then counts the tokens of all ranks.
        rotary_dim: how many features are rotated. By default twice the table's width if D has so many, else its width.
        rotary_offset: the first rotated feature. The others are copied in the same launch.
        mrope_section: multimodal positions: how many pairs follow each of the three rows (time, height, width) of
            ``position_ids``, summing to ``rotary_dim / 2``.
        mrope_interleaved: the rows alternate from pair to pair (Qwen3-VL) instead of in blocks (Qwen2-VL).
        inverse: undo the rotation: multiply by the inverse of each pair's matrix, which for a table of plain cosines
            and sines is the rotation by the negative angle.
        inplace: write into ``x`` and return it.
        numerics: ``"exact"`` uses the table as it is; ``"hf"`` rounds it to the dtype of ``x`` first, as Hugging Face
            models do.
        impl: the implementation that must serve, such as ``"triton"``; by default the best one for the device.

    Returns:
        The rotated tensor: shape, dtype and strides of ``x`` (as ``torch.empty_like`` keeps them), or ``x`` itself.

        A token whose position lies outside the table, before 0 or past its end, is returned unrotated; so is a packed
        token past ``cu_seqlens[-1]``. With no tokens or no heads the result is empty.

        Differentiable in ``x``; the gradient has the strides of the result. The tables are constants.

    Raises:
        ArgumentError: a shape, layout, device or option that does not fit, a table too short for positions that are
            known without reading device memory, or ``cu_seqlens`` that do not ascend from 0 to at most T. Values of
            tensors in device memory are checked only with ``TILEWRIGHT_CHECK_DEVICE_VALUES=1``.
        DTypeError: a dtype that is not accepted.
        ImplementationError: ``impl`` cannot serve this call.

    Example:
        >>> import torch, tilewright
        >>> cos, sin = tilewright.rope_table(64, 128)
        >>> tilewright.rope(torch.randn(2, 128, 8, 64), cos, sin).shape
        torch.Size([2, 128, 8, 64])
    """
    offset, starts = (0, None) if offsets is None else split_offsets("rope", offsets)
    inputs = (x, None, cos, sin, position_ids, starts, cu_seqlens)
    options = (
        layout, interleaved, rotary_dim, rotary_offset,
        context_parallel if context_parallel is None else hashable(context_parallel),
        mrope_section if mrope_section is None else hashable(mrope_section),
        mrope_interleaved, inverse, False, numerics,
    )  # fmt: skip
    return _run("rope", inputs, offset, options, impl, inplace)[0]


def rope_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: Layout = "bshd",
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
    offsets: int | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    context_parallel: tuple[int, int] | None = None,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    numerics: Numerics = "exact",
    impl: str | None = None,
) -> RotatedQK:
    """Rotate ``q`` and ``k`` in one launch; each exactly as :func:`tilewright.rope` rotates it.

    Args:
        q: as ``x`` of :func:`tilewright.rope`.
        k: like ``q`` with any number of heads of its own (grouped-query and multi-query attention) and any strides.
        cos: as in :func:`tilewright.rope`.
        sin: as in :func:`tilewright.rope`.
        layout: of ``q`` and of ``k``, as in :func:`tilewright.rope`.
        interleaved: as in :func:`tilewright.rope`.
        position_ids: as in :func:`tilewright.rope`.
        offsets: as in :func:`tilewright.rope`.
        cu_seqlens: as in :func:`tilewright.rope`.
        context_parallel: as in :func:`tilewright.rope`.
        rotary_dim: as in :func:`tilewright.rope`.
        rotary_offset: as in :func:`tilewright.rope`.
        mrope_section: as in :func:`tilewright.rope`.
        mrope_interleaved: as in :func:`tilewright.rope`.
        inverse: as in :func:`tilewright.rope`.
        inplace: write into ``q`` and ``k`` and return them; where a gradient is recorded, in a launch each.
        numerics: as in :func:`tilewright.rope`.
        impl: as in :func:`tilewright.rope`.

    Returns:
        ``RotatedQK(q, k)``.

    Raises:
        ArgumentError: as :func:`tilewright.rope`, or ``k`` differs from ``q`` in more than its heads.
        DTypeError: as :func:`tilewright.rope`, or ``k`` has another dtype than ``q``.
        ImplementationError: as :func:`tilewright.rope`.

    Example:
        >>> import torch, tilewright
        >>> cos, sin = tilewright.rope_table(64, 128)
        >>> q, k = tilewright.rope_qk(torch.randn(2, 128, 8, 64), torch.randn(2, 128, 2, 64), cos, sin)
        >>> k.shape
        torch.Size([2, 128, 2, 64])
    """
    offset, starts = (0, None) if offsets is None else split_offsets("rope_qk", offsets)
    inputs = (q, k, cos, sin, position_ids, starts, cu_seqlens)
    options = (
        layout, interleaved, rotary_dim, rotary_offset,
        context_parallel if context_parallel is None else hashable(context_parallel),
        mrope_section if mrope_section is None else hashable(mrope_section),
        mrope_interleaved, inverse, False, numerics,
    )  # fmt: skip
    q_out, k_out = _run("rope_qk", inputs, offset, options, impl, inplace)
    assert k_out is not None
    return RotatedQK(q_out, k_out)


def rope_from_angles(
    x: torch.Tensor,
    angles: torch.Tensor,
    *,
    layout: Layout = "bshd",
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
    offsets: int | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    context_parallel: tuple[int, int] | None = None,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    numerics: Numerics = "exact",
    impl: str | None = None,
) -> torch.Tensor:
    """Rotate by given angles, whose cosines and sines are computed on the way, in float32 (float64 for float64 ``x``).

    This is what Transformer Engine, Megatron and apex pass around. Angles are in radians. A float32 angle is off by
    6e-2 at position one million, a 16-bit one far earlier: a table from :func:`tilewright.rope_table` is exact.

    Args:
        x: as in :func:`tilewright.rope`.
        angles: float32 or the dtype of ``x``: ``[P, rotary_dim / 2]``, or ``[P, rotary_dim]`` with an angle for each
            feature; dimensions of size 1 in between, as in ``[P, 1, 1, rotary_dim]``, are accepted.
        layout: as in :func:`tilewright.rope`.
        interleaved: as in :func:`tilewright.rope`.
        position_ids: as in :func:`tilewright.rope`.
        offsets: as in :func:`tilewright.rope`.
        cu_seqlens: as in :func:`tilewright.rope`.
        context_parallel: as in :func:`tilewright.rope`.
        rotary_dim: as in :func:`tilewright.rope`.
        rotary_offset: as in :func:`tilewright.rope`.
        mrope_section: as in :func:`tilewright.rope`.
        mrope_interleaved: as in :func:`tilewright.rope`.
        inverse: as in :func:`tilewright.rope`.
        inplace: as in :func:`tilewright.rope`.
        numerics: as in :func:`tilewright.rope`.
        impl: as in :func:`tilewright.rope`.

    Returns:
        As :func:`tilewright.rope`.

    Raises:
        ArgumentError: as :func:`tilewright.rope`.
        DTypeError: as :func:`tilewright.rope`.
        ImplementationError: as :func:`tilewright.rope`.

    Example:
        >>> import torch, tilewright
        >>> angles = torch.outer(torch.arange(128.0), 10000.0 ** -(torch.arange(32) / 32))
        >>> tilewright.rope_from_angles(torch.randn(2, 128, 8, 64), angles).shape
        torch.Size([2, 128, 8, 64])
    """
    offset, starts = (0, None) if offsets is None else split_offsets("rope_from_angles", offsets)
    inputs = (x, None, _flat(angles), None, position_ids, starts, cu_seqlens)
    options = (
        layout, interleaved, rotary_dim, rotary_offset,
        context_parallel if context_parallel is None else hashable(context_parallel),
        mrope_section if mrope_section is None else hashable(mrope_section),
        mrope_interleaved, inverse, False, numerics,
    )  # fmt: skip
    return _run("rope_from_angles", inputs, offset, options, impl, inplace)[0]


def _check_given(operation: str, inputs: tuple[Any, ...]) -> None:
    """Refuse what is no tensor, and None where the function needs one: within this family None means there is none."""
    needed = {"q", "cos", *({"k"} if operation == _BOTH else ()), *({"sin"} if operation != _BY_ANGLES else ())}
    for field, value in zip(Inputs._fields, inputs, strict=True):
        if (value is None and field in needed) or (value is not None and not isinstance(value, torch.Tensor)):
            raise DTypeError(
                operation, argument(field, inputs, operation), f"got {type(value).__name__}; expected a tensor"
            )


def hashable(option: Any) -> Any:
    """A list as a tuple; anything else is judged where options are."""
    return tuple(option) if isinstance(option, list) else option


def split_offsets(operation: str, offsets: int | torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """The number added to every position, and the tensor of one for each sequence."""
    if isinstance(offsets, torch.Tensor):
        return 0, offsets
    if isinstance(offsets, bool) or not isinstance(offsets, int | torch.SymInt):
        raise DTypeError(operation, "offsets", f"got {type(offsets).__name__}; expected an int or a tensor of them")
    if not -_MAX_OFFSET <= offsets < _MAX_OFFSET:
        raise ArgumentError(operation, "offsets", f"got {offsets}; expected a number of 32 bits")
    return offsets, None


def _flat(angles: torch.Tensor) -> torch.Tensor:
    """Transformer Engine's ``[P, 1, 1, rotary_dim]`` without the dimensions in between."""
    if isinstance(angles, torch.Tensor) and angles.dim() > 2 and angles.numel() == angles.shape[0] * angles.shape[-1]:
        return angles.reshape(angles.shape[0], angles.shape[-1])
    return angles


def _run(
    operation: str,
    inputs: tuple[Any, ...],
    offset: int,
    options: tuple[Any, ...],
    impl: str | None,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, cos, sin, *_ = inputs
    if q is None or cos is None or (sin is None and operation != _BY_ANGLES) or (k is None and operation == _BOTH):
        _check_given(operation, inputs)
    if impl is None:
        impl = override()  # asked here and nowhere later: a backward runs when and where it will
    if not unobserved(inputs):
        return _run_watched(operation, inputs, offset, options, impl, inplace)
    needs_grad = False
    if torch.is_grad_enabled():
        needs_grad = q.requires_grad or (k is not None and k.requires_grad)
        if cos.requires_grad or (sin is not None and sin.requires_grad):
            refuse_table_gradients(inputs, operation)
    if not needs_grad:
        return rotate(inputs, offset, options, impl, inplace=inplace, operation=operation)
    rest = (inputs, offset, options, impl, operation)
    if not inplace:
        if k is None:
            return _rotation(q, rest), None
        result: tuple[torch.Tensor, torch.Tensor] = _rotation_qk(q, k, rest)
        return result
    for name, x in (("x" if k is None else "q", q), ("k", k)):
        if x is not None and x.is_leaf and x.requires_grad:
            raise ArgumentError(operation, name, "is a leaf that requires a gradient; it cannot be written in place")
    if k is not None:  # autograd lets one function write into one view only: a launch each, so both are judged first
        described(Inputs(*inputs), offset, Options(*options), impl, operation, inplace=True)
        check_writable(inputs, options[0], operation)
    return tuple(None if x is None else _write(x, rest) for x in (q, k))  # type: ignore[return-value]


def _write(x: torch.Tensor, rest: tuple[Any, ...]) -> torch.Tensor:
    """Rotate into ``x``, recording it.

    Autograd judges some views only after the fact; those are written by ``copy_``, which it knows how to refuse before
    anything is lost.
    """
    if not x._is_view():
        return _rotation_inplace(x, rest)  # type: ignore[no-any-return]
    inputs, *others = rest
    return x.copy_(_rotation(x, ((x, None, *inputs[2:]), *others)))


def _run_watched(
    operation: str, inputs: tuple[Any, ...], offset: int, options: tuple[Any, ...], impl: str | None, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Through the registered operators: under torch.compile and wherever somebody watches the dispatcher."""
    q, k = inputs[:2]
    _check_given(operation, inputs)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad))
    if torch.is_grad_enabled():
        refuse_table_gradients(inputs, operation)
    if not torch.compiler.is_compiling() or (inplace and needs_grad):
        # The operator would judge the same, but by its own name, and q and k one after the other.
        describe(Inputs(*inputs), offset, Options(*options), operation)
    if not inplace:
        return run_registered(inputs, offset, options, impl)
    rest = tail(inputs, offset, options, impl)
    if needs_grad:  # written back so that autograd sees an in-place operation it knows
        q = q.copy_(torch.ops.tilewright.rope(q, *rest))
        if k is not None:
            k = k.copy_(torch.ops.tilewright.rope(k, *rest))
    elif k is None:
        torch.ops.tilewright.rope_(q, *rest)
    else:
        torch.ops.tilewright.rope_qk_(q, k, *rest)
    return q, k


class _Rotation(torch.autograd.Function):
    """One rotated tensor, for plain tensors in eager mode. The registered operator has the same backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rest: tuple[Any, ...]) -> torch.Tensor:
        inputs, offset, options, impl, operation = rest
        y, _ = rotate(inputs, offset, options, impl, operation=operation)
        ctx.save_for_backward(*inputs[2:])
        ctx.rest = (offset, options, impl, operation, y.stride(), None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _transposed(ctx, grad, None)[0], None


class _RotationQK(torch.autograd.Function):
    """Both tensors in one launch."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, rest: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        inputs, offset, options, impl, operation = rest
        q_out, k_out = rotate(inputs, offset, options, impl, operation=operation)
        assert k_out is not None
        ctx.save_for_backward(*inputs[2:])
        ctx.rest = (offset, options, impl, operation, q_out.stride(), k_out.stride())
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*_transposed(ctx, *grads), None)


class _RotationInplace(torch.autograd.Function):
    """One tensor, written into itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rest: tuple[Any, ...]) -> torch.Tensor:
        inputs, offset, options, impl, operation = rest
        rotate((x, None, *inputs[2:]), offset, options, impl, inplace=True, operation=operation)
        ctx.mark_dirty(x)
        ctx.save_for_backward(*inputs[2:])
        ctx.rest = (offset, options, impl, operation, torch.empty_like(x, device="meta").stride(), None)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _transposed(ctx, grad, None)[0], None


_rotation, _rotation_qk, _rotation_inplace = map(record, (_Rotation, _RotationQK, _RotationInplace))


def _transposed(
    ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate gradients by the transposed matrices, into the strides of the forward's results."""
    offset, options, impl, operation, *strides = ctx.rest
    options = Options._make(options).transposed()
    inputs = (grad_q, grad_k, *ctx.saved_tensors)
    if torch.is_grad_enabled() or not unobserved(inputs):  # also for gradients of gradients
        return run_registered(inputs, offset, options, impl, tuple(strides))
    return rotate(inputs, offset, options, impl, strides=tuple(strides), operation=operation)


def _describe(function: Callable[..., Any]) -> Callable[..., Described]:
    """How an explanation reads the arguments of a public function."""
    name = function.__name__

    def describe(*args: Any, **kwargs: Any) -> Described:
        given = bound(function, args, kwargs)
        offset, starts = (0, None) if given["offsets"] is None else split_offsets(name, given["offsets"])
        cos, sin = (_flat(given["angles"]), None) if "angles" in given else (given["cos"], given["sin"])
        q, k = (given["x"], None) if "x" in given else (given["q"], given["k"])
        inputs = Inputs(q, k, cos, sin, given["position_ids"], starts, given["cu_seqlens"])
        _check_given(name, inputs)
        options = Options(**{field: hashable(given[field]) for field in Options._fields if field in given})
        return described(inputs, offset, options, given["impl"], name, inplace=given["inplace"])

    return describe


OPERATIONS = {
    function.__name__: Operation(function.__name__, _describe(function), IMPLEMENTATIONS)
    for function in (rope, rope_qk, rope_from_angles)
}
