"""What names stand for while a kernel is interpreted, besides Python's numbers, tuples and strings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tilewright.npu.language import float32, int1
from tilewright.npu.language.core import block_type, dtype, pointer_type

if TYPE_CHECKING:
    import ast

    from tilewright.npu.module import KernelModule
    from tilewright.npu.shapes import Shape
    from tilewright.npu.symbols import Size


class _Sentinel:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


UNKNOWN: Final = _Sentinel("UNKNOWN")
"""Nothing is known of this value: what makes it was reported, or cannot be seen. Whatever uses it is unknown too."""

UNDECIDED: Final = _Sentinel("UNDECIDED")
"""A truth that depends on sizes that have no values."""


FLOAT: Final = _Sentinel("FLOAT")
"""A number with a fraction that is made of sizes without values, such as ``1.0 / N``."""

DYN_IF_HINT: Final = "if rblib.partition_skip(index) == False:"
"""The only ``if`` that a device takes."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a kernel is compiled for.

    Attributes:
        shape: its sizes.
        dtype: of its elements.
        contiguous: whether its elements lie in row-major order without gaps.
    """

    shape: tuple[int, ...]
    dtype: dtype
    contiguous: bool = True


@dataclass(eq=False)
class Argument:
    """A parameter of the kernel that is a tensor in memory.

    Attributes:
        name: the parameter's.
        spec: what is known of the tensor; None while sizes are symbols.
        node: the parameter.
        value: the function's argument in the program that is built.
        uses: what the kernel does with it: ``"load"``, ``"store"``, ``"index"``, ``"scalar"``.
        seen_shape: the shape that the kernel's block pointers give it.
    """

    name: str
    spec: TensorSpec | None
    node: ast.arg
    value: Any = None
    uses: set[str] = field(default_factory=set)
    seen_shape: Shape | None = None

    @property
    def element(self) -> dtype:
        """The dtype of its elements, as far as the language is concerned."""
        return self.spec.dtype if self.spec else float32

    @property
    def type(self) -> pointer_type:
        """A pointer to elements."""
        return pointer_type(self.element)

    dtype = type


@dataclass(eq=False)
class Origin:
    """Where a tensor comes from: the rules look at what made an operand.

    Attributes:
        name: the operation, such as ``"transpose"``.
        node: where it stands.
        operands: its tensors.
    """

    name: str
    node: ast.AST
    operands: tuple[Tensor, ...] = ()


@dataclass(eq=False)
class Tensor:
    """A tensor in registers.

    Attributes:
        shape: its sizes.
        dtype: of its elements: float32, or int1 for a comparison.
        origin: what made it.
        value: the value in the program that is built.
        guessed: whether its shape is only what it is most likely, as something that it is made of is not known.
    """

    shape: Shape
    dtype: dtype
    origin: Origin
    value: Any = None
    guessed: bool = False

    @property
    def type(self) -> block_type:
        """Its type."""
        return block_type(self.dtype, self.shape)

    @property
    def is_condition(self) -> bool:
        """Whether it is the result of a comparison."""
        return self.dtype == int1


def guess(origin: Origin, shape: Shape, dtype: dtype = float32) -> Tensor:
    """A tensor that is not built, and that has this shape most likely."""
    return Tensor(shape, dtype, origin, None, guessed=True)


@dataclass(eq=False)
class Block:
    """A block pointer.

    Attributes:
        base: the tensor in memory.
        shape: that tensor's shape as the kernel says.
        strides: its strides as the kernel says.
        offsets: where the block begins: sizes, or indices that were read.
        sizes: the block's.
        order: a permutation without effect.
        node: where the pointer was made, or advanced.
        made: where the pointer was made that it comes from.
    """

    base: Argument
    shape: Shape
    strides: Shape
    offsets: tuple[Size | Index, ...]
    sizes: Shape
    order: tuple[Any, ...]
    node: ast.AST
    made: ast.AST

    @property
    def type(self) -> pointer_type:
        """A pointer to a block: ``type.element_ty.shape`` are its sizes."""
        return pointer_type(block_type(self.base.element, self.sizes))

    dtype = type


@dataclass(frozen=True)
class Memory:
    """A block of a tensor in memory, in the program that is built.

    Attributes:
        value: the value there.
    """

    value: Any


@dataclass(eq=False)
class Index:
    """An integer that was read from a table.

    Attributes:
        block: the block of one element that it was read from.
        maximum: the largest value it can have; -1 if that is not known.
        value: the value in the program that is built.
        root: the index that this one is the sum of, with a constexpr; None for what was read itself.
        rows: the size of the axis that it counts rows of, once it has been used so.
    """

    block: Block
    maximum: Size
    value: Any = None
    root: Index | None = None
    rows: Size | None = None

    @property
    def source(self) -> Index:
        """What was read."""
        return self.root or self


@dataclass(eq=False)
class Flag:
    """Whether a partition is skipped, or whether it is not.

    Attributes:
        value: the value in the program that is built.
        negated: whether this is ``partition_skip(index) == False``.
        compared: whether it was compared with a constant, as the compiler wants it.
    """

    value: Any
    negated: bool = False
    compared: bool = False


@dataclass(frozen=True)
class Runtime:
    """A truth that only the device could know, and that nothing can be decided by."""

    what: str


@dataclass(frozen=True)
class Undefined:
    """A name that has a value on some paths only."""

    why: str


@dataclass(frozen=True)
class Foreign:
    """Something of another library, by its full name."""

    dotted: str


@dataclass(frozen=True)
class Method:
    """A function of the language, called as a tensor's method."""

    receiver: Any
    name: str


@dataclass(frozen=True)
class Function:
    """Another function under ``@triton.jit``, which is inlined where it is called.

    Attributes:
        module: where it stands.
        node: its definition.
        scope: what its module's names stand for.
    """

    module: KernelModule
    node: ast.FunctionDef
    scope: Any


class Return(Exception):
    """A kernel's ``return``, on its way out of the statements that it stands in.

    Attributes:
        node: the statement.
        value: what is returned.
    """

    def __init__(self, node: ast.Return, value: Any) -> None:
        self.node = node
        self.value = value
