"""What a call of rotary embedding is: its tensors, its options, and the validated description of both.

``describe`` is the one place where arguments are judged. The registered operators, their fakes, the public functions
and ``explain`` all come through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from tilewright import settings
from tilewright.errors import ArgumentError, DTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Outputs = tuple[torch.Tensor, torch.Tensor | None]
    Runner = Callable[["tuple[torch.Tensor | None, ...]", int], None]  # (*Inputs, *Outputs), offset
    Planner = Callable[["RopeCall", "Inputs", Outputs], Runner]

MAX_HEAD_DIM = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
NUMERICS = ("exact", "hf")
_FLAGS = frozenset({"interleaved", "mrope_interleaved", "inverse", "transpose"})
_TEXTS = frozenset({"layout", "numerics"})


class Axes(NamedTuple):
    """Which dimension of a tensor is which; ``batch`` is None for packed tokens."""

    batch: int | None
    token: int
    head: int


LAYOUTS = {
    "bshd": Axes(0, 1, 2),
    "sbhd": Axes(1, 0, 2),
    "bhsd": Axes(0, 2, 1),
    "thd": Axes(None, 0, 1),
}


class Inputs(NamedTuple):
    """The tensors of a call. ``sin`` is None when ``cos`` holds angles; ``k`` when only one tensor is rotated."""

    q: torch.Tensor
    k: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor | None
    position_ids: torch.Tensor | None
    offsets: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


class Options(NamedTuple):
    """The options of a call, as the registered operators take them. All are hashable."""

    layout: str = "bshd"
    interleaved: bool = False
    rotary_dim: int | None = None
    rotary_offset: int = 0
    context_parallel: tuple[int, ...] | None = None
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    inverse: bool = False
    transpose: bool = False
    numerics: str = "exact"

    @property
    def parallel_size(self) -> int:
        """Over how many ranks each sequence is spread."""
        return 1 if self.context_parallel is None else self.context_parallel[1]

    def transposed(self) -> Options:
        """The options of the backward."""
        return self._replace(transpose=not self.transpose)


@dataclass(frozen=True)
class RopeCall:
    """A valid call, as sizes and flags. ``str`` gives the shape class that an explanation shows."""

    options: Options
    batch: int
    seqlen: int
    n_q_heads: int
    n_k_heads: int
    head_dim: int
    rotary_dim: int
    full_table: bool
    n_positions: int
    n_sequences: int
    dtype: torch.dtype
    table_dtype: torch.dtype

    @property
    def n_pairs(self) -> int:
        """How many pairs of features are rotated."""
        return self.rotary_dim // 2

    @property
    def last_offset(self) -> int:
        """The largest number that may be added to counted positions of whole sequences within the table."""
        return self.n_positions - self.seqlen * self.options.parallel_size

    @property
    def compute_dtype(self) -> torch.dtype:
        """The arithmetic's dtype."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        heads = f"{self.n_q_heads} heads" if not self.n_k_heads else f"{self.n_q_heads}+{self.n_k_heads} heads"
        pairing = "interleaved" if self.options.interleaved else "half"
        return (
            f"{self.options.layout}, {self.batch} x {self.seqlen} tokens, {heads}, "
            f"{self.rotary_dim} of {self.head_dim} features rotated, {pairing} pairs"
        )


