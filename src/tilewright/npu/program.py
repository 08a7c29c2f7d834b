"""A compiled kernel: its program, and what a runtime has to know of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tilewright.errors import ArgumentError, NpuArtifactError
from tilewright.npu.ir.text import print_program

if TYPE_CHECKING:
    import torch
    from xdsl.dialects.builtin import ModuleOp

    from tilewright.npu.diagnostics import Diagnostic
    from tilewright.npu.kernel import Kernel
    from tilewright.npu.operator import Operator

FORMAT = 1
"""Version of the manifest."""


@dataclass(frozen=True)
class ArgumentInfo:
    """A tensor that a program takes.

    Attributes:
        name: the kernel's parameter.
        shape: its sizes.
        dtype: Triton's name of its dtype, such as ``"fp32"``.
        role: ``"in"``, ``"out"``, ``"inout"``, ``"index"`` (a table of indices), ``"scalar"`` or ``"unused"``.
        layout: ``"host"`` or ``"device"``.
        seen_shape: the shape that the kernel gives it, if that is another: its last dimension is padded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    layout: str = "device"
    seen_shape: tuple[int, ...] | None = None

    @property
    def is_output(self) -> bool:
        """Whether it is only written."""
        return self.role == "out"


@dataclass(frozen=True)
class Manifest:
    """What a runtime has to know of a program, and where it comes from.

    Attributes:
        kernel: the kernel's name.
        source_file: name of the file that it stands in.
        source_sha256: hash of that file.
        arguments: its tensors in their order.
        constexprs: the other arguments.
        host_layout: positions, among the arguments without the outputs, of those that stay in the host's layout.
        vector_inputs: how many arguments are data that is read.
        indices: positions, among the arguments without the outputs, of the tables of indices.
        outputs: positions, among all arguments, of those that are only written.
        profile: the compiler's release.
        backend: the back end.
        compute_dtype: what the device's arithmetic is rounded to.
        grid: of how many programs; one.
        diagnostics: warnings of the checker.
        versions: of this library and of what it was compiled with.
        format: version of the manifest.
    """

    kernel: str
    source_file: str
    source_sha256: str
    arguments: tuple[ArgumentInfo, ...]
    constexprs: dict[str, Any]
    host_layout: tuple[int, ...]
    vector_inputs: int
    indices: tuple[int, ...]
    outputs: tuple[int, ...]
    profile: str
    backend: str
    compute_dtype: str
    grid: tuple[int, ...] = (1,)
    diagnostics: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """From plain data.

        Raises:
            NpuArtifactError: something is missing, or it is of another version.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            came = repr(data.get("format")) if isinstance(data, dict) else "none"
            raise NpuArtifactError(f"manifest: format {came}, expected {FORMAT}")
        try:
            arguments = tuple(
                ArgumentInfo(**{**each, "shape": tuple(each["shape"]), "seen_shape": _tuple(each.get("seen_shape"))})
                for each in data["arguments"]
            )
            data = {**data, "constexprs": {key: _frozen(each) for key, each in data["constexprs"].items()}}
            lists = {key: tuple(data[key]) for key in ("host_layout", "indices", "outputs", "grid", "diagnostics")}
            return cls(**{**data, **lists, "arguments": arguments})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise NpuArtifactError(f"manifest: {error!r}") from error


@dataclass(frozen=True)
class Program:
    """A compiled kernel.

    Attributes:
        module: its program in the ``npu`` dialect.
        manifest: what a runtime has to know of it.
        diagnostics: what the checker found, warnings only.
        kernel: what it was compiled from; None for a program that was read from a bundle.
        operator: what stands between the kernel and PyTorch, if it was compiled for that.
        example: tensors that the operator was compiled for, without values.
        loaded_files: the other files of the bundle that it was read from.
    """

    module: ModuleOp
    manifest: Manifest
    diagnostics: tuple[Diagnostic, ...] = ()
    kernel: Kernel | None = field(default=None, compare=False, repr=False)
    operator: Operator | None = field(default=None, compare=False, repr=False)
    example: dict[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    loaded_files: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.manifest.kernel

    def describe(self) -> dict[str, str]:
        """Its tensors for people: dtype, shape, role and layout of each."""
        return {
            info.name: f"{info.dtype}[{', '.join(str(size) for size in info.shape)}] {info.role}, {info.layout}"
            for info in self.manifest.arguments
        }

    @cached_property
    def text(self) -> str:
        """The program's text, with locations."""
        return print_program(self.module)

    @property
    def files(self) -> dict[str, str]:
        """What a bundle has of it besides program and manifest: the back end's texts, by file name."""
        from tilewright.npu.backends import emit

        return dict(self.loaded_files) if self.kernel is None else emit(self)

    @property
    def asm(self) -> dict[str, str]:
        """Its texts by name, as Triton's compiled kernels have: ``"npu"`` and what the profile's back end emits."""
        return {"npu": self.text, **{name.partition(".")[0]: text for name, text in self.files.items()}}

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest as plain data."""
        return self.manifest.to_json()

    @property
    def source_map(self) -> list[dict[str, Any]]:
        """Where each operation of the program stands in the source, in the order of the text."""
        from tilewright.npu.ir.text import span_of

        found = []
        for operation in self.module.walk():
            span = span_of(operation.location)
            if span.line:
                found.append({"operation": operation.name, "file": span.file, "line": span.line, "column": span.column})
        return found

    def run(self, *tensors: torch.Tensor, compute_dtype: str = "float32", check: bool = True) -> None:
        """Run the program on a CPU; outputs are written in place.

        Args:
            tensors: the kernel's tensors in their order; constexprs behind them may be left out or given.
            compute_dtype: what each operation's result is rounded to: ``"float32"`` (not at all), ``"bfloat16"`` or
                ``"dlfloat16"``.
            check: whether block numbers, clipped inserts and unwritten outputs are errors.

        Raises:
            ArgumentError: a tensor is not what the program was compiled for.
            NpuRunError: the program did something that a device would not forgive.
        """
        from tilewright.npu.executor import execute

        expected = len(self.manifest.arguments)
        rest = tuple(tensors[expected:])
        if len(tensors) < expected or (rest and rest != tuple(self.manifest.constexprs.values())):
            names = ", ".join(info.name for info in self.manifest.arguments)
            message = f"got {len(tensors)} arguments, expected {names}, and behind them nothing or the constexprs"
            raise ArgumentError(self.name, "tensors", message)
        execute(self, tensors[:expected], compute_dtype=compute_dtype, check=check)


def _frozen(value: Any) -> Any:
    """A constexpr as it was: JSON has lists for tuples."""
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


def _tuple(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
