"""The shape of every operation's result. The front end asks with symbols or numbers, the dialect's verifier again."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from tilewright.npu.symbols import Size, equal, less, product

if TYPE_CHECKING:
    from collections.abc import Sequence

Shape: TypeAlias = tuple[Size, ...]


class ShapeError(ValueError):
    """Shapes do not fit together. Inside the tool chain; callers see a diagnostic or a :class:`NpuProgramError`."""


def text(shape: Sequence[Size]) -> str:
    """A shape for people: ``(1, H, 64)``."""
    return f"({', '.join(str(size) for size in shape)}{',' * (len(shape) == 1)})"


def differ(a: Shape, b: Shape) -> bool:
    """Whether two shapes cannot be the same, whatever their sizes are."""
    return len(a) != len(b) or any(equal(x, y) is False for x, y in zip(a, b, strict=True))


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an elementwise operation: dimensions of size 1, and missing ones in front, stretch."""
    rank = max(len(a), len(b))
    left, right = ((1,) * (rank - len(each)) + each for each in (a, b))
    result: list[Size] = []
    for x, y in zip(left, right, strict=True):
        if equal(x, 1):
            result.append(y)
        elif equal(y, 1) or equal(x, y) is not False:
            result.append(x)
        else:
            raise ShapeError(f"shapes {text(a)} and {text(b)} do not broadcast: {x} against {y}")
    return tuple(result)


def broadcast_to(a: Shape, shape: Shape) -> Shape:
    """The shape asked for, if ``a`` stretches to it."""
    if len(a) > len(shape):
        raise ShapeError(f"{text(a)} has more dimensions than {text(shape)}")
    for x, y in zip(reversed(a), reversed(shape), strict=False):
        if not equal(x, 1) and equal(x, y) is False:
            wanted = "1" if y == 1 else f"1 or {y}"
            raise ShapeError(f"{text(a)} cannot be repeated to {text(shape)}: {x} is not {wanted}")
    return shape


def reshape(a: Shape, shape: Shape) -> Shape:
    """The shape asked for, if it has as many elements; one ``-1`` in it is what is left."""
    if shape.count(-1) > 1 or any(isinstance(size, int) and size < 1 and size != -1 for size in shape):
        raise ShapeError(f"{text(a)} cannot be reshaped to {text(shape)}: one size can be -1, the others are 1 or more")
    if shape.count(-1) == 1:
        at = shape.index(-1)
        rest = product(shape[:at] + shape[at + 1 :])
        if equal(product(a) % rest, 0) is False:
            raise ShapeError(f"{text(a)} cannot be reshaped to {text(shape)}: {rest} does not divide its elements")
        shape = (*shape[:at], product(a) // rest, *shape[at + 1 :])
    if equal(product(a), product(shape)) is False:
        message = f"{text(a)} has {product(a)} elements, {text(shape)} has {product(shape)}"
        raise ShapeError(message)
    return shape


def axis(number: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= number < rank:
        raise ShapeError(f"axis {number} of a tensor with {rank} dimensions")
    return number % rank


def permute(a: Shape, dims: Sequence[int]) -> Shape:
    """The sizes in another order."""
    order = [axis(dim, len(a)) for dim in dims]
    if sorted(order) != list(range(len(a))):
        raise ShapeError(f"{tuple(dims)} is no order of the {len(a)} dimensions of {text(a)}")
    return tuple(a[dim] for dim in order)


def reduce(a: Shape, at: int, keep_dims: bool = True) -> Shape:
    """The sizes with that of one axis 1, or gone."""
    at = axis(at, len(a))
    return (*a[:at], *((1,) if keep_dims else ()), *a[at + 1 :])


def matmul(a: Shape, b: Shape) -> Shape:
    """The product of matrices in the last two dimensions."""
    if len(a) != len(b) or len(a) < 2:
        raise ShapeError(f"operands have shapes {text(a)} and {text(b)}; both need the same rank, 2 at least")
    for x, y in zip(a[:-2], b[:-2], strict=True):
        if equal(x, y) is False:
            raise ShapeError(f"batch dimensions of {text(a)} and {text(b)} differ: {x} and {y}")
    if equal(a[-1], b[-2]) is False:
        raise ShapeError(f"inner dimensions of {text(a)} and {text(b)} differ: {a[-1]} and {b[-2]}")
    return (*a[:-1], b[-1])


def insert(data: Shape, updates: Shape, at: int) -> Shape:
    """The shape of ``data``, if ``updates`` has it too but for one axis, where it is not longer."""
    at = axis(at, len(data))
    _same_but(data, updates, at)
    if less(data[at], updates[at]):
        raise ShapeError(f"{text(updates)} has more rows along axis {at} than {text(data)}")
    return data


def window_insert(base: Shape, state: Shape, at: int) -> Shape:
    """The shape with both lengths of one axis added up."""
    at = axis(at, len(base))
    _same_but(base, state, at)
    return (*base[:at], base[at] + state[at], *base[at + 1 :])


def with_size(a: Shape, at: int, size: Size) -> Shape:
    """The shape with another size of one axis."""
    at = axis(at, len(a))
    return (*a[:at], size, *a[at + 1 :])


def pad(a: Shape, at: int, low: Size, high: Size) -> Shape:
    """The shape with more entries before and behind those of one axis."""
    at = axis(at, len(a))
    return (*a[:at], a[at] + low + high, *a[at + 1 :])


def _same_but(a: Shape, b: Shape, at: int) -> None:
    if len(a) != len(b):
        raise ShapeError(f"{text(a)} and {text(b)} have different ranks")
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if index != at and equal(x, y) is False:
            raise ShapeError(f"{text(a)} and {text(b)} differ in dimension {index}, not only along axis {at}")
