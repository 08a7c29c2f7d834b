"""The optional packages that the command line, the benchmark, the demo and the tool chain for NPUs need."""

from __future__ import annotations

from importlib import import_module

from tilewright.errors import MissingDependencyError


def require(module: str, purpose: str, *, extra: str = "cli") -> None:
    """Make sure that an optional package can be imported.

    Args:
        module: what is imported of it, such as ``"rich"`` or ``"rich.console"``.
        purpose: what needs it, for the message.
        extra: the extra of this library that brings it.

    Raises:
        MissingDependencyError: it is missing or broken.
    """
    try:
        import_module(module)
    except Exception as error:  # a broken package may raise anything
        package = module.partition(".")[0]
        message = f"{purpose} needs the package {package}: pip install 'tilewright[{extra}]' ({error})"
        raise MissingDependencyError(message) from error
