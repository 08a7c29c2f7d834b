"""Running a program on a CPU, with torch: the definition of what its operations mean.

Every block is read and written by its offsets in the tensor that is really there, whatever strides the kernel says. All
arithmetic is float32, and each operation's result is rounded to the compute dtype. What lies behind the ``index`` of a
``dyn_load`` is zero.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from xdsl.dialects.arith import ConstantOp
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, FloatAttr, TensorType
from xdsl.dialects.func import ReturnOp
from xdsl.dialects.scf import IfOp, YieldOp

from tilewright.errors import ArgumentError, DTypeError, NpuProgramError, NpuRunError
from tilewright.npu.compile import dtype_of
from tilewright.npu.ir import dialect as npu
from tilewright.npu.ir.dialect import DYNAMIC, shape_of
from tilewright.npu.ir.text import kernel_of, span_of
from tilewright.npu.rounding import rounding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xdsl.ir import Block, Operation, SSAValue

    from tilewright.npu.program import Program
    from tilewright.npu.source import Span

_REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {"max": torch.amax, "min": torch.amin, "sum": torch.sum}
FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in (*npu.UNARY, *npu.BINARY)},
    "select": torch.where,
}
"""The elementwise functions; torch calls them as the dialect does, but for one."""


def execute(
    program: Program,
    tensors: Sequence[torch.Tensor],
    *,
    compute_dtype: str = "float32",
    check: bool = True,
    of_any_float: Sequence[str] = (),
) -> None:
    """Run a program; outputs are written in place. See :meth:`Program.run`.

    Tensors named in ``of_any_float`` may have any floating point dtype and any strides: what is loaded of them becomes
    float32, and what is stored is rounded to theirs.
    """
    _validate(program, tensors, of_any_float)
    function = kernel_of(program.module)
    run = _Run(program.name, rounding(compute_dtype), check)
    written = {}
    for argument, value, info in zip(function.body.block.args, tensors, program.manifest.arguments, strict=True):
        run.values[argument] = value
        run.names[argument] = info.name
        run.columns[argument] = (info.seen_shape or info.shape or (1,))[-1]
        if info.is_output and check:
            written[info.name] = run.written[argument] = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    with torch.no_grad():
        run.block(function.body.block)
    if check:
        run.check_inserted()
        _check_outputs(program, tensors, written)


def _validate(program: Program, tensors: Sequence[torch.Tensor], of_any_float: Sequence[str]) -> None:
    for info, tensor in zip(program.manifest.arguments, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            came = "a meta tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ArgumentError(program.name, info.name, f"got {came}, expected a tensor with values")
        if tuple(tensor.shape) != info.shape:
            message = f"got shape {tuple(tensor.shape)}, expected {info.shape}: the program was compiled for that"
            raise ArgumentError(program.name, info.name, message)
        if info.name in of_any_float and tensor.is_floating_point():
            continue
        if dtype_of(tensor).name != info.dtype:
            raise DTypeError(program.name, info.name, f"got {dtype_of(tensor)}, expected {info.dtype}")
        if not tensor.is_contiguous():
            raise ArgumentError(
                program.name, info.name, "is not contiguous; the device ignores strides: tensor.contiguous()"
            )


def _check_outputs(program: Program, tensors: Sequence[torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    given = dict(zip((info.name for info in program.manifest.arguments), tensors, strict=True))
    for name, places in written.items():
        missing = int((~places).sum())
        if missing:
            first = tuple(torch.nonzero(~places)[0].tolist())
            lost = f"{missing} of {places.numel()} elements are never written, the first one at {first}"
            where = span_of(kernel_of(program.module).location)
            message = f"{where}: error[NPU-UNWRITTEN_OUTPUT] {program.name}: output '{name}': {lost}"
            raise NpuRunError(message, "UNWRITTEN_OUTPUT")
    counts = {name: int((~torch.isfinite(given[name])).sum()) for name in written}
    if not any(counts.values()):
        return
    sources = (given[info.name] for info in program.manifest.arguments if info.role in {"in", "inout", "scalar"})
    if all(bool(torch.isfinite(each).all()) for each in sources if each.is_floating_point()):
        for name, count in counts.items():
            if count:
                found = f"{count} elements of output '{name}' are NaN or infinite, and no input is"
                message = f"{_last_store(program, name)}: warning[NPU-NAN_OUTPUT] {program.name}: {found}"
                warnings.warn(message, RuntimeWarning, stacklevel=4)


def _last_store(program: Program, name: str) -> Span:
    """Where a program writes an output last."""
    function = kernel_of(program.module)
    position = [info.name for info in program.manifest.arguments].index(name)
    stores = [
        op
        for op in function.walk()
        if isinstance(op, npu.StoreOp | npu.DynStoreOp)
        and isinstance(op.block.owner, npu.BlockOp)
        and op.block.owner.base is function.body.block.args[position]
    ]
    return span_of(stores[-1].location)


@dataclass
class _View:
    """A block of a tensor in memory: what is really there of it, and how many columns of zeros lie behind."""

    base: SSAValue
    slices: tuple[slice, ...]
    missing: int


class _Run:
    """One run of a program."""

    def __init__(self, name: str, round_: Callable[[torch.Tensor], torch.Tensor], check: bool) -> None:
        self.name = name
        self.round = round_
        self.check = check
        self.values: dict[SSAValue, Any] = {}
        self.names: dict[SSAValue, str] = {}
        self.columns: dict[SSAValue, int] = {}  # of the last dimension, padding included
        self.written: dict[SSAValue, torch.Tensor] = {}
        self.homeless: dict[Any, Operation | None] = {}
        self.origins: dict[SSAValue, Any] = {}

    def block(self, block: Block) -> list[Any]:
        """Run the operations of a block; the values that it ends with."""
        for operation in block.ops:
            if isinstance(operation, YieldOp | ReturnOp):
                return [self.values[each] for each in operation.operands]
            execute_one = _OPERATIONS.get(type(operation))
            if execute_one is None:
                raise NpuProgramError(f"{self.name}: there is no operation {operation.name}")
            results = execute_one(self, operation)
            if not isinstance(results, tuple):
                results = (results,)
            moves = isinstance(operation, _MOVES)
            for result, value in zip(operation.results, results, strict=False):
                rounds = not moves and isinstance(value, torch.Tensor) and value.is_floating_point()
                self.values[result] = self.round(value) if rounds else value
        return []

    def fail(self, operation: Operation, code: str, message: str) -> None:
        """Stop because the device would not forgive this."""
        raise NpuRunError(f"{span_of(operation.location)}: error[NPU-{code}] {self.name}: {message}", code)

    # Memory

    def address(self, op: npu.BlockOp) -> _View:
        base: torch.Tensor = self.values[op.base]
        dynamic = iter(op.offsets)
        slices = []
        for axis, (static, size) in enumerate(zip(op.sizes("static_offsets"), shape_of(op.result), strict=True)):
            offset = self.values[next(dynamic)] if static == DYNAMIC else static
            whole = base.shape[axis]
            inside = self.columns[op.base] if axis == base.dim() - 1 else whole
            if not 0 <= offset <= inside - size:
                what = f"block {offset}" if static == DYNAMIC else f"rows {offset} to {offset + size}"
                self.fail(
                    op, "BLOCK_NUMBER", f"{what} of dimension {axis} of '{self.names[op.base]}', which has {whole}"
                )
            slices.append(slice(min(offset, whole), min(offset + size, whole)))
        missing = shape_of(op.result)[-1] - (slices[-1].stop - slices[-1].start) if slices else 0
        return _View(op.base, tuple(slices), missing)

    def load(self, view: _View) -> torch.Tensor:
        data: torch.Tensor = self.values[view.base][view.slices]
        data = data.to(torch.float32, copy=True) if data.is_floating_point() else data  # memory may change later
        return pad(data, (0, view.missing)) if view.missing else data

    def dyn_load(self, op: npu.DynLoadOp) -> torch.Tensor:
        data = self.load(self.values[op.block])
        if op.index is None:
            return data
        axis, until = op.number("axis"), self.values[op.index]
        self.within(op, until, data.shape[axis])
        result = torch.zeros_like(data)
        result.narrow(axis, 0, until).copy_(data.narrow(axis, 0, until))
        return result

    def store(self, view: _View, value: torch.Tensor, axis: int = 0, until: int | None = None) -> None:
        base = self.values[view.base]
        slices = list(view.slices)
        if view.missing:
            value = value[..., : value.shape[-1] - view.missing]
        if until is not None:
            rows = slices[axis]
            until = min(until, value.shape[axis])
            value = value.narrow(axis, 0, until)
            slices[axis] = slice(rows.start, rows.start + until)
        base[tuple(slices)] = value.to(base.dtype)
        if view.base in self.written:
            self.written[view.base][tuple(slices)] = True

    def dyn_store(self, op: npu.DynStoreOp) -> None:
        value, axis = self.values[op.value], op.number("axis")
        until = None if op.index is None else self.values[op.index]
        if until is not None:
            self.within(op, min(until, value.shape[axis]), value.shape[axis])
            until = min(until, value.shape[axis])  # a full partition has no room for the rows that go to the next
        self.store(self.values[op.block], value, axis, until)

    def within(self, op: Operation, index: int, size: int) -> None:
        """Stop if an index does not lie in an axis."""
        if not 0 <= index <= size:
            self.fail(op, "BLOCK_NUMBER", f"index {index} on an axis of {size}")

    def skip(self, op: npu.PartitionSkipOp) -> bool:
        table, position = self.values[op.table], op.sizes("position")
        *batch, at = position
        if at == 0:
            return False
        before = int(table[(*batch, at - 1)])
        return int(table[position]) == 0 and before < op.number("partition_size")

    def choose(self, op: IfOp) -> tuple[Any, ...]:
        region = op.true_region if self.values[op.cond] else op.false_region
        return tuple(self.block(region.block)) if region.blocks else ()

    # Rows of a cache

    def insert(self, op: npu.InsertOp) -> torch.Tensor:
        data, updates, start = (self.values[each] for each in op.operands)
        axis = op.number("axis")
        size, rows = data.shape[axis], updates.shape[axis]
        self.within(op, start, size)
        fit = min(rows, size - start)
        if self.check and 0 < fit < rows:
            message = f"{rows} rows from {start} on do not fit into a partition of {size}: {rows - fit} would be lost"
            self.fail(op, "STRADDLE", message)
        # A full partition takes none; another one has to.
        rows_of = self.origin(op.updates)
        self.homeless[rows_of] = None if fit else self.homeless.get(rows_of, op)
        rows = fit
        result: torch.Tensor = data.clone()
        result.narrow(axis, start, rows).copy_(updates.narrow(axis, 0, rows))
        return result

    def origin(self, value: SSAValue) -> Any:
        """What a value is made of: the same for rows that are loaded for each partition anew."""
        if value not in self.origins:
            op = value.owner
            found: Any = value
            if isinstance(op, npu.LoadOp):
                view = self.values[op.block]
                found = (view.base, *((each.start, each.stop) for each in view.slices))
            elif isinstance(op, npu.NpuOperation):
                found = (op.name, *op.properties.items(), *(self.origin(each) for each in op.operands))
            self.origins[value] = found
        return self.origins[value]

    def check_inserted(self) -> None:
        """Stop if rows were inserted into no partition at all."""
        for operation in self.homeless.values():
            if operation is not None:
                self.fail(operation, "STRADDLE", "every partition is full: the rows would be lost")

    def window_insert(self, op: npu.WindowInsertOp) -> torch.Tensor:
        base, state, start = (self.values[each] for each in op.operands)
        axis = op.number("axis")
        self.within(op, start, base.shape[axis])
        result: torch.Tensor = base.new_zeros(shape_of(op.result))
        result.narrow(axis, 0, start).copy_(base.narrow(axis, 0, start))
        result.narrow(axis, start, state.shape[axis]).copy_(state)
        return result

    def window_slice(self, op: npu.WindowSliceOp) -> torch.Tensor:
        data, end = (self.values[each] for each in op.operands)
        axis, size = op.number("axis"), op.number("size")
        self.within(op, end, data.shape[axis])
        rows = min(end, size)
        result: torch.Tensor = data.new_zeros(shape_of(op.result))
        result.narrow(axis, 0, rows).copy_(data.narrow(axis, end - rows, rows))
        return result

    def pad(self, op: npu.PadOp) -> torch.Tensor:
        assert isinstance(op.value, FloatAttr)
        data: torch.Tensor = self.values[op.argument]
        behind = data.dim() - 1 - op.number("axis")
        return pad(data, (0, 0) * behind + (op.number("low"), op.number("high")), value=op.value.value.data)

    # Softmax

    def tile(self, scores: torch.Tensor, mask: torch.Tensor, previous: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        hidden = scores.masked_fill(~mask, -torch.inf)
        top = hidden.amax(-1, keepdim=True)
        if previous is not None:
            top = torch.maximum(top, previous)
        exponentials = self.round(torch.exp(hidden - self.round(top)))
        return top, exponentials, exponentials.sum(-1, keepdim=True)


_MOVES = (
    npu.TransposeOp, npu.ReshapeOp, npu.BroadcastOp, npu.InsertOp, npu.WindowInsertOp, npu.WindowSliceOp, IfOp,
)  # fmt: skip
"""Operations that give the numbers they are given, which are rounded already."""


def causal_mask(scores: torch.Tensor, first: int) -> torch.Tensor:
    """Row ``i`` sees the columns ``j <= first + i``: [rows, columns]."""
    rows, columns = scores.shape[-2:]
    row = torch.arange(rows, device=scores.device)[:, None]
    return torch.arange(columns, device=scores.device)[None, :] <= first + row


def window_mask(scores: torch.Tensor, start: int, window: int) -> torch.Tensor:
    """Row ``i`` sees the columns ``start + i - window < j <= start + i``: [rows, columns]."""
    rows, columns = scores.shape[-2:]
    row = start + torch.arange(rows, device=scores.device)[:, None]
    column = torch.arange(columns, device=scores.device)[None, :]
    return (column <= row) & (column > row - window)


def softmax(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax along the last axis of what the mask shows; NaN where it shows nothing."""
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of the last two dimensions. What is repeated along the dimension before is read once."""
    if b.dim() > 2 and b.stride(-3) == 0 and b.shape[-3] > 1:
        rows = a.flatten(-3, -2) @ b.select(-3, 0)
        return rows.reshape(*a.shape[:-1], b.shape[-1])
    return a @ b


def _constant(run: _Run, op: Operation) -> torch.Tensor:
    assert isinstance(op, ConstantOp)
    value = op.value
    if not isinstance(value, DenseIntOrFPElementsAttr) or not isinstance(op.result.type, TensorType):
        raise NpuProgramError(f"{run.name}: a constant of type {op.result.type}")
    numbers = torch.tensor([float(each) for each in value.get_values()], dtype=torch.float32)
    return numbers.reshape(shape_of(op.result)) if len(numbers) > 1 else numbers[0].expand(shape_of(op.result))


def _reduce(run: _Run, op: npu.ReduceOp) -> torch.Tensor:
    value, axis = run.values[op.argument], op.number("axis")
    return _REDUCTIONS[op.function.data](value, dim=axis, keepdim=True)


def _flash_tile(run: _Run, op: npu.FlashTileOp) -> tuple[torch.Tensor, ...]:
    previous = None if op.previous is None else run.values[op.previous]
    scores = run.values[op.argument]
    return run.tile(scores, (run.values[op.mask] > 0).expand(scores.shape), previous)


def _dynamic_flash_tile(run: _Run, op: npu.DynamicFlashTileOp) -> tuple[torch.Tensor, ...]:
    previous = None if op.previous is None else run.values[op.previous]
    scores = run.values[op.argument]
    return run.tile(scores, causal_mask(scores, run.values[op.index]), previous)


def _recompute(run: _Run, op: npu.FlashRecomputeOp) -> tuple[torch.Tensor, torch.Tensor]:
    max_prev, max_, sum_prev, sum_, out_prev, out = (run.values[each] for each in op.operands)
    factor = run.round(torch.exp(max_prev - max_))
    return factor * sum_prev + sum_, factor * out_prev + out


def _broadcast(run: _Run, op: npu.BroadcastOp) -> torch.Tensor:
    result: torch.Tensor = run.values[op.argument].expand(shape_of(op.result))
    return result


def _index(run: _Run, op: npu.IndexOp) -> int:
    view = run.values[op.block]
    return int(run.values[view.base][view.slices])


_OPERATIONS: dict[type[Operation], Callable[[_Run, Any], Any]] = {
    ConstantOp: _constant,
    IfOp: _Run.choose,
    npu.BlockOp: _Run.address,
    npu.LoadOp: lambda run, op: run.load(run.values[op.block]),
    npu.StoreOp: lambda run, op: run.store(run.values[op.block], run.values[op.value]),
    npu.DynLoadOp: _Run.dyn_load,
    npu.DynStoreOp: _Run.dyn_store,
    npu.ScalarOp: lambda run, op: run.values[op.base].to(torch.float32).reshape(()),
    npu.IndexOp: _index,
    npu.IndexAddOp: lambda run, op: run.values[op.index] + op.number("value"),
    npu.PartitionSkipOp: _Run.skip,
    npu.ElementwiseOp: lambda run, op: FUNCTIONS[op.function.data](*(run.values[each] for each in op.arguments)),
    npu.ReduceOp: _reduce,
    npu.MatmulOp: lambda run, op: matmul(run.values[op.lhs], run.values[op.rhs]),
    npu.TransposeOp: lambda run, op: run.values[op.argument].permute(op.sizes("permutation")),
    npu.ReshapeOp: lambda run, op: run.values[op.argument].reshape(shape_of(op.result)),
    npu.BroadcastOp: _broadcast,
    npu.PadOp: _Run.pad,
    npu.InsertOp: _Run.insert,
    npu.WindowInsertOp: _Run.window_insert,
    npu.WindowSliceOp: _Run.window_slice,
    npu.SoftmaxOp: lambda run, op: softmax(run.values[op.argument]),
    npu.MaskedSoftmaxOp: lambda run, op: softmax(run.values[op.argument], run.values[op.mask] > 0),
    npu.DynamicMaskedSoftmaxOp: lambda run, op: softmax(
        run.values[op.argument], causal_mask(run.values[op.argument], run.values[op.index])
    ),
    npu.WindowSoftmaxOp: lambda run, op: softmax(
        run.values[op.argument], window_mask(run.values[op.argument], run.values[op.start], op.number("window_size"))
    ),
    npu.FlashTileOp: _flash_tile,
    npu.DynamicFlashTileOp: _dynamic_flash_tile,
    npu.FlashRecomputeOp: _recompute,
}
"""What runs each operation."""
