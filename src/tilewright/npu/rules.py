"""The rules that a kernel for an NPU is held against, as data. Profiles say how hard each of them is for a release."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.errors import UnknownNameError


@dataclass(frozen=True)
class Rule:
    """A rule of the checker.

    Attributes:
        code: its stable name.
        severity: what breaking it is where a profile says nothing else.
        summary: the rule, in one sentence.
        why: what happens otherwise, or where the rule comes from.
        when: when it can be seen: ``"file"`` by reading the file, ``"kernel"`` by interpreting a kernel, with symbols
            for sizes or with the sizes of a compilation (SYNTAX and GRID also by reading), ``"run"`` only with values.
    """

    code: str
    severity: str
    summary: str
    why: str
    when: str = "kernel"


_E, _W = "error", "warning"
_DOC = "Rebellions' documentation of Triton on RBLN"
_SEEN = "seen in continuous integration on RBLN-CA22 and CA25"
_USED = "how every kernel of vLLM-RBLN is written"

RULES: tuple[Rule, ...] = (
    Rule("SYNTAX", _E, "A kernel is written in the part of Python that can be compiled.", "there is no other meaning"),
    Rule(
        "NAME", _E, "Every name in a kernel is a parameter, a local variable or a name of its module.", "as in Python"
    ),
    Rule("SHAPE", _E, "Operands have shapes that fit together.", "as in Triton"),
    Rule("STATIC_ASSERT", _E, "A static_assert holds.", "the kernel's author says so"),
    Rule("RANGE", _E, "Loops are tl.static_range with constexpr bounds.", _DOC),
    Rule("DYN_SHAPE", _E, "Every size is a tl.constexpr: shapes are static.", _DOC),
    Rule("KEEP_DIMS", _E, "tl.max and tl.sum have keep_dims=True.", _DOC),
    Rule(
        "REDUCE_AXIS", _E, "Reductions are over the last axis.", f"the device reduces the last dimension only; {_SEEN}"
    ),
    Rule("REDUCE_STORE", _E, "A reduced value feeds an operation of full rank; it is not stored itself.", _SEEN),
    Rule("RAWPTR", _E, "Memory is accessed through block pointers, without masks.", _DOC),
    Rule("BOUNDARY_CHECK", _E, "Loads and stores have neither boundary_check nor padding_option.", _USED),
    Rule("OUT_OF_BOUNDS", _E, "A block lies inside its tensor.", "the device checks nothing"),
    Rule("RANK", _E, "Data has rank 2 to 6, tables of indices have rank 1 or 2.", _SEEN),
    Rule("SCALAR_PARAM", _E, "A parameter is a tensor or a constexpr; a 0-d tensor is only ever multiplied.", _USED),
    Rule("DOT_SHAPE", _E, "tl.dot takes two tensors of equal rank, batch and inner sizes, and nothing else.", _USED),
    Rule("DOT_DTYPE", _E, "Both operands of tl.dot have one dtype.", "wrappers cast all to float32"),
    Rule(
        "LAST_DIM_64", _W, "The last dimension of data is a multiple of 64.", "align_tensor_last_dim_to_64 in wrappers"
    ),
    Rule(
        "STRIDE_MISMATCH",
        _E,
        "A block pointer has the shape and the contiguous strides of its tensor.",
        "the device ignores strides: what another executor reads is something else",
    ),
    Rule("NONCONTIG_INPUT", _E, "Tensors are contiguous when a kernel is called.", "the device ignores strides"),
    Rule("MATMUL_ORDER", _W, "Operands of tl.dot are transposed, then broadcast.", "the other order is not fused"),
    Rule("GRID", _E, "The grid is (1,).", "the device runs one program"),
    Rule("PROGRAM_ID", _E, "There is no program_id.", "the device runs one program"),
    Rule(
        "WRAPPER_NAME",
        _E,
        "A module that defines an operator of a kernel K has a function K_wrapper.",
        "the compiler calls it by that name",
        "file",
    ),
    Rule("NAMESPACE", _E, "The operator of a kernel K is rbln_triton_ops::K.", "the compiler looks there", "file"),
    Rule(
        "ARG_ORDER",
        _E,
        "The operator's arguments are the kernel's tensors in their order, without the outputs.",
        "the compiler matches them by position",
        "file",
    ),
    Rule("SELF_CONTAINED", _E, "The module needs nothing of its package.", "it is compiled again alone", "file"),
    Rule(
        "MAIN_GUARD",
        _E,
        "What a module runs stands behind __name__ == '__main__' and RBLN_WRITE_RTOSA != '1'.",
        "the module is run again as a script under RBLN_WRITE_RTOSA=1 when it is compiled",
        "file",
    ),
    Rule(
        "DYN_USE",
        _E,
        "A run-time index is an offset, an index of a special operation, or asked for its partition.",
        _USED,
    ),
    Rule("DYN_IF", _E, "A run-time if asks rblib.partition_skip(index) == False.", _USED),
    Rule("INDEX_DTYPE", _E, "Tables of indices are int32.", "rtosa.to_dynamic_index takes 32-bit integers only"),
    Rule("DTYPE", _E, "Data is float32.", f"other block pointers abort the compiler; {_SEEN}"),
    Rule("OUT_ALIGN", _W, "The output is allocated before the inputs are aligned to 64.", _USED, "file"),
    Rule("PARTITION_DIV", _E, "Partitions divide the sequence, and flash attention has at least two.", _USED),
    Rule("UNSUPPORTED_OP", _E, "Only the operations that the release supports are used.", _DOC),
    Rule("OP_DOC_ONLY", _W, "Operations that are documented and fail on hardware are not used.", _SEEN),
    Rule(
        "SAME_KERNEL_NAME",
        _W,
        "Kernels have names of their own.",
        "the compiler's cache has the name for its key",
        "file",
    ),
    Rule("STRADDLE", _E, "Rows that are inserted fit into their partition.", "insert would clip them", "run"),
    Rule("BLOCK_NUMBER", _E, "Block numbers and indices lie inside their tensor.", "the device checks nothing", "run"),
    Rule(
        "UNWRITTEN_OUTPUT", _E, "Every element of an output is written.", "the rest would be what was in memory", "run"
    ),
    Rule("NAN_OUTPUT", _W, "Finite inputs give finite outputs.", "a row of attention that sees no key is NaN", "run"),
)
"""All rules. The order is that of ``tilewright npu rules``."""

_BY_CODE = {rule.code: rule for rule in RULES}


def rule(code: str) -> Rule:
    """The rule of this code.

    Raises:
        UnknownNameError: there is none.
    """
    if code not in _BY_CODE:
        raise UnknownNameError(f"there is no rule '{code}'; there are: {', '.join(_BY_CODE)}")
    return _BY_CODE[code]
