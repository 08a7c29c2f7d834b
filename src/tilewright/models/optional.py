"""The optional packages that the demo needs."""

from __future__ import annotations

from importlib import import_module

from tilewright.errors import MissingDependencyError


def require(package: str, purpose: str) -> None:
    """Make sure that an optional package can be imported.

    Args:
        package: its name, such as ``"rich"``.
        purpose: what needs it, for the message.

    Raises:
        MissingDependencyError: it is missing or broken.
    """
    try:
        import_module(package)
    except ImportError as error:
        message = f"{purpose} needs the package {package}: pip install 'tilewright[cli]' ({error})"
        raise MissingDependencyError(message) from error