def describe(inputs: Inputs, offset: int, options: Options, operation: str = "rope") -> RopeCall:
    """Validate a call by its metadata alone.

    Raises:
        ArgumentError: a rank, shape, layout, device or option that does not fit.
        DTypeError: a dtype that is not accepted.
    """
    q, k, cos = inputs.q, inputs.k, inputs.cos
    name = argument("q", inputs, operation)
    axes = _check_options(options, operation)
    _check_tensor(q, name, axes, operation)
    batch = 1 if axes.batch is None else q.shape[axes.batch]
    seqlen, head_dim = q.shape[axes.token], q.shape[-1]
    if k is not None:
        _check_tensor(k, "k", axes, operation)
        _check_second(q, k, axes, operation)
    _check_devices(inputs, name, operation)
    rotary_dim, full_table = _check_tables(inputs, options, head_dim, operation)
    _check_positions(inputs, offset, options, batch, seqlen, rotary_dim, operation)
    n_sequences = batch
    if inputs.cu_seqlens is not None:
        n_sequences = _check_cu_seqlens(inputs.cu_seqlens, operation)
    if inputs.offsets is not None:
        _check_offsets(inputs.offsets, n_sequences, operation)
    call = RopeCall(
        options=options,
        batch=batch,
        seqlen=seqlen,
        n_q_heads=q.shape[axes.head],
        n_k_heads=0 if k is None else k.shape[axes.head],
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        full_table=full_table,
        n_positions=cos.shape[0],
        n_sequences=n_sequences,
        dtype=q.dtype,
        table_dtype=cos.dtype,
    )
    _check_reach(call, inputs, offset, operation)
    return call


def _check_options(options: Options, operation: str) -> Axes:
    _check_types(options, operation)
    if options.layout not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise ArgumentError(operation, "layout", f"got {options.layout!r}; expected one of {known}")
    if options.numerics not in NUMERICS:
        known = ", ".join(NUMERICS)
        raise ArgumentError(operation, "numerics", f"got {options.numerics!r}; expected one of {known}")
    parallel = options.context_parallel
    if parallel is not None and not (len(parallel) == 2 and 0 <= parallel[0] < parallel[1]):
        raise ArgumentError(operation, "context_parallel", f"got {parallel}; expected (rank, size), 0 <= rank < size")
    section = options.mrope_section
    if section is not None and (len(section) != 3 or min(section) < 0):
        raise ArgumentError(
            operation, "mrope_section", f"got {section}; expected three numbers of pairs, none negative"
        )
    if section is None and options.mrope_interleaved:
        raise ArgumentError(operation, "mrope_interleaved", "has no meaning without mrope_section")
    return LAYOUTS[options.layout]


