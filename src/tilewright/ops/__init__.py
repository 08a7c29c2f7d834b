"""WHAT is computed: the operation families, one folder each with the same files in it.

Nothing of a family is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilewright.errors import UnknownNameError

if TYPE_CHECKING:
    from tilewright.dispatch import Explanation, Operation
    from tilewright.ops.contract import Family

FAMILIES = ("rope", "rms_norm", "qk_norm_rope", "quant_fp8", "mhc")
"""The folders, in the order of the documentation."""


def family(name: str) -> Family:
    """The contract of a family.

    Raises:
        UnknownNameError: there is no such family.
    """
    if name not in FAMILIES:
        raise UnknownNameError(f"no operation family is called '{name}'; there are: {', '.join(FAMILIES)}")
    found: Family = import_module(f"tilewright.ops.{name}.spec").FAMILY
    return found


def families() -> tuple[Family, ...]:
    """Every family."""
    return tuple(family(name) for name in FAMILIES)


def operation(function: str) -> Operation:
    """The operation behind a public function.

    Raises:
        UnknownNameError: there is no such function, or it has no implementations to choose from.
    """
    for name in FAMILIES:
        operations: dict[str, Operation] = import_module(f"tilewright.ops.{name}.api").OPERATIONS
        if function in operations:
            return operations[function]
    known = ", ".join(name for member in families() for name in member.functions)
    raise UnknownNameError(f"no operation is called '{function}'; there are: {known}")


def explain(function: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation serves a call, which do not, and why.

    Args:
        function: the public function's name, such as ``"rope"``.
        *args: the call's arguments.
        **kwargs: the call's keyword arguments.

    Returns:
        A record that prints itself, with attributes to assert on. The call is not made.

    Raises:
        UnknownNameError: there is no such function.
        ArgumentError: the call itself is invalid.

    Example:
        >>> import torch, tilewright
        >>> x, table = torch.ones(1, 2, 1, 4), torch.ones(2, 2)
        >>> tilewright.explain("rope", x, table, table, impl="reference").chosen
        'reference'
    """
    return operation(function).explain(*args, **kwargs)


def register() -> None:
    """Register every operator in ``torch.ops.tilewright``, for programs that load a saved graph.

    The public functions register what they need by themselves.

    Example:
        >>> import torch, tilewright
        >>> tilewright.register()
        >>> torch.ops.tilewright.rope.default
        <OpOverload(op='tilewright.rope', overload='default')>
    """
    for name in FAMILIES:
        import_module(f"tilewright.ops.{name}.op")
