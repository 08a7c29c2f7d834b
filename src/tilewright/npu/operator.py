"""A kernel as an operator of PyTorch: what its constexprs are, and what is aligned, allocated and written back.

Everything is read off the kernel. It says what shape each tensor has, in its constexprs: ``query`` is ``(NUM_BATCH,
NUM_HEAD, ...)``, so ``NUM_HEAD`` is ``query.shape[1]``. It stores into ``output`` and never loads it, so ``output`` is
a result; it loads and stores ``kv_cache``, so that is changed in place. What cannot be read off is told.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.npu.compile import compile_kernel, host_layout_of
from tilewright.npu.diagnostics import Diagnostics
from tilewright.npu.executor import execute
from tilewright.npu.front import constexpr_names, interface
from tilewright.npu.kernel import Kernel
from tilewright.npu.language.rblib import align_tensor_last_dim_to_64
from tilewright.npu.profiles import DEFAULT_PROFILE
from tilewright.npu.profiles import profile as profile_of
from tilewright.npu.symbols import Symbolic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tilewright.npu.front import Parameter
    from tilewright.npu.program import Program
    from tilewright.npu.symbols import Size

_DATA = {"in", "inout", "out"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operator:
    """A kernel, and what stands between it and PyTorch.

    Attributes:
        kernel: the kernel.
        name: the operator's name.
        tensors: the kernel's tensors in their order, outputs among them.
        outputs: which input each output has the dtype of, and the shape where ``output_shapes`` says nothing.
        constexprs: how each constexpr is computed, as Python over the operator's tensors: ``query.shape[1]``.
        aligned: tensors whose last dimension is padded with zeros to a multiple of 64 before the kernel sees them.
        host_layout: which tensors stay in the host's layout, by position among those that are no outputs.
        profile: the compiler's release.
        output_shapes: the sizes of an output that no input has the shape of, as Python over the operator's tensors.
    """

    kernel: Kernel
    name: str
    tensors: tuple[Parameter, ...]
    outputs: dict[str, str]
    constexprs: dict[str, str]
    aligned: tuple[str, ...]
    host_layout: tuple[int, ...]
    profile: str
    output_shapes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _programs: dict[Any, Program] = field(default_factory=dict, compare=False, repr=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The operator's arguments: the kernel's tensors without the outputs."""
        return tuple(each.name for each in self.tensors if each.name not in self.outputs)

    @property
    def mutated(self) -> tuple[str, ...]:
        """The arguments that are changed in place."""
        return tuple(each.name for each in self.tensors if each.role == "inout")

    @property
    def schema(self) -> str:
        """The operator's schema, without its name."""
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        arguments = ", ".join(
            f"Tensor({next(letters)}!) {name}" if name in self.mutated else f"Tensor {name}" for name in self.inputs
        )
        results = "Tensor" if len(self.outputs) == 1 else f"({', '.join(['Tensor'] * len(self.outputs))})"
        return f"({arguments}) -> {results}"

    def fake(self, *args: torch.Tensor) -> Any:
        """Results of the right shapes and dtypes, with no values."""
        given = dict(zip(self.inputs, args, strict=True))
        self._refuse_gradients(args)
        return _results([self._empty(name, given) for name in self.outputs])

    def __call__(self, *args: torch.Tensor, compute_dtype: str = "float32") -> Any:
        """Compute on the CPU.

        Args:
            args: the operator's tensors. Data may be float32, bfloat16 or float16; indices int32.
            compute_dtype: what each operation's result is rounded to.

        Returns:
            The outputs, in the dtype of the tensors that they are like; None if there are none.

        Raises:
            ArgumentError: shapes do not fit the kernel, or a gradient is asked for.
            DTypeError: a tensor has another dtype.
            NpuRunError: a block number is out of range, or rows do not fit into their partition. What the kernel stored
                before, for sequences that come first, is stored.
        """
        if len(args) != len(self.inputs):
            raise ArgumentError(self.name, "args", f"got {len(args)} tensors, expected {', '.join(self.inputs)}")
        self._refuse_gradients(args)
        given = dict(zip(self.inputs, args, strict=True))
        program = self.program(given)
        in_place = self.mutated
        carried, outputs = self._carriers(given, in_place)
        values = {**carried, **outputs}
        tensors = [values[each.name] for each in self.tensors]
        execute(program, tensors, compute_dtype=compute_dtype, of_any_float=in_place)
        return _results([outputs[name].to(given[like].dtype) for name, like in self.outputs.items()])

    def _refuse_gradients(self, args: Sequence[Any]) -> None:
        if torch.is_grad_enabled() and any(getattr(each, "requires_grad", False) for each in args):
            message = "a tensor requires a gradient, and kernels for NPUs have none; use torch.no_grad() or detach()"
            raise ArgumentError(self.name, "args", message)

    def _carriers(
        self, given: Mapping[str, torch.Tensor], in_place: Sequence[str] = ()
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What the kernel is called with: data as float32, aligned, contiguous; and outputs, which are not aligned.

        Tensors named in ``in_place`` are passed as they are.
        """
        carried: dict[str, torch.Tensor] = {}
        for each in self.tensors:
            if each.name not in given:
                continue
            tensor = given[each.name]
            if each.role in {*_DATA, "scalar"} and tensor.dtype not in _FLOATS:
                expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
                raise DTypeError(self.name, each.name, f"got {tensor.dtype}, expected one of {expected}")
            if each.name not in in_place:
                tensor = (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).contiguous()
            carried[each.name] = tensor
        outputs = {name: self._empty(name, carried, torch.float32) for name in self.outputs}
        for name in self.aligned:
            if name not in in_place:
                carried[name] = align_tensor_last_dim_to_64(carried[name])
        return carried, outputs

    def _empty(self, name: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for an output, for tensors that are not aligned yet; by default of the dtype of what it is like."""
        like = tensors[self.outputs[name]]
        dtype = dtype if like.is_floating_point() else like.dtype
        if name not in self.output_shapes:
            return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        return like.new_empty([_compute(each, tensors) for each in self.output_shapes[name]], dtype=dtype)

    def values(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The constexprs for aligned tensors.

        Raises:
            ArgumentError: a tensor has too few dimensions.
        """
        found = {}
        for name, expression in self.constexprs.items():
            try:
                found[name] = _compute(expression, tensors)
            except (IndexError, ZeroDivisionError) as error:
                shapes = ", ".join(f"{key} {tuple(each.shape)}" for key, each in tensors.items())
                raise ArgumentError(self.name, name, f"{expression}: {error}; got {shapes}") from error
        return found

    def program(self, given: Mapping[str, torch.Tensor]) -> Program:
        """The program for such tensors, compiled once for each set of shapes and dtypes.

        Args:
            given: the operator's tensors by name; their values are not read, so meta tensors will do.

        Raises:
            NpuKernelError: with these sizes the kernel breaks rules of the profile.
            ArgumentError: shapes do not fit the kernel.
        """
        if set(given) != set(self.inputs):
            wrong = ", ".join(sorted(set(given) ^ set(self.inputs)))
            raise ArgumentError(self.name, wrong, f"the operator takes {', '.join(self.inputs)}")
        given = {name: given[name] for name in self.inputs}
        for name, each in given.items():
            if not isinstance(each, torch.Tensor):
                raise ArgumentError(self.name, name, f"got {type(each).__name__}, expected a tensor")
        key = tuple((tuple(each.shape), each.dtype) for each in given.values())
        if key not in self._programs:
            given = {name: torch.empty_like(each, device="meta") for name, each in given.items()}
            carried, outputs = self._carriers(given)
            tensors = {**carried, **outputs}
            arguments = {each.name: tensors[each.name] for each in self.tensors} | self.values(tensors)
            program = compile_kernel(
                self.kernel, arguments, host_layout=self.host_layout, profile=self.profile, name=self.name
            )
            self._programs[key] = replace(program, operator=self, example=dict(given))
        return self._programs[key]


def _compute(expression: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value of an expression over tensors that a kernel's author, or this module, wrote."""
    return eval(expression, {"__builtins__": {}, "float": float}, dict(tensors))


def _literal(value: Any) -> str:
    """A constexpr's value as Python."""
    return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def define(
    kernel: Kernel,
    *,
    name: str | None = None,
    outputs: Mapping[str, str] | None = None,
    constexprs: Mapping[str, str | int] | None = None,
    values: Mapping[str, Any] | None = None,
    align: Sequence[str] = (),
    host_layout: str | Sequence[int] = (),
    profile: str = DEFAULT_PROFILE,
) -> Operator:
    """What stands between a kernel and PyTorch, read off the kernel. See :func:`tilewright.npu.register`.

    ``values`` are constexprs too, none of them an expression.
    """
    if not isinstance(kernel, Kernel):
        raise ArgumentError("register", "kernel", f"got {kernel!r}, expected a function under @jit")
    diagnostics = Diagnostics(profile_of(profile))
    known = {key: each for key, each in (constexprs or {}).items() if not isinstance(each, str)} | dict(values or {})
    tensors = tuple(interface(kernel.node, kernel.scope, diagnostics, known))
    name = name or kernel.name
    diagnostics.raise_errors(f"kernel '{kernel.name}' under profile '{profile}'")
    outputs = _outputs(name, tensors, outputs)
    read = _read_off(tensors)
    given = {key: each for key, each in (constexprs or {}).items() if isinstance(each, str)}
    given |= {key: _literal(each) for key, each in known.items()}
    wanted = [each for each in kernel.arg_names if each in constexpr_names(kernel.node)]
    if unknown := set(given) - set(wanted):
        raise ArgumentError(name, "constexprs", f"the kernel has no {', '.join(sorted(unknown))}")
    if missing := [each for each in wanted if each not in given and each not in read]:
        message = f"no tensor's shape tells {', '.join(missing)}; give how to compute it, as 'query.shape[1]'"
        raise ArgumentError(name, "constexprs", message)
    inputs = [each.name for each in tensors if each.name not in outputs]
    for each, expression in given.items():
        _check_expression(name, each, expression, inputs)
    if unknown := set(align) - set(inputs):
        raise ArgumentError(name, "align", f"the kernel has no input {', '.join(sorted(unknown))}")
    computed = {each: given.get(each) or read[each] for each in wanted}
    layout = host_layout_of(name, host_layout, len(inputs))
    return Operator(
        kernel=kernel,
        name=name,
        tensors=tensors,
        outputs=dict(outputs),
        constexprs=computed,
        aligned=tuple(each for each in inputs if each in align),
        host_layout=layout,
        profile=profile,
        output_shapes=_output_shapes(name, tensors, outputs, computed),
    )


def compile_operator(
    kernel: Kernel,
    given: Mapping[str, Any],
    *,
    name: str | None = None,
    align: Sequence[str] = (),
    host_layout: str | Sequence[int] = (),
    profile: str = DEFAULT_PROFILE,
) -> Program:
    """Compile a kernel for the tensors that its operator takes.

    Args:
        kernel: the kernel.
        given: its arguments by name. Outputs, and constexprs that are a dimension of a tensor, may be left out.
        name: the operator's.
        align: tensors whose last dimension is padded to a multiple of 64.
        host_layout: which tensors stay in the host's layout.
        profile: the compiler's release.

    Raises:
        ArgumentError: an argument is missing, or is not what it would be inferred to be.
        NpuKernelError: the kernel breaks rules of the profile.
    """
    tensors = {key: each for key, each in given.items() if isinstance(each, torch.Tensor)}
    values = {key: each for key, each in given.items() if key not in tensors}
    for each in sorted(tensors.keys() & constexpr_names(kernel.node)):
        raise ArgumentError(name or kernel.name, each, "got a tensor, expected a number: it is a tl.constexpr")
    operator = define(kernel, name=name, values=values, align=align, host_layout=host_layout, profile=profile)
    if missing := [each for each in operator.inputs if each not in tensors]:
        raise ArgumentError(operator.name, missing[0], f"is missing; the operator takes {', '.join(operator.inputs)}")
    program = operator.program({each: tensors[each] for each in operator.inputs})
    for info in program.manifest.arguments:
        told = tensors.get(info.name)
        if info.is_output and told is not None and tuple(told.shape) != info.shape:
            raise ArgumentError(
                operator.name, info.name, f"got shape {tuple(told.shape)}, but it would be {info.shape}"
            )
    return program


def _outputs(name: str, tensors: Sequence[Parameter], given: Mapping[str, str] | None) -> dict[str, str]:
    """Which input each output is like: as told, else the first one of the same shape in the kernel, else the first."""
    inputs = {each.name: each for each in tensors if each.role != "out"}
    written = {each.name: each for each in tensors if each.role == "out"}
    if given is None:
        data = [key for key, each in inputs.items() if each.role in _DATA]
        if written and not data:
            raise ArgumentError(name, "outputs", "the kernel reads no data, so nothing tells the dtype of its outputs")
        given = {}
        for output, each in written.items():
            alike = [key for key in data if each.shape is not None and inputs[key].shape == each.shape]
            given[output] = (alike or data)[0]
    if set(given) != set(written):
        raise ArgumentError(
            name, "outputs", f"got {sorted(given)}, but what the kernel only writes is {sorted(written)}"
        )
    for output, like in given.items():
        if like not in inputs:
            raise ArgumentError(name, "outputs", f"'{output}' is to be like '{like}', which is no input of the kernel")
    return {output: given[output] for output in written}


def _output_shapes(
    name: str, tensors: Sequence[Parameter], outputs: Mapping[str, str], constexprs: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """The sizes of outputs that are not shaped like their input, from the constexprs that the kernel gives them."""
    known = {each.name: each for each in tensors}
    found = {}
    for output, like in outputs.items():
        shape = known[output].shape
        if shape is None:
            raise ArgumentError(name, "outputs", f"the kernel does not say what shape '{output}' has")
        if shape != known[like].shape:
            found[output] = tuple(_expression(size, constexprs) for size in shape)
    return found


def _expression(size: Size, constexprs: Mapping[str, str]) -> str:
    """A size as Python over the operator's tensors."""

    def computed(found: re.Match[str]) -> str:
        text = constexprs.get(found.group(), found.group())
        return text if re.fullmatch(r"[\w.\[\]]+", text) else f"({text})"

    return re.sub(r"[A-Za-z_]\w*", computed, str(size))


def _read_off(tensors: Sequence[Parameter]) -> dict[str, str]:
    """Which dimension of which tensor each constexpr is: the first one that is it and nothing else."""
    found: dict[str, str] = {}
    for each in tensors:
        for axis, size in enumerate(each.shape or ()):
            symbol = _symbol(size)
            if symbol and each.role != "out":
                found.setdefault(symbol, f"{each.name}.shape[{axis}]")
    return found


def _symbol(size: Size) -> str:
    """The constexpr that a size is; "" if it is a number or an expression."""
    text = str(size)
    return text if isinstance(size, Symbolic) and text.isidentifier() else ""


def _check_expression(name: str, constexpr: str, expression: str, inputs: Sequence[str]) -> None:
    """Make sure that an expression is Python over the operator's tensors."""
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ArgumentError(name, constexpr, f"{expression!r} is no expression: {error.msg}") from error
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"float"}
    if unknown := names - set(inputs):
        message = f"{expression!r} names {', '.join(sorted(unknown))}; there are {', '.join(inputs)}"
        raise ArgumentError(name, constexpr, message)


def _results(tensors: list[torch.Tensor]) -> Any:
    if not tensors:
        return None
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
