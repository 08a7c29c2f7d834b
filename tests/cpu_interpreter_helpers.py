"""What the tests of the CPU target's interpreter share: kernels to Triton IR, and running it."""

import pytest
import torch
import triton
from triton._C.libtriton import ir, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from tilewright.cpu import reader, ttir
from tilewright.cpu.interpreter import interpret

if triton.knobs.runtime.interpret:
    pytest.skip("Triton's own interpreter is on, under which a kernel has no IR", allow_module_level=True)

TARGET = GPUTarget("cuda", 90, 32)
POINTEES = {
    torch.bool: "i1", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float32: "fp32", torch.float64: "fp64", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip

ELEMENTS = {
    torch.bool: "i1", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64",
}  # fmt: skip


def kind_of(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return "*" + POINTEES[argument.dtype]
    if isinstance(argument, bool):
        return "i1"
    if isinstance(argument, int):
        return "i32" if -(2**31) <= argument < 2**31 else "i64"
    return "fp32"


def build(kernel, arguments, constants, block_pointers: bool = False) -> ttir.Module:
    """The IR of a kernel after the passes that the CPU target runs."""
    names = kernel.arg_names
    signature = dict(zip(names, map(kind_of, arguments), strict=False)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, {})
    backend = make_backend(TARGET)
    options = backend.parse_options({"debug": True, "sanitize_overflow": False})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = backend.get_codegen_implementation(options) | {"min_dot_size": lambda lhs, rhs: (1, 1, 1)}
    module = source.make_ir(TARGET, options, code, backend.get_module_map(), context)
    manager = ir.pass_manager(module.context)
    passes.common.add_inliner(manager)
    if hasattr(passes.ttir, "add_rewrite_tensor_pointer") and not block_pointers:
        passes.ttir.add_rewrite_tensor_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    manager.run(module, "ttir")
    return reader.read(reader.generic_text(module))


def addresses(arguments) -> list:
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


def launch(kernel, grid, *arguments, check=None, block_pointers: bool = False, **constants) -> None:
    """Run a kernel's IR; every tensor must be contiguous."""
    grid = (*grid, 1, 1)[:3]
    interpret(build(kernel, arguments, constants, block_pointers), grid, addresses(arguments), check=check)


def run_text(operations: str, *tensors: torch.Tensor) -> None:
    """Run operations that are written out; ``%p0``, ``%p1``, ... are pointers to the tensors."""
    types = [f"!tt.ptr<{ELEMENTS[t.dtype]}>" for t in tensors]
    parameters = ", ".join(f"%p{k}: {type_}" for k, type_ in enumerate(types))
    text = f"""
    "builtin.module"() ({{
      "tt.func"() <{{function_type = ({", ".join(types)}) -> (), sym_name = "k", sym_visibility = "public"}}> ({{
      ^bb0({parameters}):
        {operations}
        "tt.return"() : () -> () loc(unknown)
      }}) : () -> () loc(unknown)
    }}) : () -> () loc(unknown)
    """
    interpret(reader.read(text), (1, 1, 1), addresses(tensors))


def elementwise(operation: str, attributes: str, inputs: list[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Apply one operation to tensors of equal length."""
    size = len(output)
    lines = [f'%i = "tt.make_range"() <{{start = 0 : i32, end = {size} : i32}}> : () -> tensor<{size}xi32>']
    for k, tensor in enumerate([*inputs, output]):
        pointers = f"tensor<{size}x!tt.ptr<{ELEMENTS[tensor.dtype]}>>"
        lines += [
            f'%s{k} = "tt.splat"(%p{k}) : (!tt.ptr<{ELEMENTS[tensor.dtype]}>) -> {pointers}',
            f'%a{k} = "tt.addptr"(%s{k}, %i) : ({pointers}, tensor<{size}xi32>) -> {pointers}',
        ]
        if k < len(inputs):
            segments = "operandSegmentSizes = array<i32: 1, 0, 0>"
            element = f"tensor<{size}x{ELEMENTS[tensor.dtype]}>"
            lines.append(f'%x{k} = "tt.load"(%a{k}) <{{{segments}}}> : ({pointers}) -> {element}')
    operands = ", ".join(f"%x{k}" for k in range(len(inputs)))
    types = ", ".join(f"tensor<{size}x{ELEMENTS[t.dtype]}>" for t in inputs)
    lines += [
        f'%y = "{operation}"({operands}) {attributes} : ({types}) -> tensor<{size}x{ELEMENTS[output.dtype]}>',
        f'"tt.store"(%a{len(inputs)}, %y) : ({pointers}, tensor<{size}x{ELEMENTS[output.dtype]}>) -> ()',
    ]
    run_text("\n".join(f"{line} loc(unknown)" for line in lines), *inputs, output)
    return output


def assert_same(actual: torch.Tensor, expected) -> None:
    """Equal, NaN to NaN; zeros may differ in sign."""
    expected = torch.as_tensor(expected).to(actual.dtype)
    if actual.itemsize == 1:
        actual, expected = actual.float(), expected.float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, roundings: int) -> None:
    """No farther from the exact value than so many roundings of numbers of that magnitude can bring it."""
    unit = torch.finfo(actual.dtype).eps / 2
    error = (actual.double() - exact.double()).abs()
    assert bool((error <= roundings * unit * magnitude.double()).all()), (error / (unit * magnitude)).max()
