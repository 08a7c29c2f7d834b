"""Memory as the interpreter of the CPU target sees it: access by address, atomics, and checks before they happen."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tilewright.cpu import interpreter_numerics as numerics
from tilewright.cpu.diagnostics import pointed, unsupported
from tilewright.cpu.types import Element, Pointer, element_of, shape_of
from tilewright.cpu.types import Tensor as Tile
from tilewright.errors import KernelAccessError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tilewright.cpu.ttir import Operation

# All memory is one array, which costs nothing until it is touched. It does not begin at 0, where no pointer is valid.
_BASE = 1 << 12
_END = 1 << 56


@cache
def _memory(dtype: torch.dtype) -> Tensor:
    array = (ctypes.c_uint8 * (_END - _BASE)).from_address(_BASE)
    return torch.frombuffer(array, dtype=torch.uint8).view(dtype)


def _stored_dtype(element: Element) -> torch.dtype:
    return torch.uint8 if element.bits == 1 else numerics.held_dtype(element)


def read(addresses: Tensor, element: Element) -> Tensor:
    """The elements at a vector of addresses."""
    dtype = _stored_dtype(element)
    offsets = addresses - _BASE
    if ((offsets & (dtype.itemsize - 1)) != 0).any():
        spread = offsets[:, None] + torch.arange(dtype.itemsize, device=numerics.CPU)
        found = _memory(torch.uint8).index_select(0, spread.reshape(-1)).view(dtype)
    else:
        found = _memory(dtype).index_select(0, offsets >> (dtype.itemsize.bit_length() - 1))
    return found != 0 if element.bits == 1 else found


def write(addresses: Tensor, values: Tensor, element: Element) -> None:
    """Set the elements at a vector of addresses."""
    dtype = _stored_dtype(element)
    offsets, values = addresses - _BASE, values.to(dtype).contiguous()
    if ((offsets & (dtype.itemsize - 1)) != 0).any():
        spread = offsets[:, None] + torch.arange(dtype.itemsize, device=numerics.CPU)
        _memory(torch.uint8).index_copy_(0, spread.reshape(-1), values.view(torch.uint8))
    else:
        _memory(dtype).index_copy_(0, offsets >> (dtype.itemsize.bit_length() - 1), values)


@dataclass(frozen=True)
class Lanes:
    """The programs that run in lock-step.

    Attributes:
        programs: the ids of each, [count, 3]; None where a lane is not a program but an element that is combined.
        count: how many there are.
        active: which of them take part, [count]; None for all. At least one does.
    """

    programs: Tensor | None
    count: int
    active: Tensor | None = None

    def only(self, active: Tensor) -> Lanes:
        """The same lanes, of which only these take part."""
        return replace(self, active=None if bool(active.all()) else active)

    def mask(self) -> Tensor:
        """Which lanes take part, [count]."""
        return torch.ones(self.count, dtype=torch.bool, device=numerics.CPU) if self.active is None else self.active

    def first(self) -> int:
        """The first lane that takes part."""
        return 0 if self.active is None else int(self.active.to(torch.uint8).argmax())

    def program(self, lane: int) -> tuple[int, ...]:
        """The ids of a lane's program."""
        return tuple(self.programs[lane].tolist()) if self.programs is not None else ()


@dataclass(frozen=True)
class Access:
    """A load, store or atomic of a tile, about to happen.

    Attributes:
        operation: the operation.
        addresses: byte addresses, [lanes, *tile]. An axis of size 1 may stand for a longer one with equal addresses.
        size: bytes at each address.
        mask: which of them are accessed, as ``addresses``; None for all.
        lanes: the programs; one lane stands for all where the addresses do not depend on the program.
    """

    operation: Operation
    addresses: Tensor
    size: int
    mask: Tensor | None
    lanes: Lanes


class AccessCheck(Protocol):
    """Called before memory is touched; raises to prevent it."""

    def __call__(self, access: Access) -> None:
        """Judge an access."""


