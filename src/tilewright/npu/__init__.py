"""A tool chain for Triton kernels on NPUs: check, compile, run on a CPU, hand over to the device.

.. code-block:: text

    source -> front end -> program -> clean-up -> target stage -> bundle
                 |            |                                     |
            diagnostics    CPU executor                      vendor's compiler

The folder's README draws it whole. Every name below is loaded at its first use; ``xdsl`` is needed by all but the
language (``pip install 'tilewright[npu]'``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilewright.optional import require

if TYPE_CHECKING:
    from tilewright.npu import kernels, language, triton
    from tilewright.npu.artifact import load, save
    from tilewright.npu.check import check_file, check_files
    from tilewright.npu.handoff import HandOffOptions, HandOffResult, hand_off
    from tilewright.npu.kernel import JitFunction, jit
    from tilewright.npu.language import rblib
    from tilewright.npu.operator import Operator
    from tilewright.npu.program import Program
    from tilewright.npu.registration import register
    from tilewright.npu.shim import install_shim, uninstall_shim

_HOME = {
    "HandOffOptions": "handoff",
    "HandOffResult": "handoff",
    "JitFunction": "kernel",
    "Operator": "operator",
    "Program": "program",
    "check_file": "check",
    "check_files": "check",
    "hand_off": "handoff",
    "install_shim": "shim",
    "jit": "kernel",
    "load": "artifact",
    "register": "registration",
    "save": "artifact",
    "uninstall_shim": "shim",
}
_WITHOUT_XDSL = {"kernel", "shim"}
_MODULES = {"kernels": "kernels", "language": "language", "rblib": "language.rblib", "triton": "triton"}

__all__ = [
    "HandOffOptions",
    "HandOffResult",
    "JitFunction",
    "Operator",
    "Program",
    "check_file",
    "check_files",
    "hand_off",
    "install_shim",
    "jit",
    "kernels",
    "language",
    "load",
    "rblib",
    "register",
    "save",
    "triton",
    "uninstall_shim",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        if name == "kernels":
            require("xdsl", "tilewright.npu.kernels", extra="npu")
        return import_module(f"{__name__}.{_MODULES[name]}")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'tilewright.npu' has no attribute '{name}'")
    if home not in _WITHOUT_XDSL:
        require("xdsl", f"tilewright.npu.{name}", extra="npu")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
