"""Compiling a kernel: front end, clean-up, target stage, manifest."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import ArgumentError, NpuKernelError
from tilewright.npu.diagnostics import Diagnostic, Diagnostics
from tilewright.npu.front import TensorSpec, build, constexpr_names, parameters
from tilewright.npu.ir import passes
from tilewright.npu.ir.text import kernel_of, verify_program
from tilewright.npu.language import DTYPES
from tilewright.npu.profiles import DEFAULT_PROFILE
from tilewright.npu.profiles import profile as profile_of
from tilewright.npu.program import ArgumentInfo, Manifest, Program
from tilewright.npu.rounding import compute_dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from xdsl.dialects.func import FuncOp

    from tilewright.npu.kernel import Kernel
    from tilewright.npu.language.core import dtype
    from tilewright.npu.source import SourceFile

_TORCH = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "int64", "int32": "int32",
    "int16": "int16", "int8": "int8", "uint8": "uint8", "bool": "int1",
}  # fmt: skip


def dtype_of(tensor: torch.Tensor) -> dtype:
    """The language's name for a tensor's dtype.

    Raises:
        ArgumentError: the language has none.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _TORCH:
        raise ArgumentError("npu", "dtype", f"got {name}, expected one of {', '.join(_TORCH)}")
    return DTYPES[_TORCH[name]]


def compile_kernel(
    kernel: Kernel,
    arguments: dict[str, Any],
    *,
    grid: int | Sequence[int] | Callable[..., Any] = (1,),
    host_layout: str | Sequence[int] | None = None,
    compute_dtype: str | None = None,
    profile: str = DEFAULT_PROFILE,
    name: str | None = None,
) -> Program:
    """Compile a kernel for arguments by name: tensors, and values of constexprs. See :meth:`JitFunction.warmup`.

    ``name`` is the program's, where it is not the kernel's.
    """
    target = profile_of(profile)
    diagnostics = Diagnostics(target)
    source, node = kernel.module.source, kernel.node
    sizes = () if callable(grid) else (grid,) if isinstance(grid, int) else tuple(grid)
    if sizes != (1,):
        shown = "a function" if callable(grid) else sizes
        diagnostics.report(
            "GRID", source, source.span(node), f"the grid is {shown}; the device runs one program", "grid=(1,)"
        )
    compute_dtype = compute_dtype_of(compute_dtype or target.compute_dtype)
    tensors = {name: spec_of(each) for name, each in arguments.items() if _is_tensor(each)}
    known = constexpr_names(node)
    for each in tensors.keys() & known:
        raise ArgumentError(kernel.name, each, "got a tensor, expected a number: the parameter is a tl.constexpr")
    constexprs = {name: each for name, each in arguments.items() if name not in tensors}
    module = build(node, kernel.scope, tensors, constexprs, diagnostics, name=name or kernel.name)
    diagnostics.raise_errors(f"kernel '{kernel.name}' under profile '{profile}'")
    if module is None:
        raise NpuKernelError(f"kernel '{kernel.name}' gave no program", diagnostics.all)
    verify_program(module, kernel.name)
    passes.clean(module)
    function = kernel_of(module)
    names = [each.arg for each in parameters(node) if each.arg in tensors]
    layout = host_layout_of(kernel.name, host_layout, sum(role != "out" for role in _roles(function)))
    passes.target(module, target, layout, compute_dtype)
    verify_program(module, kernel.name)
    manifest = _manifest(
        name or kernel.name, source, names, tensors, constexprs, function, layout, diagnostics, compute_dtype
    )
    example = {each: arguments[each] for each in names if each not in {names[at] for at in manifest.outputs}}
    return Program(module, manifest, diagnostics.all, kernel=kernel, example=example)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """What a kernel is compiled for, of a tensor."""
    return TensorSpec(tuple(tensor.shape), dtype_of(tensor), tensor.is_contiguous())


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "is_contiguous")


def _roles(function: FuncOp) -> list[str]:
    assert function.arg_attrs is not None
    return [each.data["npu.role"].data for each in function.arg_attrs]  # type: ignore[attr-defined]


def host_layout_of(name: str, given: str | Sequence[int] | None, inputs: int) -> tuple[int, ...]:
    """Which arguments stay in the host's layout, by position among the ``inputs`` arguments that are no outputs.

    Raises:
        ArgumentError: it is neither positions nor a text such as ``"1:2:3"``, or a position is out of range.
    """
    if given is None or (isinstance(given, str) and not given):
        return ()
    positions = given.split(":") if isinstance(given, str) else list(given)
    if not all(isinstance(each, int) or re.fullmatch(r"\d+", each) for each in positions):
        raise ArgumentError(name, "host_layout", f"got {given!r}, expected positions such as '1:2:3'")
    found = tuple(int(each) for each in positions)
    if any(not 0 <= each < inputs for each in found):
        message = f"got {given!r}, expected positions among the {inputs} arguments that are not outputs"
        raise ArgumentError(name, "host_layout", message)
    return found


def _manifest(
    kernel: str,
    source: SourceFile,
    names: list[str],
    tensors: dict[str, TensorSpec],
    constexprs: dict[str, Any],
    function: FuncOp,
    layout: tuple[int, ...],
    diagnostics: Diagnostics,
    compute_dtype: str,
) -> Manifest:
    roles = _roles(function)
    inputs = [position for position, role in enumerate(roles) if role != "out"]
    host = {inputs[each] for each in layout}
    arguments = tuple(
        ArgumentInfo(
            name,
            tensors[name].shape,
            tensors[name].dtype.name,
            roles[position],
            "host" if position in host else "device",
            passes.seen_shape(function, position),
        )
        for position, name in enumerate(names)
    )
    return Manifest(
        kernel=kernel,
        source_file=Path(source.path).name,
        source_sha256=hashlib.sha256(source.text.encode()).hexdigest(),
        arguments=arguments,
        constexprs={name: _plain(value) for name, value in constexprs.items()},
        host_layout=layout,
        vector_inputs=sum(role in {"in", "inout"} for role in roles),
        indices=tuple(position for position, each in enumerate(inputs) if roles[each] == "index"),
        outputs=tuple(position for position, role in enumerate(roles) if role == "out"),
        profile=diagnostics.profile.name,
        backend=diagnostics.profile.backend,
        compute_dtype=compute_dtype,
        diagnostics=tuple(str(_without_folder(each)) for each in diagnostics.all),
        versions=_versions(),
    )


def _plain(value: Any) -> Any:
    """A constexpr as JSON has it; what JSON has not is named."""
    if isinstance(value, tuple | list):
        return tuple(_plain(each) for each in value)
    return value if value is None or isinstance(value, int | float | str) else str(value)


def _without_folder(found: Diagnostic) -> Diagnostic:
    return replace(found, span=replace(found.span, file=Path(found.span.file).name))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from tilewright import __version__

    return {"tilewright": __version__, "xdsl": version("xdsl")}