class StorageCheck:
    """Allows accesses that lie within one of some ranges of memory, such as the storages of the arguments.

    Args:
        ranges: first address and size in bytes of each.
        describe: says where an address lies; by default in bytes, relative to the nearest range.
    """

    def __init__(self, ranges: list[tuple[int, int]], describe: Callable[[int], str] | None = None) -> None:
        self._describe = describe or self._nearest
        merged: list[list[int]] = []
        for start, size in sorted(ranges):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self._starts = torch.tensor([start for start, _ in merged], dtype=torch.int64, device=numerics.CPU)
        self._ends = torch.tensor([end for _, end in merged], dtype=torch.int64, device=numerics.CPU)

    def __call__(self, access: Access) -> None:
        """Judge an access.

        Raises:
            KernelAccessError: some of it lies outside; the message names the first.
        """
        bad = ~self._inside(access.addresses.contiguous(), access.size)
        if access.mask is not None:
            bad = bad & access.mask
        if not bool(bad.any()):
            return
        place = int(bad.reshape(-1).to(torch.uint8).argmax())
        lane, *index = torch.unravel_index(torch.tensor(place, device=numerics.CPU), bad.shape)
        kind = {"tt.load": "load", "tt.store": "store"}.get(access.operation.name, "atomic")
        program = access.lanes.program(int(lane) if bad.shape[0] > 1 else access.lanes.first())
        where = f"program {program}" + (f", index {tuple(map(int, index))} of the tile" if index else "")
        address = int(access.addresses.reshape(-1)[place])
        message = (
            f"{kind} of {access.size} bytes outside of the kernel's tensors, by {where}: {self._describe(address)}"
        )
        raise KernelAccessError(pointed(access.operation.location, message))

    def _inside(self, addresses: Tensor, size: int) -> Tensor:
        if not len(self._starts):
            return torch.zeros_like(addresses, dtype=torch.bool)
        at = torch.searchsorted(self._starts, addresses, right=True) - 1
        return (at >= 0) & (addresses + size <= self._ends[at.clamp(min=0)])

    def _nearest(self, address: int) -> str:
        """Where an address lies relative to the range nearest to it."""
        pairs = list(zip(self._starts.tolist(), self._ends.tolist(), strict=True))
        if not pairs:
            return "they have no memory"
        start, end = min(pairs, key=lambda pair: max(pair[0] - address, address - pair[1]))
        if address < start:
            return f"{start - address} bytes before one of {end - start} bytes"
        return f"at byte {address - start} of one of {end - start} bytes"


