"""The types of values in a kernel: scalars, pointers and tensors of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod


@dataclass(frozen=True)
class Scalar:
    """A number type, named as MLIR names it: ``i1``, ``i32``, ``f8E4M3FN``, ``bf16``, ``f32``."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Width in memory; a truth value takes one bit here and a byte in memory."""
        if self.name.startswith("f8"):
            return 8
        if self.name == "index":
            return 64
        return int(self.name.lstrip("bif"))

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return max(1, self.bits // 8)

    @property
    def is_int(self) -> bool:
        """Whether this is an integer, truth values included."""
        return self.name.startswith("i")

    @property
    def is_float(self) -> bool:
        """Whether this is a floating point type."""
        return not self.is_int

    @property
    def is_small_float(self) -> bool:
        """Whether arithmetic on this type is done in fp32 and rounded."""
        return self.is_float and self.bits < 32


@dataclass(frozen=True)
class Pointer:
    """An address of elements of ``pointee``."""

    pointee: Element | Tensor

    def __str__(self) -> str:
        return f"ptr<{self.pointee}>"

    @property
    def bits(self) -> int:
        """Width in memory."""
        return 64

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return 8

    is_int = False
    is_float = False
    is_small_float = False


Element = Scalar | Pointer


@dataclass(frozen=True)
class Tensor:
    """A tile of a known shape."""

    shape: tuple[int, ...]
    element: Element

    def __str__(self) -> str:
        return f"[{'x'.join(map(str, self.shape))}]{self.element}"

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Opaque:
    """A type that no operation here computes with, such as a tensor descriptor."""

    text: str

    def __str__(self) -> str:
        return self.text


Type = Scalar | Pointer | Tensor | Opaque

I1 = Scalar("i1")
I8 = Scalar("i8")
I16 = Scalar("i16")
I32 = Scalar("i32")
I64 = Scalar("i64")
F16 = Scalar("f16")
BF16 = Scalar("bf16")
F32 = Scalar("f32")
F64 = Scalar("f64")
F8E4M3 = Scalar("f8E4M3FN")
F8E5M2 = Scalar("f8E5M2")
SCALARS = {s.name: s for s in (I1, I8, I16, I32, I64, F16, BF16, F32, F64, F8E4M3, F8E5M2)} | {"index": Scalar("index")}


def element_of(type_: Type) -> Element:
    """The element type of a tensor, or the type itself."""
    if isinstance(type_, Tensor):
        return type_.element
    assert isinstance(type_, Scalar | Pointer), type_
    return type_


def shape_of(type_: Type) -> tuple[int, ...]:
    """The shape of a tensor, ``()`` for a scalar."""
    return type_.shape if isinstance(type_, Tensor) else ()


@lru_cache(maxsize=4096)
def parse_type(text: str) -> Type:
    """Read a type as MLIR prints it. What is not known comes back as :class:`Opaque`."""
    text = text.strip()
    if text in SCALARS:
        return SCALARS[text]
    if text.startswith("!tt.ptr<") and text.endswith(">"):
        inner = text[len("!tt.ptr<") : -1]
        pointee = parse_type(inner.split(",")[0] if "tensor" not in inner else inner)
        if isinstance(pointee, Opaque):
            return Opaque(text)
        return Pointer(pointee)
    if text.startswith("tensor<") and text.endswith(">"):
        dims: list[int] = []
        rest = text[len("tensor<") : -1]
        while rest and rest[0].isdigit():
            size, _, rest = rest.partition("x")
            dims.append(int(size))
        element = parse_type(rest)
        if isinstance(element, Scalar | Pointer):
            return Tensor(tuple(dims), element)
    return Opaque(text)
