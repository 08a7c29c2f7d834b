"""tilewright: fused Triton kernels for large language models, everywhere, explained.

Importing this package imports nothing else: neither torch nor Triton, no device is touched, no environment variable
read. Every name below is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.dispatch import use
    from tilewright.ops import explain, register
    from tilewright.ops.rope.api import rope, rope_from_angles, rope_qk
    from tilewright.ops.rope.table import RopeTable, rope_table

__version__ = "0.1.0"

_HOME = {
    "explain": "tilewright.ops",
    "register": "tilewright.ops",
    "rope": "tilewright.ops.rope.api",
    "rope_from_angles": "tilewright.ops.rope.api",
    "rope_qk": "tilewright.ops.rope.api",
    "RopeTable": "tilewright.ops.rope.table",
    "rope_table": "tilewright.ops.rope.table",
    "use": "tilewright.dispatch",
}

__all__ = [
    "RopeTable",
    "__version__",
    "explain",
    "register",
    "rope",
    "rope_from_angles",
    "rope_qk",
    "rope_table",
    "use",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'tilewright' has no attribute '{name}'")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
