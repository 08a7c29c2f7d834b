"""The back end for RBLN. The vendor's compiler takes the kernel's source and not a program, so it is given that."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tilewright.npu.device_file import kernel_compile as script_of
from tilewright.npu.operator import define

if TYPE_CHECKING:
    from tilewright.npu.program import Program


def kernel_compile(program: Program) -> str:
    """The script that the vendor's compiler runs: the kernel's module, and its operator called with empty tensors."""
    manifest = program.manifest
    operator = program.operator
    if operator is None:
        assert program.kernel is not None
        operator = define(program.kernel, name=program.name, values=manifest.constexprs, profile=manifest.profile)
        operator = replace(operator, host_layout=manifest.host_layout)
    return script_of(operator, program.example)
