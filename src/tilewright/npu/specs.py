"""Tensors as text, for the command line: ``f32[2, 6, 8, 1, 1024, 128]``, ``i32[1, 4]``, ``f32[]``."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

import torch

from tilewright.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPEC = re.compile(r"(?P<dtype>[a-z]+\d+)\[(?P<sizes>[\d\s,]*)\]")
_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
}  # fmt: skip
_ALIASES = {"fp": "f", "float": "f", "bfloat": "bf", "int": "i"}


def parse_arguments(names: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """A kernel's arguments, from texts.

    Args:
        names: the kernel's parameters in their order.
        texts: each ``NAME=VALUE``, or ``VALUE`` for the next parameter from the first one on. A value is a tensor or
            a number.

    Returns:
        Tensors without values, and numbers, by name.

    Raises:
        ArgumentError: a text cannot be understood, there is no such parameter, or it is given twice.
    """
    found: dict[str, Any] = {}
    for position, text in enumerate(texts):
        name, equals, value = text.partition("=")
        if not equals:
            if position >= len(names):
                raise ArgumentError(
                    "npu compile", "args", f"{text!r} is one too many; the kernel takes {', '.join(names)}"
                )
            name, value = names[position], text
        name = name.strip()
        if name not in names or name in found:
            what = (
                "is given twice" if name in found else f"is no parameter of the kernel, which takes {', '.join(names)}"
            )
            raise ArgumentError("npu compile", "args", f"'{name}' {what}")
        found[name] = parse_argument(value.strip())
    return found


def parse_argument(text: str) -> Any:
    """A tensor without values, a number, or a string in quotes.

    Raises:
        ArgumentError: it is none of them.

    Example:
        >>> parse_argument("f32[1, 64]").shape
        torch.Size([1, 64])
        >>> parse_argument("128")
        128
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None
        if not isinstance(value, int | float | str | tuple):
            expected = "a tensor such as 'f32[1,64]', or a number"
            raise ArgumentError("npu compile", "args", f"got {text!r}, expected {expected}")
        return value
    name = re.sub(r"^(bfloat|float|fp|int)", lambda found: _ALIASES[found.group()], match["dtype"])
    if name not in _DTYPES:
        raise ArgumentError(
            "npu compile", "args", f"got dtype {match['dtype']!r}, expected one of {', '.join(_DTYPES)}"
        )
    try:
        sizes = [int(each) for each in match["sizes"].split(",") if each.strip()]
        return torch.empty(sizes, dtype=_DTYPES[name], device="meta")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArgumentError("npu compile", "args", f"got {text!r}: {str(error).splitlines()[0]}") from error
