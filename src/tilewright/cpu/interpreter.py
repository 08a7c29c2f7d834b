"""Runs a kernel's Triton IR with torch: the CPU target without a C compiler, and the reference for its native code.

All programs of a grid run in lock-step, each value being one tensor for all of them. Where their control flow differs,
every path runs for the programs that take it. Exactness goes before speed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from tilewright.cpu import interpreter_numerics as numerics
from tilewright.cpu.diagnostics import pointed, unsupported
from tilewright.cpu.interpreter_memory import Access, AccessCheck, BlockPointer, Lanes, Memory, StorageCheck
from tilewright.cpu.interpreter_operations import OPERATIONS, broadcast, together
from tilewright.cpu.types import Scalar, element_of, shape_of
from tilewright.cpu.types import Tensor as Tile
from tilewright.errors import KernelAssertionError, UnsupportedKernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from tilewright.cpu.ttir import Block, Module, Operation, Region, Value

    Frame = dict[Value, Any]

__all__ = ["Access", "AccessCheck", "StorageCheck", "interpret"]

_ELEMENTS_AT_ONCE = 1 << 18


def interpret(
    module: Module,
    grid: tuple[int, int, int],
    arguments: Sequence[int | float | bool],
    *,
    check: AccessCheck | None = None,
) -> None:
    """Run all programs of a grid.

    Args:
        module: the kernel and what it calls.
        grid: number of programs along each axis.
        arguments: one for each argument of the kernel's function; a pointer is an address.
        check: judges each access before it touches memory.

    Raises:
        UnsupportedKernelError: the kernel uses something that is not interpreted.
        KernelAssertionError: a ``tl.device_assert`` failed.
        KernelAccessError: from ``check``.
    """
    kernel = module.kernel
    parameters = kernel.regions[0].blocks[0].arguments
    if len(arguments) != len(parameters):
        raise ValueError(f"the kernel takes {len(parameters)} arguments, not {len(arguments)}")
    values: list[Any] = []
    for parameter, argument in zip(parameters, arguments, strict=True):
        if isinstance(parameter.type, Tile) or not hasattr(parameter.type, "bits"):
            raise UnsupportedKernelError(pointed(kernel.location, f"an argument of type {parameter.type}"))
        values.append(numerics.constant(argument, element_of(parameter.type)))
    machine = _Machine(module, grid, check)
    total = math.prod(grid)
    chunk = _programs_at_once(module)
    for start in range(0, total, chunk):
        index = torch.arange(start, min(start + chunk, total), device=numerics.CPU)
        x, y, z = index % grid[0], index // grid[0] % grid[1], index // (grid[0] * grid[1])
        machine.call(kernel, values, Lanes(torch.stack([x, y, z], dim=1).to(torch.int32), len(index)))


def _walk(region: Region) -> Iterator[Operation]:
    for block in region.blocks:
        for operation in block.operations:
            yield operation
            for inner in operation.regions:
                yield from _walk(inner)


def _programs_at_once(module: Module) -> int:
    """How many programs run in lock-step.

    Only one where a program may wait for another, which in lock-step might never get on.
    """
    largest = 1
    for function in module.functions.values():
        for operation in _walk(function.regions[0]):
            largest = max([largest, *(math.prod(shape_of(value.type)) for value in operation.results)])
    waits = any(_may_wait(function, module) for function in module.functions.values())
    return 1 if waits else max(1, _ELEMENTS_AT_ONCE // largest)


def _may_wait(function: Operation, module: Module) -> bool:
    """Whether a loop of a function looks at memory that other programs change, as taking a lock does."""
    for operation in _walk(function.regions[0]):
        if operation.name in {"scf.while", "scf.for"}:
            inside = [inner for region in operation.regions for inner in _walk(region)]
            if any(_looks(inner, operation.name == "scf.for", module) for inner in inside):
                return True
    blocks = function.regions[0].blocks
    places = {block: place for place, block in enumerate(blocks)}
    back = any(places[to] <= places[block] for block in blocks for to in block.operations[-1].successors)
    return back and any(_looks(operation, False, module) for operation in _walk(function.regions[0]))


def _looks(operation: Operation, counted: bool, module: Module) -> bool:
    """Whether an operation in a loop may be what the loop waits for; a counted loop can wait only for a lock."""
    if operation.name == "tt.call":
        callee = module.functions[operation.attributes["callee"]]
        return any(_looks(inner, counted, module) for inner in _walk(callee.regions[0]))
    if operation.name == "tt.atomic_cas" or operation.attributes.get("atomic_rmw_op") == 10:
        return True
    return not counted and (operation.name == "tt.atomic_rmw" or bool(operation.attributes.get("isVolatile")))


def _last_uses(region: Region, found: dict[Operation, list[Value]]) -> set[Value]:
    """Note for each operation the values that nothing needs after it; return what the region uses from outside."""
    used_in: dict[Block, list[set[Value]]] = {}
    for block in region.blocks:
        used_in[block] = [
            set(operation.operands).union(*(_last_uses(inner, found) for inner in operation.regions))
            for operation in block.operations
        ]
    used = {block: set().union(*parts) for block, parts in used_in.items()}
    outside = set().union(*used.values())
    for block in region.blocks:
        own = {*block.arguments, *(result for operation in block.operations for result in operation.results)}
        outside -= own
        for other in region.blocks:
            if other is not block:
                own -= used[other]
        for operation, uses in zip(reversed(block.operations), reversed(used_in[block]), strict=True):
            last = (uses | set(operation.results)) & own
            own -= last
            if last:
                found[operation] = list(last)
    return outside


def _choose(mask: Tensor, new: Any, old: Any) -> Any:
    """For each lane ``new`` where the mask holds, else ``old``."""
    if new is old:
        return new
    if isinstance(new, BlockPointer):
        return new.of([_choose(mask, a, b) for a, b in zip(new.parts(), old.parts(), strict=True)])
    return torch.where(mask.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _merge(mask: Tensor, new: list[Any], old: list[Any]) -> list[Any]:
    return [_choose(mask, a, b) for a, b in zip(new, old, strict=True)]


class _Machine:
    """Executes functions, regions and operations for lanes in lock-step."""

    def __init__(self, module: Module, grid: tuple[int, int, int], check: AccessCheck | None) -> None:
        self._module = module
        self._grid = grid
        self._releases: dict[Operation, list[Value]] = {}
        for function in module.functions.values():
            _last_uses(function.regions[0], self._releases)
        memory = Memory(check)
        # Name -> what to do with the operation, its operands, the lanes and the values in scope.
        self._handlers: dict[str, Callable[[Operation, list[Any], Lanes, Frame], Any]] = {
            "tt.load": lambda operation, operands, lanes, _: memory.load(operation, operands, lanes),
            "tt.store": lambda operation, operands, lanes, _: memory.store(operation, operands, lanes),
            "tt.atomic_rmw": lambda operation, operands, lanes, _: memory.atomic(operation, operands, lanes),
            "tt.atomic_cas": lambda operation, operands, lanes, _: memory.atomic(operation, operands, lanes),
            "tt.get_program_id": self._program_id,
            "tt.get_num_programs": self._num_programs,
            "tt.make_tensor_ptr": self._make_block_pointer,
            "tt.advance": lambda operation, operands, lanes, _: operands[0].advance(operands[1:]),
            "tt.print": self._print,
            "tt.assert": self._assert,
            "tt.call": self._call,
            "scf.if": self._if,
            "scf.for": self._for,
            "scf.while": self._while,
            "tt.reduce": self._reduce,
            "tt.scan": self._scan,
            "tt.map_elementwise": self._map,
            # All lanes are always at the same place, and nothing need be told what a value divides by.
            "ttg.barrier": lambda *_: None,
            "gpu.barrier": lambda *_: None,
            "tt.debug_barrier": lambda *_: None,
            "llvm.intr.assume": lambda *_: None,
        }

    # Blocks

    def call(self, function: Operation, arguments: list[Any], lanes: Lanes) -> list[Any]:
        """Run a function."""
        return self._graph(function.regions[0], arguments, lanes, {})

    def _operation(self, operation: Operation, lanes: Lanes, frame: Frame) -> list[Any]:
        operands = [frame[value] for value in operation.operands]
        handler = self._handlers.get(operation.name)
        if handler is not None:
            found = handler(operation, operands, lanes, frame)
        elif operation.name in OPERATIONS:
            found = OPERATIONS[operation.name](operation, operands)
        else:
            raise unsupported(operation, f"the operation {operation.name}")
        if found is None:
            return []
        return found if isinstance(found, list) else [found]

    def _block(self, block: Block, lanes: Lanes, frame: Frame, merge: Tensor | None = None) -> list[Any]:
        """Run a block up to its terminator and return the terminator's operands.

        With ``merge`` only those lanes' values are set, because others may have come through the block earlier.
        """
        *operations, terminator = block.operations
        for operation in operations:
            for value, result in zip(operation.results, self._operation(operation, lanes, frame), strict=True):
                keep = merge is not None and value in frame
                frame[value] = _choose(merge, result, frame[value]) if merge is not None and keep else result
            for value in self._releases.get(operation, ()):
                frame.pop(value, None)
        return [frame[value] for value in terminator.operands]

    def _region(self, region: Region, arguments: Sequence[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        """Run a region and return what it yields."""
        if len(region.blocks) > 1:
            return self._graph(region, arguments, lanes, frame)
        frame.update(zip(region.block.arguments, arguments, strict=True))
        return self._block(region.block, lanes, frame)

    def _graph(self, region: Region, arguments: Sequence[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        """Run blocks that branch to one another, always the first one that has lanes waiting."""
        if len(region.blocks) == 1:
            return self._region(region, arguments, lanes, frame)
        for block in region.blocks:  # what an earlier run left must not be merged with
            for value in (*block.arguments, *(v for operation in block.operations for v in operation.results)):
                frame.pop(value, None)
        waiting: dict[Block, Tensor] = {}

        def go(block: Block, values: Sequence[Any], mask: Tensor) -> None:
            if not bool(mask.any()):
                return
            already = waiting.get(block)
            for argument, value in zip(block.arguments, values, strict=True):
                frame[argument] = _choose(mask, value, frame[argument]) if argument in frame else value
            waiting[block] = mask if already is None else already | mask

        results: list[Any] | None = None
        go(region.blocks[0], arguments, lanes.mask())
        while waiting:
            block = next(block for block in region.blocks if block in waiting)
            mask = waiting.pop(block)
            values = self._block(block, lanes.only(mask), frame, mask)
            terminator = block.operations[-1]
            if terminator.name == "cf.br":
                go(terminator.successors[0], values, mask)
            elif terminator.name == "cf.cond_br":
                _, n_then, n_else = terminator.attributes["operandSegmentSizes"]
                condition = values[0]
                go(terminator.successors[0], values[1 : 1 + n_then], mask & condition)
                go(terminator.successors[1], values[1 + n_then : 1 + n_then + n_else], mask & ~condition)
            elif terminator.successors:
                raise unsupported(terminator, f"the operation {terminator.name}")
            else:
                results = values if results is None else _merge(mask, values, results)
        return results or []

    # Control flow

    def _call(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        return self.call(self._module.functions[operation.attributes["callee"]], operands, lanes)

    def _if(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        active = lanes.mask()
        yes = active & operands[0]
        no = active & ~yes
        branches = [
            self._region(region, (), lanes.only(mask), frame)
            for region, mask in zip(operation.regions, (yes, no), strict=True)
            if region.blocks and region.blocks[0].operations and bool(mask.any())
        ]
        if not branches or not operation.results:
            return []
        return branches[0] if len(branches) == 1 else _merge(yes, branches[0], branches[1])

    def _for(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        lower, upper, step, *carried = operands
        view = numerics.unsigned if operation.attributes.get("unsignedCmp") else numerics.signed
        low, distance, stride = view(lower), view(upper).to(torch.int64) - view(lower).to(torch.int64), view(step)
        trips = torch.where(stride > 0, -((-distance) // stride.clamp(min=1).to(torch.int64)), 0)
        trips = torch.where(lanes.mask(), trips, 0)
        running = lanes
        for trip in range(int(trips.max())):
            going = lanes.mask() & (trips > trip)
            running = lanes.only(going)
            index = numerics.shrink(low + stride * trip, lower.dtype)
            new = self._region(operation.regions[0], [index, *carried], running, frame)
            carried = new if bool((going == lanes.mask()).all()) else _merge(going, new, carried)
        return carried

    def _while(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        before, after = operation.regions
        mask, carried = lanes.mask(), operands
        results: list[Any] | None = None
        while True:
            condition, *values = self._region(before, carried, lanes.only(mask), frame)
            leaving, mask = mask & ~condition, mask & condition
            results = values if results is None else _merge(leaving, values, results)
            if not bool(mask.any()):
                return results
            carried = self._region(after, values, lanes.only(mask), frame)

    # Functions of single elements

    def _combine(self, operation: Operation, earlier: list[Tensor], later: list[Tensor], frame: Frame) -> list[Tensor]:
        """Apply the combine function of a reduction or scan to the elements of equal tensors, [count, lanes] each."""
        shape = earlier[0].shape
        flat = [x.reshape(-1) for x in (*earlier, *later)]
        found = self._region(operation.regions[0], flat, Lanes(None, len(flat[0])), frame)
        return [x.expand(len(flat[0])).reshape(shape) for x in found]

    def _reduce(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        """Combine neighbours, then neighbours of the results: any associative function, in order."""
        axis = operation.attributes["axis"] + 1
        moved = [x.movedim(axis, 0) for x in together(operation, operands)]
        values = [x.reshape(x.shape[0], -1) for x in moved]
        while (count := len(values[0])) > 1:
            even = count - count % 2
            new = self._combine(operation, [x[0:even:2] for x in values], [x[1:even:2] for x in values], frame)
            values = [torch.cat([x, y[even:]]) for x, y in zip(new, values, strict=True)] if count % 2 else new
        return [x[0].reshape(y.shape[1:]) for x, y in zip(values, moved, strict=True)]

    def _scan(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        """Combine each with what lies 1 before it, then 2, then 4: any associative function, in order."""
        axis = operation.attributes["axis"] + 1
        moved = [x.movedim(axis, 0) for x in together(operation, operands)]
        if operation.attributes.get("reverse"):
            moved = [x.flip(0) for x in moved]
        values = [x.reshape(x.shape[0], -1) for x in moved]
        step = 1
        while step < len(values[0]):
            new = self._combine(operation, [x[:-step] for x in values], [x[step:] for x in values], frame)
            values = [torch.cat([x[:step], y]) for x, y in zip(values, new, strict=True)]
            step *= 2
        shaped = [x.reshape(y.shape) for x, y in zip(values, moved, strict=True)]
        if operation.attributes.get("reverse"):
            shaped = [x.flip(0) for x in shaped]
        return [x.movedim(0, axis) for x in shaped]

    def _map(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> list[Any]:
        """``tl.map_elementwise``: lanes are elements, or groups of ``pack`` neighbours."""
        pack = operation.attributes.get("pack", 1)
        values = [x.expand(lanes.count, *x.shape[1:]) for x in together(operation, operands)]
        groups = [x.reshape(-1, pack) for x in values]
        inner = Lanes(None, len(groups[0]))
        if lanes.active is not None:
            inner = inner.only(lanes.active.repeat_interleave(inner.count // lanes.count))
        flat = [group[:, k] for group in groups for k in range(pack)]
        found = [x.expand(inner.count) for x in self._region(operation.regions[0], flat, inner, frame)]
        shape = values[0].shape
        return [torch.stack(found[k : k + pack], dim=1).reshape(shape) for k in range(0, len(found), pack)]

    # Programs

    def _program_id(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> Tensor:
        if lanes.programs is None:
            raise unsupported(operation, "a program id in a function of single elements")
        return lanes.programs[:, operation.attributes["axis"]]

    def _num_programs(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> Tensor:
        return torch.tensor([self._grid[operation.attributes["axis"]]], dtype=torch.int32, device=numerics.CPU)

    def _make_block_pointer(
        self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame
    ) -> BlockPointer:
        base, *rest = operands
        rank = len(rest) // 3
        shape, strides, offsets = (tuple(x.to(torch.int64) for x in rest[k * rank : (k + 1) * rank]) for k in range(3))
        return BlockPointer(base, shape, strides, offsets)

    def _assert(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> None:
        condition = operands[0] if operands[0].dtype == torch.bool else operands[0] != 0
        bad = ~condition & lanes.mask().reshape(-1, *[1] * (condition.dim() - 1))
        if not bool(bad.any()):
            return
        lane, *index = bad.nonzero()[0].tolist()
        where = f"program {lanes.program(lane)}" if lanes.programs is not None else "an element"
        if index:
            where += f", index {tuple(index)} of the tile"
        message = operation.attributes.get("message", "")
        raise KernelAssertionError(pointed(operation.location, f"assertion failed in {where}: {message}"))

    def _print(self, operation: Operation, operands: list[Any], lanes: Lanes, frame: Frame) -> None:
        """One line for each element, as on a GPU, where the order is another one."""
        prefix = operation.attributes.get("prefix", "")
        is_signed = operation.attributes.get("isSigned") or [1] * len(operands)
        wide = [
            broadcast(x, shape_of(value.type)).expand(lanes.count, *shape_of(value.type))
            for value, x in zip(operation.operands, operands, strict=True)
        ]
        for lane in lanes.mask().nonzero().reshape(-1).tolist():
            program = lanes.program(lane)
            if not operands:
                print(f"pid {program}{prefix}")
            for number, (value, x) in enumerate(zip(operation.operands, wide, strict=True)):
                element = element_of(value.type)
                text = _texts(x[lane].reshape(-1), element, bool(operation.attributes.get("hex")), is_signed[number])
                label = f"(operand {number}) " if len(operands) > 1 else ""
                for place, one in enumerate(text):
                    index = (
                        torch.unravel_index(torch.tensor(place, device=numerics.CPU), x.shape[1:])
                        if x.dim() > 1
                        else ()
                    )
                    print(f"pid {program} idx ({', '.join(str(int(i)) for i in index)}){prefix}{label}{one}")


def _texts(values: Tensor, element: Any, as_hex: bool, is_signed: Any) -> list[str]:
    """How ``tl.device_print`` shows numbers."""
    if as_hex:
        bits = element.bits
        raw = values if not values.dtype.is_floating_point else values.view(getattr(torch, f"int{bits}"))
        return [f"0x{int(v) & ((1 << bits) - 1):0{max(1, bits // 4)}x}" for v in raw.tolist()]
    if isinstance(element, Scalar) and element.is_float:
        return [f"{v:f}" for v in numerics.widen(values, element).tolist()]
    if isinstance(element, Scalar) and is_signed:
        return [str(int(v)) for v in values.tolist()]
    if isinstance(element, Scalar):
        return [str(int(v) & ((1 << element.bits) - 1)) for v in values.tolist()]
    return [f"0x{v & ((1 << 64) - 1):x}" for v in values.tolist()]
