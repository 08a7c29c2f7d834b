"""What the vendor's compiler says, and what that means. Its messages name no line of Python; the lines are found here.

:data:`MEANINGS` is a table of what was seen in public logs. A message that is one of the checker's rules becomes a
diagnostic at every place that can be to blame, or at the kernel's ``def`` line where that cannot be told; what has
nothing to do with the kernel's text becomes a remark.
"""

from __future__ import annotations

import ast
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import Float32Type, MemRefType

from tilewright.npu.device_file import functions_of
from tilewright.npu.diagnostics import Diagnostic
from tilewright.npu.ir import dialect as npu
from tilewright.npu.ir.text import span_of
from tilewright.npu.language.core import Builtin
from tilewright.npu.source import Span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilewright.npu.device_file import Jitted
    from tilewright.npu.operator import Operator
    from tilewright.npu.program import Program
    from tilewright.npu.source import SourceFile


@dataclass(frozen=True)
class Meaning:
    """What a message of the compiler means.

    Attributes:
        pattern: what it looks like. A group ``function`` in it is the function of the language that is to blame.
        message: what is wrong, in one sentence.
        code: the checker's rule; "" if no rule speaks of it.
        hint: what to do instead.
        functions: the functions of the language that are known to cause it.
        keyword: an argument that a call has if it is to blame.
        data: whether loads and stores of anything but float32 are to blame.
    """

    pattern: str
    message: str
    code: str = ""
    hint: str = ""
    functions: tuple[str, ...] = ()
    keyword: str = ""
    data: bool = False


_CAST_HINT = "tensor.to(torch.float32) where the kernel is called"
_HINTS = {
    "exp2": "tl.exp(x * 0.6931471805599453)",
    "sigmoid": "1 / (1 + tl.exp(-x))",
    "where": "tl.maximum or tl.minimum, or a mask that is multiplied with",
    "min": "-tl.max(-x, axis=..., keep_dims=True)",
}

MEANINGS: tuple[Meaning, ...] = (
    Meaning(
        r"UNREACHABLE executed at \S*ConvertBlockTensorOpFromTritonToRTOSA\.cpp:960",
        "a block pointer to anything but float32 aborts the compiler",
        "DTYPE",
        _CAST_HINT,
        data=True,
    ),
    Meaning(
        r"has no attribute 'supported_fp8_dtypes'",
        "the compiler knows no 8-bit floating point",
        "DTYPE",
        _CAST_HINT,
        data=True,
    ),
    Meaning(
        r"[Dd]ialect [`']math' not found for custom op [`']math\.(?P<function>\w+)'",
        "the compiler has no lowering of this function",
        "OP_DOC_ONLY",
    ),
    Meaning(
        r"rtosa\.reduce_last_dim\b.*\bmode\b",
        "the compiler reduces by maximum and sum only",
        "OP_DOC_ONLY",
        functions=("min",),
    ),
    Meaning(
        r"rtosa\.to_dynamic_index\b.*32-bit signless integer",
        "an index is read from a table that is not int32",
        "INDEX_DTYPE",
        "table.to(torch.int32) where the kernel is called",
        functions=("to_dynamic_index",),
    ),
    Meaning(
        r"\bDEVICE_GRAPH_CONVERSION\b",
        "the compiler cannot convert the kernel's graph for the device",
        "UNSUPPORTED_OP",
        functions=("erf", "sigmoid", "zeros"),
    ),
    Meaning(
        r"\bUNEXPECTED_GRAPH\b",
        "the compiler made a graph of the kernel that it does not expect itself",
        "UNSUPPORTED_OP",
        functions=("where",),
    ),
    Meaning(
        r"\btt\.precise_sqrt\b",
        "the compiler knows no square root of exact rounding",
        "UNSUPPORTED_OP",
        "tl.sqrt",
        functions=("sqrt_rn",),
    ),
    Meaning(
        r"\btt\.precise_divf\b",
        "the compiler knows no division of exact rounding",
        "UNSUPPORTED_OP",
        "x / y",
        functions=("div_rn",),
    ),
    Meaning(
        r"\btt\.bitcast\b",
        "the compiler cannot read the bits of a tensor as another dtype",
        "UNSUPPORTED_OP",
        functions=("cast", "to"),
        keyword="bitcast",
    ),
    Meaning(
        r"Fallback to eager execution",
        "the compiler gave up and ran the operator as Python, although strict mode forbids that",
        hint="`python3` on PATH has to find torch and rebel: the kernel is compiled by it",
    ),
    Meaning(
        r"Global num_threads state changed while dynamo tracing",
        "the runtime changed the number of threads while the operator was traced",
        hint="RBLN_NUM_THREADS has to be torch.get_num_threads()",
    ),
    Meaning(
        r"ExpandContribCustomOps|Failed to find a type\b",
        "the compiler has no form of custom kernels for devices that compute in bfloat16",
        hint="target_soc of a device that computes in dlfloat16, such as RBLN-CA25",
    ),
    Meaning(
        r"No module named 'rebel\.|cannot import name '\w+' from 'rebel",
        "this rebel-compiler has no Triton of its own",
        hint="it has one from 0.10 on",
    ),
)
"""Every message that is understood. All that apply are reported, each once."""

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_DATA = (npu.LoadOp, npu.StoreOp, npu.DynLoadOp, npu.DynStoreOp)