@dataclass(frozen=True)
class BlockPointer:
    """A pointer to a tile of a tensor in memory, as ``tt.make_tensor_ptr`` makes it.

    Attributes:
        base: address of the tensor, [programs].
        shape: its sizes, each [programs].
        strides: its strides in elements, likewise.
        offsets: where in it the tile begins, likewise.
    """

    base: Tensor
    shape: tuple[Tensor, ...]
    strides: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]

    def parts(self) -> list[Tensor]:
        """All that it is made of."""
        return [self.base, *self.shape, *self.strides, *self.offsets]

    def of(self, parts: Sequence[Tensor]) -> BlockPointer:
        """One of the same rank with other parts."""
        rank = len(self.shape)
        base, rest = parts[0], tuple(parts[1:])
        return BlockPointer(base, rest[:rank], rest[rank : 2 * rank], rest[2 * rank :])

    def advance(self, by: Sequence[Tensor]) -> BlockPointer:
        """Move the tile."""
        return replace(self, offsets=tuple(o + d.to(torch.int64) for o, d in zip(self.offsets, by, strict=True)))

    def addresses(self, tile: Tile, checked: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The addresses of the tile's elements, and which lie inside the tensor along the checked axes."""
        rank = len(tile.shape)
        column = (-1, *[1] * rank)
        address, inside = self.base.reshape(column), None
        for axis, size in enumerate(tile.shape):
            steps = torch.arange(size, device=numerics.CPU).reshape([1, *(-1 if k == axis else 1 for k in range(rank))])
            index = self.offsets[axis].reshape(column) + steps
            address = address + index * self.strides[axis].reshape(column) * tile.element.bytes
            if axis in checked:
                good = (index >= 0) & (index < self.shape[axis].reshape(column))
                inside = good if inside is None else inside & good
        return address, inside


def _common(*values: Tensor | None) -> tuple[int, ...]:
    """The shape that values broadcast to."""
    return tuple(map(max, zip(*(value.shape for value in values if value is not None), strict=True)))


def _present(operation: Operation, operands: Sequence[Any]) -> list[Any]:
    """The operands with None for the optional ones that are missing."""
    sizes = operation.attributes.get("operandSegmentSizes")
    if sizes is None:
        return [*operands, None, None]
    rest = list(operands)
    return [rest.pop(0) if size else None for size in sizes]


def _resolved(operation: Operation, pointer: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Addresses and mask of an access through a pointer of either kind."""
    if not isinstance(pointer, BlockPointer):
        return pointer, mask
    type_ = operation.operands[0].type
    assert isinstance(type_, Pointer)
    assert isinstance(type_.pointee, Tile)
    return pointer.addresses(type_.pointee, operation.attributes.get("boundaryCheck", []))


def _pointee(operation: Operation) -> Element:
    pointer = element_of(operation.operands[0].type)
    assert isinstance(pointer, Pointer)
    return element_of(pointer.pointee)


class Memory:
    """The operations of a kernel that touch memory."""

    def __init__(self, check: AccessCheck | None) -> None:
        self._check = check

    def _judge(self, operation: Operation, addresses: Tensor, mask: Tensor | None, lanes: Lanes) -> None:
        if self._check is not None:
            shape = addresses.shape if mask is None else _common(addresses, mask)
            wide = None if mask is None else mask.expand(shape)
            self._check(Access(operation, addresses.expand(shape), _pointee(operation).bytes, wide, lanes))

    @staticmethod
    def _of_active(mask: Tensor | None, lanes: Lanes, shape: Sequence[int]) -> Tensor | None:
        """A mask without the lanes that take no part. What all programs share, those that take part do."""
        if lanes.active is None or shape[0] == 1:
            return mask
        active = lanes.active.reshape(-1, *[1] * (len(shape) - 1))
        return active if mask is None else mask & active

    def load(self, operation: Operation, operands: Sequence[Any], lanes: Lanes) -> Tensor:
        """``tt.load``: masked elements are ``other``, or zero."""
        pointer, mask, other = _present(operation, operands)[:3]
        element = _pointee(operation)
        addresses, mask = _resolved(operation, pointer, mask)
        if isinstance(pointer, BlockPointer) and operation.attributes.get("padding") == 2:
            other = numerics.constant(float("nan"), element).reshape([1] * addresses.dim())
        shape = _common(addresses, mask, other)
        mask = self._of_active(mask, lanes, shape)
        self._judge(operation, addresses, mask, lanes)
        if mask is None:
            return read(addresses.reshape(-1), element).reshape(addresses.shape)
        flat, wanted = addresses.expand(shape).reshape(-1), mask.expand(shape).reshape(-1)
        if other is None:
            filling = torch.zeros(1, dtype=numerics.held_dtype(element), device=numerics.CPU)
        else:
            filling = other.expand(shape).reshape(-1)
        if not bool(wanted.any()):
            return filling.expand(flat.shape).reshape(shape)
        # What is not wanted is read where something wanted lies, because its own address may be anything.
        safe = torch.where(wanted, flat, flat[wanted.to(torch.uint8).argmax()])
        return torch.where(wanted, read(safe, element), filling).reshape(shape)

    def store(self, operation: Operation, operands: Sequence[Any], lanes: Lanes) -> None:
        """``tt.store``."""
        pointer, value, mask = [*operands, None][:3]
        addresses, mask = _resolved(operation, pointer, mask)
        shape = _common(addresses, value, mask)
        mask = self._of_active(mask, lanes, shape)
        self._judge(operation, addresses, mask, lanes)
        flat, values = addresses.expand(shape).reshape(-1), value.expand(shape).reshape(-1)
        if mask is not None and not bool(mask.all()):
            wanted = mask.expand(shape).reshape(-1).nonzero().reshape(-1)
            flat, values = flat.index_select(0, wanted), values.index_select(0, wanted)
        if flat.numel():
            write(flat, values, _pointee(operation))

    def atomic(self, operation: Operation, operands: Sequence[Any], lanes: Lanes) -> Tensor:
        """``tt.atomic_rmw`` and ``tt.atomic_cas``: one after the other, by program and then by place in the tile."""
        compare_and_swap = operation.name == "tt.atomic_cas"
        shape = (lanes.count, *shape_of(operation.result.type))
        element = _pointee(operation)
        addresses = operands[0].expand(shape)
        mask = lanes.mask().reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        if not compare_and_swap and len(operands) == 3:
            mask = mask & operands[2]
        self._judge(operation, addresses, mask, lanes)
        wanted = mask.reshape(-1).nonzero().reshape(-1)
        flat, *values = (x.expand(shape).reshape(-1).index_select(0, wanted) for x in (addresses, *operands[1:3]))
        if compare_and_swap:
            expected, desired = values
            old = _in_turn(flat, element, lambda found, at: torch.where(found == expected[at], desired[at], found))
        else:
            old = self._read_modify_write(operation, flat, values[0], element)
        result = torch.zeros(mask.numel(), dtype=old.dtype, device=numerics.CPU)
        return result.index_copy_(0, wanted, old).reshape(shape)

    @staticmethod
    def _read_modify_write(operation: Operation, addresses: Tensor, values: Tensor, element: Element) -> Tensor:
        number = operation.attributes["atomic_rmw_op"]
        if number == 5:  # the order of a floating point sum matters
            wide = numerics.widen(values, element)
            return _in_turn(
                addresses,
                element,
                lambda found, at: numerics.narrow(numerics.widen(found, element) + wide[at], element),
            )
        if number not in _COMBINE:
            raise unsupported(operation, f"the atomic operation number {number}")
        return _at_once(addresses, values, element, _COMBINE[number])


def _unsigned_pick(a: Tensor, b: Tensor, *, less: bool) -> Tensor:
    return torch.where(numerics.unsigned_less(a, b) == less, a, b)


_COMBINE: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    1: torch.bitwise_and,
    2: torch.bitwise_or,
    3: torch.bitwise_xor,
    4: torch.add,
    6: torch.maximum,
    7: torch.minimum,
    8: lambda a, b: _unsigned_pick(a, b, less=False),
    9: lambda a, b: _unsigned_pick(a, b, less=True),
    10: lambda a, b: b,
}
"""What memory becomes, by Triton's number: and, or, xor, add, max, min, umax, umin, xchg. All are associative."""


def _ranks(addresses: Tensor) -> tuple[Tensor, Tensor]:
    """An order that brings equal addresses together, and each one's rank among its equals, in that order."""
    ordered, order = torch.sort(addresses, stable=True)
    places = torch.arange(len(ordered), device=numerics.CPU)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    return order, places - torch.where(begins, places, 0).cummax(0).values


def _at_once(
    addresses: Tensor, values: Tensor, element: Element, combine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Combine memory with values and return what each found, as if in turn. ``combine`` is associative."""
    found = read(addresses, element)
    if not len(addresses):
        return found
    order, rank = _ranks(addresses)
    if not rank.any():
        write(addresses, combine(found, values), element)
        return found
    addresses, found, running = addresses[order], found[order], values[order]
    step = 1
    while step <= int(rank.max()):  # a scan among equal addresses
        reached = combine(running[:-step], running[step:])
        running = torch.cat([running[:step], torch.where(rank[step:] >= step, reached, running[step:])])
        step *= 2
    after = combine(found, running)
    last = torch.ones_like(rank, dtype=torch.bool)
    last[:-1] = rank[1:] == 0
    write(addresses[last], after[last], element)
    before = torch.where(rank == 0, found, after.roll(1))
    return torch.empty_like(before).index_copy_(0, order, before)


def _in_turn(addresses: Tensor, element: Element, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Replace ``found`` by ``change(found, places)`` one after the other; at once only where addresses differ."""
    order, rank = _ranks(addresses)
    old = torch.zeros(len(addresses), dtype=numerics.held_dtype(element), device=numerics.CPU)
    if not len(addresses):
        return old
    by_rank = order[torch.sort(rank, stable=True).indices]
    start = 0
    for count in torch.bincount(rank).tolist():
        places = by_rank[start : start + count]
        start += count
        found = read(addresses[places], element)
        write(addresses[places], change(found, places), element)
        old[places] = found
    return old