def _check_types(options: Options, operation: str) -> None:
    """A flag must be a flag and a number a number: plans compare options by value, and 16.0 == 16."""
    for name, value in zip(Options._fields, options, strict=True):
        if name in _FLAGS:
            fits, expected = isinstance(value, bool), "True or False"
        elif name in _TEXTS:
            fits, expected = isinstance(value, str), "a string"
        elif name == "rotary_dim":
            fits, expected = value is None or _is_int(value), "an int"
        elif name == "rotary_offset":
            fits, expected = _is_int(value), "an int"
        else:
            fits = value is None or (isinstance(value, tuple) and all(map(_is_int, value)))
            expected = "ints"
        if not fits:
            raise DTypeError(operation, name, f"got {value!r}; expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def argument(field: str, inputs: Sequence[object], operation: str) -> str:
    """What the caller calls a field of :class:`Inputs`."""
    _, k, cos, sin, *_ = inputs
    if not operation.startswith("rope"):  # another family's function, whose arguments have the fields' names
        return field
    if field == "q" and operation != "rope_qk" and k is None:
        return "x"
    if field == "cos" and (operation == "rope_from_angles" or (sin is None and cos is not None)):
        return "angles"
    return field


def refuse_table_gradients(inputs: Sequence[torch.Tensor | None], operation: str) -> None:
    """Refuse tables that require a gradient: they are constants, and it would be dropped."""
    for field, table in (("cos", inputs[2]), ("sin", inputs[3])):
        if table is not None and table.requires_grad:
            name = argument(field, inputs, operation)
            raise ArgumentError(operation, name, "requires a gradient, but tables are constants; detach it")


def _check_tensor(x: torch.Tensor, name: str, axes: Axes, operation: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise DTypeError(operation, name, f"got {type(x).__name__}; expected a tensor")
    rank = 3 if axes.batch is None else 4
    if x.dim() != rank or x.layout != torch.strided:
        layouts = ", ".join(layout for layout, a in LAYOUTS.items() if (3 if a.batch is None else 4) == x.dim())
        hint = f"; a tensor of rank {x.dim()} has layout {layouts}" if layouts else ""
        raise ArgumentError(operation, name, f"got shape {tuple(x.shape)}; expected {rank} dimensions, strided{hint}")
    if x.dtype not in DTYPES:
        raise DTypeError(operation, name, f"got {x.dtype}; expected one of {_names(DTYPES)}")
    head_dim = x.shape[-1]
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ArgumentError(operation, name, f"got head_dim {head_dim}; expected an even number, 2 to {MAX_HEAD_DIM}")


def _check_second(q: torch.Tensor, k: torch.Tensor, axes: Axes, operation: str) -> None:
    if k.dtype != q.dtype:
        raise DTypeError(operation, "k", f"got {k.dtype}; expected q's dtype, {q.dtype}")
    mismatch = [d for d in range(q.dim()) if d != axes.head and k.shape[d] != q.shape[d]]
    if mismatch:
        raise ArgumentError(
            operation, "k", f"got shape {tuple(k.shape)}; expected q's, {tuple(q.shape)}, in all but the head dimension"
        )


def _check_devices(inputs: Inputs, name: str, operation: str) -> None:
    for field, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is None:
            continue
        if tensor.device != inputs.q.device:
            where = f"lies on {tensor.device}, '{name}' on {inputs.q.device}; move it there"
            raise ArgumentError(operation, argument(field, inputs, operation), where)
        if tensor.layout != torch.strided:
            raise ArgumentError(operation, argument(field, inputs, operation), f"is {tensor.layout}; expected strided")


def default_rotary_dim(width: int, head_dim: int) -> int:
    """How many of a head's features a table of ``width`` columns rotates where nothing is said."""
    return 2 * width if 2 * width <= head_dim else width


def _check_tables(inputs: Inputs, options: Options, head_dim: int, operation: str) -> tuple[int, bool]:
    """How many features are rotated, and whether the table has a column for each of them."""
    cos, sin = inputs.cos, inputs.sin
    first = argument("cos", inputs, operation)
    if cos.dim() != 2:
        raise ArgumentError(
            operation, first, f"got shape {tuple(cos.shape)}; expected [positions, rotary_dim / 2] or [.., rotary_dim]"
        )
    if cos.dtype not in (torch.float32, inputs.q.dtype):
        raise DTypeError(operation, first, f"got {cos.dtype}; expected float32 or the dtype of the input")
    if sin is not None and (sin.shape != cos.shape or sin.dtype != cos.dtype):
        raise ArgumentError(
            operation, "sin", f"got {tuple(sin.shape)}, {sin.dtype}; expected cos's, {tuple(cos.shape)}, {cos.dtype}"
        )
    width, rotary_dim = cos.shape[1], options.rotary_dim
    if rotary_dim is None:
        rotary_dim = default_rotary_dim(width, head_dim)
    if rotary_dim % 2 or rotary_dim < 2:
        raise ArgumentError(operation, "rotary_dim", f"got {rotary_dim}; expected an even number of at least 2")
    if width not in (rotary_dim, rotary_dim // 2):
        raise ArgumentError(
            operation,
            first,
            f"has {width} columns; expected {rotary_dim // 2} or {rotary_dim} for rotary_dim {rotary_dim}",
        )
    if rotary_dim > head_dim:
        raise ArgumentError(operation, first, f"rotates {rotary_dim} features, more than head_dim {head_dim}")
    if not 0 <= options.rotary_offset <= head_dim - rotary_dim:
        raise ArgumentError(
            operation,
            "rotary_offset",
            f"got {options.rotary_offset}; {rotary_dim} features of {head_dim} leave 0 to {head_dim - rotary_dim}",
        )
    return rotary_dim, width == rotary_dim


def _check_positions(
    inputs: Inputs, offset: int, options: Options, batch: int, seqlen: int, rotary_dim: int, operation: str
) -> None:
    position_ids, packed = inputs.position_ids, options.layout == "thd"
    section = options.mrope_section
    if inputs.cu_seqlens is not None and not packed:
        raise ArgumentError(operation, "cu_seqlens", f"needs layout 'thd', not '{options.layout}'")
    if section is not None and sum(section) != rotary_dim // 2:
        raise ArgumentError(operation, "mrope_section", f"sums to {sum(section)}; there are {rotary_dim // 2} pairs")
    if position_ids is None:
        if section is not None:
            raise ArgumentError(operation, "mrope_section", "needs position_ids with three rows")
        if options.parallel_size > 1 and seqlen % 2 and inputs.cu_seqlens is None:
            raise ArgumentError(operation, "context_parallel", f"needs an even sequence length, got {seqlen}")
        return
    for other, given in (
        ("offsets", inputs.offsets is not None or offset != 0),
        ("cu_seqlens", inputs.cu_seqlens is not None),
        ("context_parallel", options.parallel_size > 1),
    ):
        if given:
            raise ArgumentError(operation, "position_ids", f"already says every position; leave out '{other}'")
    if position_ids.dtype not in INDEX_DTYPES:
        raise DTypeError(operation, "position_ids", f"got {position_ids.dtype}; expected {_names(INDEX_DTYPES)}")
    shape = tuple(position_ids.shape)
    rows = 0 if section is None else 1
    # Sizes are compared one by one where they must be equal: comparing batch with length would make torch.compile
    # compile once more for a batch that happens to be as large as the sequence is long.
    fits = len(shape) in ((rows + 1,) if packed else (rows + 1, rows + 2)) and shape[-1] == seqlen
    if fits and len(shape) == rows + 2:
        fits = shape[-2] == batch or shape[-2] == 1
    if fits and rows:
        fits = shape[0] == 3
    if not fits:
        three = "3, " if rows else ""
        expected = f"[{three}{seqlen}]" if packed else f"[{three}{seqlen}] or [{three}{batch}, {seqlen}]"
        raise ArgumentError(operation, "position_ids", f"got shape {list(shape)}; expected {expected}")


def _check_cu_seqlens(cu_seqlens: torch.Tensor, operation: str) -> int:
    if cu_seqlens.dtype not in INDEX_DTYPES:
        raise DTypeError(operation, "cu_seqlens", f"got {cu_seqlens.dtype}; expected {_names(INDEX_DTYPES)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ArgumentError(
            operation, "cu_seqlens", f"got shape {tuple(cu_seqlens.shape)}; expected [sequences + 1], starting with 0"
        )
    return cu_seqlens.shape[0] - 1


def _check_offsets(offsets: torch.Tensor, n_sequences: int, operation: str) -> None:
    if offsets.dtype not in INDEX_DTYPES:
        raise DTypeError(operation, "offsets", f"got {offsets.dtype}; expected {_names(INDEX_DTYPES)} or a Python int")
    if tuple(offsets.shape) != (n_sequences,):
        raise ArgumentError(
            operation, "offsets", f"got shape {tuple(offsets.shape)}; expected one for each of {n_sequences} sequences"
        )


def _check_reach(call: RopeCall, inputs: Inputs, offset: int, operation: str) -> None:
    """Refuse a table that is too short for positions known from shapes and offset."""
    if inputs.position_ids is not None or inputs.offsets is not None or inputs.cu_seqlens is not None:
        return
    if call.batch * call.seqlen > 0 and offset > call.last_offset:
        last = call.n_positions - 1 + offset - call.last_offset
        raise _too_short(call, last, operation, inputs)


def _too_short(call: RopeCall, last: int, operation: str, inputs: Inputs) -> ArgumentError:
    first = argument("cos", inputs, operation)
    return ArgumentError(operation, first, f"has {call.n_positions} positions, but position {last} is used")


def check_call(call: RopeCall, inputs: Inputs, offset: int, operation: str) -> None:
    """Check what may differ between two calls of equal metadata: the offset, and values where they can be read.

    Values of tensors in device memory are read only if ``TILEWRIGHT_CHECK_DEVICE_VALUES`` is set, since that waits for
    the device; the kernel keeps its accesses in bounds by itself.

    Raises:
        ArgumentError: a table too short for the positions, or ``cu_seqlens`` that is no list of sequence starts.
    """
    _check_reach(call, inputs, offset, operation)
    position_ids, offsets, cu_seqlens = inputs.position_ids, inputs.offsets, inputs.cu_seqlens
    if position_ids is None and offsets is None and cu_seqlens is None:
        return
    if inputs.q.device.type != "cpu" and not settings.check_device_values():
        return
    if call.batch * call.seqlen == 0:
        return
    if position_ids is not None:
        last = int(position_ids.max())
        if last >= call.n_positions:
            raise ArgumentError(
                operation, "position_ids", f"holds position {last}; the table has {call.n_positions} positions"
            )
        return
    lengths = [call.seqlen] * call.n_sequences
    if cu_seqlens is not None:
        lengths = _sequence_lengths(call, cu_seqlens, operation)
    starts = [0] * len(lengths) if offsets is None else offsets.tolist()
    size = call.options.parallel_size
    used = [start + offset + length * size - 1 for start, length in zip(starts, lengths, strict=True) if length > 0]
    if used and max(used) >= call.n_positions:
        raise _too_short(call, max(used), operation, inputs)


def _sequence_lengths(call: RopeCall, cu_seqlens: torch.Tensor, operation: str) -> list[int]:
    """Length of each sequence on this rank, from values."""
    starts: list[int] = cu_seqlens.tolist()
    size = call.options.parallel_size
    if starts[0] != 0:
        raise ArgumentError(operation, "cu_seqlens", f"starts with {starts[0]}; expected 0")
    lengths = [end - start for start, end in pairwise(starts)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ArgumentError(operation, "cu_seqlens", f"descends from {starts[index]} to {starts[index + 1]}")
        if size > 1 and length % (2 * size):
            raise ArgumentError(
                operation,
                "cu_seqlens",
                f"sequence {index} has {length} tokens; {size} ranks need a multiple of {2 * size}",
            )
    if starts[-1] > call.seqlen * size:
        raise ArgumentError(
            operation, "cu_seqlens", f"ends at {starts[-1]}, past the {call.seqlen * size} tokens of the input"
        )
    return [length // size for length in lengths]


def check_inplace(inputs: Inputs, operation: str) -> None:
    """Refuse to write into a tensor whose elements share memory."""
    for name, x in _written(inputs):
        span = 1
        for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
            if size > 1 and stride < span:
                raise ArgumentError(
                    operation, name, "has elements that share memory; with inplace=True each needs its own: clone it"
                )
            span += stride * max(0, size - 1)


def check_writable(inputs: Sequence[torch.Tensor | None], layout: str, operation: str) -> None:
    """Refuse what torch would refuse only after the fact, and to rotate the same heads twice."""
    if not torch.is_inference_mode_enabled():
        for name, x in _written(inputs):
            if x.is_inference():
                raise ArgumentError(operation, name, "is an inference tensor, which only inference mode may write to")
    q, k = inputs[0], inputs[1]
    if q is None or k is None or q.stride() != k.stride() or layout not in LAYOUTS or not q.numel() or not k.numel():
        return
    head = LAYOUTS[layout].head
    first, rest = divmod(k.data_ptr() - q.data_ptr(), max(1, q.stride(head)) * q.element_size())
    if rest == 0 and -k.shape[head] < first < q.shape[head]:
        raise ArgumentError(operation, "k", "shares heads with q; with inplace=True each needs its own: clone one")


def _written(inputs: Sequence[torch.Tensor | None]) -> list[tuple[str, torch.Tensor]]:
    q, k = inputs[0], inputs[1]
    named = (("x" if k is None else "q", q), ("k", k))
    return [(name, x) for name, x in named if x is not None]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