def understood(output: str, operator: Operator, program: Program) -> tuple[tuple[Diagnostic, ...], tuple[str, ...]]:
    """What a compiler's output says about a kernel.

    Args:
        output: everything that it wrote.
        operator: what it was to compile.
        program: the operator's program for the tensors that it was to be compiled for.

    Returns:
        Findings in the order of the source, all of them errors, and remarks about what is not in the source.
    """
    text = _ESCAPES.sub("", output)
    found: dict[tuple[str, Span], Diagnostic] = {}
    remarks = []
    for meaning in MEANINGS:
        matches = list(re.finditer(meaning.pattern, text))
        if not matches:
            continue
        if not meaning.code:
            remarks.append(f"{meaning.message}; {meaning.hint}" if meaning.hint else meaning.message)
            continue
        blamed = dict.fromkeys(each.groupdict().get("function") or "" for each in matches)
        functions = tuple(each for each in blamed if each) or meaning.functions
        for span, hint in _places(meaning, functions, operator, program):
            one = Diagnostic(meaning.code, "error", meaning.message, span, hint, operator.profile)
            found.setdefault((one.code, one.span), one)
    return tuple(sorted(found.values(), key=lambda each: (each.span, each.code))), tuple(remarks)


def ending(status: int) -> str:
    """How a process ended, as a sentence; "" if it ended well."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"the compiler crashed ({name})"
    return f"the compiler failed with exit status {status}" if status else ""


def sources_of(operator: Operator) -> dict[str, SourceFile]:
    """The files that an operator's kernel and the functions that it uses stand in, by path."""
    return {each.module.source.path: each.module.source for each in functions_of(operator)}


def _places(
    meaning: Meaning, functions: tuple[str, ...], operator: Operator, program: Program
) -> Iterator[tuple[Span, str]]:
    """Where a kernel does what a message is about, and what to do there instead."""
    jitted = functions_of(operator)
    found = False
    for each in jitted:
        for call, name in _calls(each, functions, meaning.keyword):
            found = True
            yield each.module.source.span(call), meaning.hint or _HINTS.get(name, "")
    if meaning.data:
        for span in _data_of_other_dtypes(program):
            found = True
            yield _whole(span, jitted), meaning.hint
    if not found:
        yield _header(jitted[-1]), meaning.hint


def _calls(function: Jitted, names: tuple[str, ...], keyword: str) -> Iterator[tuple[ast.Call, str]]:
    """The calls of functions of the language, or of methods that are the same."""
    for call in ast.walk(function.node):
        if not isinstance(call, ast.Call) or (keyword and keyword not in {each.arg for each in call.keywords}):
            continue
        named = function.module.language_object(call.func)
        if isinstance(named, Builtin):
            name = named.name
        elif isinstance(call.func, ast.Attribute) and not _is_of_module(function, call.func.value):
            name = call.func.attr
        else:
            continue
        if name in names:
            yield call, name


def _is_of_module(function: Jitted, node: ast.expr) -> bool:
    return function.module.dotted(node).partition(".")[0] in {
        each.partition(".")[0] for each in function.module.imports.values()
    }


def _data_of_other_dtypes(program: Program) -> list[Span]:
    """Where blocks of anything but float32 are loaded or stored."""
    spans = []
    for operation in program.module.walk():
        if isinstance(operation, _DATA):
            block = operation.block.type
            if isinstance(block, MemRefType) and not isinstance(block.element_type, Float32Type):
                spans.append(span_of(operation.location))
    return list(dict.fromkeys(spans))


def _whole(span: Span, jitted: tuple[Jitted, ...]) -> Span:
    """The call that begins at a place of a program, which knows its files by their names only."""
    for each in jitted:
        source = each.module.source
        for node in ast.walk(each.node):
            if isinstance(node, ast.Call) and Path(source.path).name == Path(span.file).name:
                whole = source.span(node)
                if (whole.line, whole.column) == (span.line, span.column):
                    return whole
    return span


def _header(function: Jitted) -> Span:
    """``def`` and the name of a function."""
    whole = function.module.source.span(function.node)
    text = function.module.source.line(whole.line)[whole.column - 1 :]
    match = re.match(r"def\s+\w+", text)
    return Span(whole.file, whole.line, whole.column, whole.line, whole.column + (match.end() if match else len(text)))
