"""A program as a function of upstream MLIR: linalg on tensors, with no memory in it.

The function's arguments are the kernel's tensors in their order, but for those that are only written; its results are
the new values of the tensors that are written, in their order. A store is ``tensor.insert_slice`` into the tensor that
there was before, through ``scf.if`` as well. Numbers that are read from tables become offsets of slices and bounds of
masks, so that every shape is static. All arithmetic is float32; what a device rounds to is its compiler's affair. What
the executor stops at is undefined here, but for rows that do not fit: those are clipped, as under ``check=False``.

Any compiler takes the text that knows the dialects ``func``, ``arith``, ``math``, ``tensor``, ``linalg`` and ``scf``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xdsl.dialects import arith, scf
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, FloatAttr, FunctionType, ModuleOp, TensorType, f32, i1
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Region, SSAValue
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import dce

from tilewright.errors import NpuProgramError
from tilewright.npu.backends import linalg_rows as rows
from tilewright.npu.backends.linalg_builder import INDEX, Builder, Tile, whole
from tilewright.npu.ir import dialect as npu
from tilewright.npu.ir.dialect import DYNAMIC, element_of, shape_of
from tilewright.npu.ir.text import kernel_of, print_program, verify_program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xdsl.dialects.scf import IfOp
    from xdsl.ir import Operation

    from tilewright.npu.backends.linalg_builder import Offset
    from tilewright.npu.program import Program


def lower(program: Program) -> str:
    """The text of the function.

    Raises:
        NpuProgramError: the program has something in it that is unknown here.
    """
    function = kernel_of(program.module)
    infos = program.manifest.arguments
    lowering = _Lowering(function, program.name)
    taken = [position for position, info in enumerate(infos) if not info.is_output]
    given = [position for position, info in enumerate(infos) if info.role in {"inout", "out"}]
    module = lowering.function(taken, given)
    cse(module)
    dce(module)
    verify_program(module, program.name)
    names = (", ".join(infos[position].name for position in positions) or "nothing" for positions in (taken, given))
    head = "// Kernel {} of profile {}: from {} to {}.\n".format(program.name, program.manifest.profile, *names)
    return head + print_program(module, readable=True)


@dataclass(frozen=True)
class _View:
    """A block of a tensor in memory."""

    base: SSAValue
    offsets: tuple[Offset, ...]
    sizes: tuple[int, ...]


class _Lowering:
    """One program.

    Attributes:
        values: what each of its values has become: a tile, an index, a truth or a block.
        memory: the tensor that each of its arguments is by now.
    """

    def __init__(self, function: FuncOp, name: str) -> None:
        self.source = function
        self.name = name
        self.values: dict[SSAValue, Any] = {}
        self.memory: dict[SSAValue, SSAValue] = {}

    def function(self, taken: Sequence[int], given: Sequence[int]) -> ModuleOp:
        """The module of a function that takes and gives the arguments at these positions."""
        arguments = self.source.body.block.args
        types = [_type(arguments[position]) for position in taken]
        self.builder = b = Builder(types, self.source.location)
        for position, value in zip(taken, b.body.args, strict=True):
            value.name_hint = arguments[position].name_hint
            self.memory[arguments[position]] = value
        for argument in arguments:
            if argument not in self.memory:
                self.memory[argument] = b.empty(shape_of(argument), element_of(argument))
        self.block(self.source.body.block)
        results = [self.memory[arguments[position]] for position in given]
        b.append(ReturnOp(*results))
        kind = FunctionType.from_lists(types, [each.type for each in results])
        function = FuncOp(self.name, kind, Region(b.body))
        function.location = self.source.location
        return ModuleOp([function])

    def block(self, block: Block) -> list[Any]:
        """Lower the operations of a block; the values that it ends with."""
        for operation in block.ops:
            if isinstance(operation, scf.YieldOp | ReturnOp):
                return [self.values[each] for each in operation.operands]
            lower_one = _OPERATIONS.get(type(operation))
            if lower_one is None:
                raise NpuProgramError(f"{self.name}: linalg: there is no operation {operation.name}")
            self.builder.location = operation.location
            results = lower_one(self, operation)
            for result, value in zip(
                operation.results, results if isinstance(results, tuple) else (results,), strict=False
            ):
                self.values[result] = value
                made = value.value if isinstance(value, Tile) else value
                if isinstance(made, SSAValue) and made.name_hint is None:
                    made.name_hint = result.name_hint
        return []

    def tiles(self, operands: Sequence[SSAValue]) -> list[Any]:
        """What operands have become."""
        return [self.values[each] for each in operands]

    # Memory

    def address(self, op: npu.BlockOp) -> _View:
        if op.base not in self.memory:
            raise NpuProgramError(f"{self.name}: linalg: {op.name} of what is no argument")
        dynamic = iter(op.offsets)
        offsets = (self.values[next(dynamic)] if each == DYNAMIC else each for each in op.sizes("static_offsets"))
        return _View(op.base, tuple(offsets), shape_of(op.result))

    def there(self, view: _View) -> tuple[SSAValue, list[int]]:
        """The tensor that a block lies in, and the sizes of what is there of the block.

        Where the place in the last dimension is read from memory the zeros behind it are made part of the tensor.
        """
        value, sizes = self.memory[view.base], list(view.sizes)
        if sizes:
            columns, at = shape_of(value)[-1], view.offsets[-1]
            if isinstance(at, int):
                sizes[-1] = max(0, min(sizes[-1], columns - at))
            elif columns % npu.PADDING:
                value = self.builder.pad(value, len(sizes) - 1, 0, -columns % npu.PADDING)
        return value, sizes

    def load(self, view: _View) -> Tile:
        b = self.builder
        value, sizes = self.there(view)
        if 0 in sizes:
            return Tile(b.constant(0.0), (), view.sizes)
        found = b.extract(value, view.offsets, sizes)
        if missing := view.sizes[-1] - sizes[-1] if sizes else 0:
            found = b.pad(found, len(sizes) - 1, 0, missing)
        return b.converted(whole(found), f32)

    def store(self, view: _View, tile: Tile, axis: int = 0, until: SSAValue | None = None) -> None:
        b = self.builder
        before = self.memory[view.base]
        value, sizes = self.there(view)
        if 0 in sizes:
            return
        zeros = [0] * tile.rank
        block = b.extract(b.plain(b.converted(tile, element_of(before))), zeros, sizes)
        if until is not None:
            old = whole(b.extract(value, view.offsets, sizes))
            block = b.plain(self.first_rows(whole(block), axis, until, old))
        after = b.insert(block, value, view.offsets, sizes)
        self.memory[view.base] = b.extract(after, zeros, shape_of(before))

    def first_rows(self, tile: Tile, axis: int, until: SSAValue, other: Tile | None = None) -> Tile:
        """The first rows along an axis, and those of another tile, or zeros, behind them."""
        b = self.builder
        other = other or Tile(b.constant(0.0, tile.element), (), tile.shape)

        def body(x: SSAValue, y: SSAValue) -> SSAValue:
            return b.add(arith.SelectOp(b.add(arith.CmpiOp(b.place(axis), until, "slt")), x, y))

        return b.map(body, tile, other, element=tile.element)

    def dyn_load(self, op: npu.DynLoadOp) -> Tile:
        tile = self.load(self.values[op.block])
        return tile if op.index is None else self.first_rows(tile, op.number("axis"), self.values[op.index])

    def dyn_store(self, op: npu.DynStoreOp) -> None:
        until = None if op.index is None else self.values[op.index]
        self.store(self.values[op.block], self.values[op.value], op.number("axis"), until)

    def scalar(self, op: npu.ScalarOp) -> Tile:
        return self.builder.converted(self.builder.reshape(whole(self.memory[op.base]), ()), f32)

    def constant(self, op: arith.ConstantOp) -> Tile:
        value, type_ = op.value, op.result.type
        if not isinstance(value, DenseIntOrFPElementsAttr) or not isinstance(type_, TensorType):
            raise NpuProgramError(f"{self.name}: linalg: a constant of type {type_}")
        numbers = value.get_values()
        if len(set(numbers)) == 1:
            return Tile(self.builder.constant(float(numbers[0])), (), shape_of(op.result))
        return whole(self.builder.add(op.clone()))

    # Indices and control

    def index(self, op: npu.IndexOp) -> SSAValue:
        view = self.values[op.block]
        return self._count(self.memory[view.base], view.offsets)

    def _count(self, table: SSAValue, offsets: Sequence[Offset]) -> SSAValue:
        return self.builder.add(arith.IndexCastOp(self.builder.element_at(table, offsets), INDEX))

    def index_add(self, op: npu.IndexAddOp) -> SSAValue:
        return self.builder.add(arith.AddiOp(self.values[op.index], self.builder.index(op.number("value"))))

    def skip(self, op: npu.PartitionSkipOp) -> SSAValue:
        b, table, position = self.builder, self.memory[op.table], op.sizes("position")
        *batch, at = position
        if at == 0:
            return b.constant(0, i1)
        none = b.add(arith.CmpiOp(self._count(table, position), b.index(0), "eq"))
        size = b.index(op.number("partition_size"))
        open_before = b.add(arith.CmpiOp(self._count(table, [*batch, at - 1]), size, "slt"))
        return b.add(arith.AndIOp(none, open_before))

    def choose(self, op: IfOp) -> tuple[Tile, ...]:
        """Each branch gives its values, and the tensors in memory that either of them writes."""
        b, condition = self.builder, self.values[op.cond]
        stores = [each for each in op.walk() if isinstance(each, npu.StoreOp | npu.DynStoreOp)]
        bases = {each.block.owner.base for each in stores if isinstance(each.block.owner, npu.BlockOp)}
        written = [base for base in self.memory if base in bases]
        regions, kinds = [], []
        for region in op.regions:
            before, block = dict(self.memory), Block()
            with b.inside(block):
                ends = self.block(region.block) if region.blocks else []
                b.location = op.location
                given = [*(b.plain(each) for each in ends), *(self.memory[base] for base in written)]
                b.append(scf.YieldOp(*given))
            self.memory = before
            regions.append(Region(block))
            kinds.append([each.type for each in given])
        made = scf.IfOp(condition, kinds[0], regions[0], regions[1])
        b.append(made)
        self.memory.update(zip(written, made.results[len(op.results) :], strict=True))
        for base in written:
            self.memory[base].name_hint = base.name_hint
        return tuple(whole(each) for each in made.results[: len(op.results)])

    # Rows of a cache

    def insert(self, op: npu.InsertOp) -> Tile:
        b, (data, updates, start), axis = self.builder, self.tiles(op.operands), op.number("axis")
        return whole(b.extract(self._longer(data, updates, start, axis), [0] * data.rank, data.shape))

    def window_insert(self, op: npu.WindowInsertOp) -> Tile:
        b, (base, state, start), axis = self.builder, self.tiles(op.operands), op.number("axis")
        until = b.add(arith.AddiOp(start, b.index(state.shape[axis])))
        return self.first_rows(whole(self._longer(base, state, start, axis)), axis, until)

    def _longer(self, data: Tile, updates: Tile, start: SSAValue, axis: int) -> SSAValue:
        """Data with room behind it for all rows of the updates, and these in their place."""
        b = self.builder
        padded = b.pad(b.plain(data), axis, 0, updates.shape[axis])
        return b.insert(b.plain(updates), padded, _with([0] * data.rank, axis, start), updates.shape)

    def window_slice(self, op: npu.WindowSliceOp) -> Tile:
        b, (data, end), axis, size = self.builder, self.tiles(op.operands), op.number("axis"), op.number("size")
        value = b.plain(data)
        if data.shape[axis] < size:
            value = b.pad(value, axis, 0, size - data.shape[axis])
        count = b.add(arith.MinSIOp(end, b.index(size)))
        first = b.add(arith.SubiOp(end, count))
        taken = b.extract(value, _with([0] * data.rank, axis, first), shape_of(op.result))
        return self.first_rows(whole(taken), axis, count)

    def pad(self, op: npu.PadOp) -> Tile:
        assert isinstance(op.value, FloatAttr)
        b, value = self.builder, self.builder.plain(self.values[op.argument])
        return whole(b.pad(value, op.number("axis"), op.number("low"), op.number("high"), op.value.value.data))

    # Softmax

    def hidden(self, op: Operation) -> Tile:
        """Scores without what an index hides."""
        scores, index, *_ = self.tiles(op.operands)
        window = op.number("window_size") if isinstance(op, npu.WindowSoftmaxOp) else None
        return rows.hidden_behind(self.builder, scores, index, window)

    def masked(self, op: npu.MaskedSoftmaxOp | npu.FlashTileOp) -> Tile:
        """Scores without what a mask hides."""
        return rows.hidden(self.builder, self.values[op.argument], self.values[op.mask])

    def tile(self, op: npu.FlashTileOp | npu.DynamicFlashTileOp) -> tuple[Tile, Tile, Tile]:
        scores = self.masked(op) if isinstance(op, npu.FlashTileOp) else self.hidden(op)
        return rows.flash_tile(self.builder, scores, None if op.previous is None else self.values[op.previous])


def _type(argument: SSAValue) -> TensorType[Any]:
    return TensorType(element_of(argument), list(shape_of(argument)))


def _with(values: Sequence[Offset], axis: int, value: Offset) -> list[Offset]:
    return [*values[:axis], value, *values[axis + 1 :]]


_OPERATIONS: dict[type[Operation], Callable[[_Lowering, Any], Any]] = {
    arith.ConstantOp: _Lowering.constant,
    scf.IfOp: _Lowering.choose,
    npu.BlockOp: _Lowering.address,
    npu.LoadOp: lambda run, op: run.load(run.values[op.block]),
    npu.StoreOp: lambda run, op: run.store(run.values[op.block], run.values[op.value]),
    npu.DynLoadOp: _Lowering.dyn_load,
    npu.DynStoreOp: _Lowering.dyn_store,
    npu.ScalarOp: _Lowering.scalar,
    npu.IndexOp: _Lowering.index,
    npu.IndexAddOp: _Lowering.index_add,
    npu.PartitionSkipOp: _Lowering.skip,
    npu.ElementwiseOp: lambda run, op: rows.elementwise(run.builder, op.function.data, run.tiles(op.arguments)),
    npu.ReduceOp: lambda run, op: rows.reduce(
        run.builder, op.function.data, run.values[op.argument], op.number("axis")
    ),
    npu.MatmulOp: lambda run, op: rows.matmul(run.builder, *run.tiles(op.operands)),
    npu.TransposeOp: lambda run, op: run.values[op.argument].transposed(op.sizes("permutation")),
    npu.ReshapeOp: lambda run, op: run.builder.reshape(run.values[op.argument], shape_of(op.result)),
    npu.BroadcastOp: lambda run, op: run.builder.broadcast(run.values[op.argument], shape_of(op.result)),
    npu.PadOp: _Lowering.pad,
    npu.InsertOp: _Lowering.insert,
    npu.WindowInsertOp: _Lowering.window_insert,
    npu.WindowSliceOp: _Lowering.window_slice,
    npu.SoftmaxOp: lambda run, op: rows.softmax(run.builder, run.values[op.argument]),
    npu.MaskedSoftmaxOp: lambda run, op: rows.softmax(run.builder, run.masked(op)),
    npu.DynamicMaskedSoftmaxOp: lambda run, op: rows.softmax(run.builder, run.hidden(op)),
    npu.WindowSoftmaxOp: lambda run, op: rows.softmax(run.builder, run.hidden(op)),
    npu.FlashTileOp: _Lowering.tile,
    npu.DynamicFlashTileOp: _Lowering.tile,
    npu.FlashRecomputeOp: lambda run, op: rows.flash_recompute(run.builder, *run.tiles(op.operands)),
}
"""What lowers each operation."""
