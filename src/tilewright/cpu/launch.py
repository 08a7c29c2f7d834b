"""Launching a kernel on tensors: arguments, and whether their memory overlaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tilewright.cpu.kernel import Kernel


class Launcher:
    """What Triton calls to launch one compiled kernel.

    Args:
        src: Triton's record of the kernel's source; its ``signature`` says what the arguments are.
        metadata: Triton's record of the compilation.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature = tuple(src.signature.values())
        self.plain = [k for k, kind in enumerate(self.signature) if kind != "constexpr"]
        self.nested = any(not isinstance(kind, str) or kind.startswith("tensordesc") for kind in self.signature)

    def __call__(
        self, grid_0: int, grid_1: int, grid_2: int, stream: Any, kernel: Kernel, packed: Any, launch_metadata: Any,
        enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        """Launch. ``args`` are all of the kernel's arguments, constants too."""
        if enter_hook is not None:
            enter_hook(launch_metadata)
        given = list(self._flat(args, kernel)) if self.nested else [args[k] for k in self.plain]
        launch(kernel, (grid_0, grid_1, grid_2), given)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _flat(self, args: Sequence[Any], kernel: Kernel) -> Iterator[Any]:
        """The arguments as the native code takes them: tuples taken apart, descriptors expanded."""
        descriptors = [k for k, kind in enumerate(self.signature) if _is_descriptor(kind)]
        flags = 0
        if descriptors:
            others = sum(
                1 for k, kind in enumerate(self.signature) if k not in descriptors for _ in _leaves(kind, args[k])
            )
            fixed = sum(1 + 4 * len(args[k].shape) for k in descriptors)
            # Versions of Triton differ in how many flags follow a descriptor's sizes.
            flags = (len(kernel.types) - others - fixed) // len(descriptors)
        for kind, arg in zip(self.signature, args, strict=True):
            if _is_descriptor(kind):
                known = [getattr(arg, "padding", "zero") == "nan", getattr(arg, "round_f32_to_tf32", False)]
                yield from (arg.base, *arg.shape, *arg.strides, *known[:flags], *arg.shape, *arg.strides)
            else:
                yield from _leaves(kind, arg)


def _is_descriptor(kind: Any) -> bool:
    return isinstance(kind, str) and kind.startswith("tensordesc")


def _leaves(kind: Any, arg: Any) -> Iterator[Any]:
    """The arguments within a tuple, without the constants."""
    if isinstance(kind, tuple | list):
        for inner, value in zip(kind, arg, strict=True):
            yield from _leaves(inner, value)
    elif kind != "constexpr":
        yield arg


def launch(kernel: Kernel, grid: tuple[int, int, int], given: Sequence[Any]) -> None:
    """Run a kernel on tensors (or addresses) and numbers."""
    values = list(given)
    for k in kernel.pointers:
        pointer = values[k]
        if not isinstance(pointer, int):
            values[k] = 0 if pointer is None else pointer.data_ptr()
    overlapping = False
    for written, others in kernel.may_overlap:
        for other in others:
            if _overlap(given[written], given[other]):
                overlapping = True
    ranges = [_range(given[k]) for k in kernel.pointers] if kernel.checked else ()
    kernel.run(grid, values, overlapping, ranges)


def _overlap(a: Any, b: Any) -> bool:
    """Whether two arguments' memory may overlap: a kernel may reach all of a tensor's storage, whatever its shape says.

    Of plain addresses nothing is known.
    """
    if a is None or b is None:
        return False
    try:
        return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
    except (AttributeError, RuntimeError):
        return True


def _range(x: Any) -> tuple[int, int]:
    """The memory that an argument may reach: its tensor's storage. Of a plain address nothing is known."""
    if x is None:
        return (0, 0)
    if isinstance(x, int):
        return (0, (1 << 63) - 1)
    storage = x.untyped_storage()
    start = storage.data_ptr()
    return start, start + storage.nbytes()
