"""A module of kernels that breaks no rule, and what the checker finds in changed ones."""

from tilewright.npu.check.modules import check_module
from tilewright.npu.diagnostics import Diagnostics
from tilewright.npu.module import KernelModule
from tilewright.npu.profiles import DEFAULT_PROFILE, profile
from tilewright.npu.source import SourceFile

KERNEL = """\
@triton.jit
def add(x_ptr, y_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    x = tl.load(tl.make_block_ptr(x_ptr, (ROWS, COLS), (COLS, 1), (0, 0), (ROWS, COLS), (1, 0)))
    y = tl.load(tl.make_block_ptr(y_ptr, (ROWS, COLS), (COLS, 1), (0, 0), (ROWS, COLS), (1, 0)))
    tl.store(tl.make_block_ptr(out_ptr, (ROWS, COLS), (COLS, 1), (0, 0), (ROWS, COLS), (1, 0)), x + y)
"""

OPERATOR = """\
def warmup(kernel, *args):
    compiled = kernel.warmup(*args, grid=(1,), host_layout="1:2")
    rblib.write_rtosa(compiled, args)
    return compiled


@triton_op("rbln_triton_ops::add", mutates_args=())
def add_wrapper(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = (each.to(torch.float32) for each in (x, y))
    output = torch.empty_like(x)
    x, y = map(rblib.align_tensor_last_dim_to_64, (x, y))
    params = [x, y.contiguous(), output, x.shape[0], x.shape[1]]
    warmup(add, *params)
    return output


@register_fake("rbln_triton_ops::add")
def _(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
"""

IMPORTS = """\
import os

import torch
from rebel import triton
from rebel.triton import language as tl
from rebel.triton.language.extra.rbln import libdevice as rblib
from torch.library import register_fake, triton_op
"""

SCRIPT = """\
def main():
    compiled = torch.compile(torch.ops.rbln_triton_ops.add, backend="rbln")
    print(compiled(torch.ones(2, 64), torch.ones(2, 64)))


if __name__ == "__main__" and os.environ.get("RBLN_WRITE_RTOSA") != "1":
    main()
"""

MODULE = "\n\n".join((IMPORTS, KERNEL, OPERATOR, SCRIPT))

BARE = f"""\
from tilewright.npu import jit, rblib
from tilewright.npu import language as tl


{KERNEL.replace("triton.jit", "jit")}"""
"""The same kernel as this library has its own: without an operator."""


def changed(*replacements: tuple[str, str], text: str = MODULE) -> str:
    """The module with some of its text replaced; each piece is in it once."""
    for old, new in replacements:
        assert text.count(old) == 1, f"{text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def place(text: str, marked: str) -> tuple[int, int]:
    """Line and column of what stands between « and » in a piece of a text that is in it once without them."""
    before, _, _ = marked.partition("«")
    piece = marked.replace("«", "").replace("»", "")
    assert text.count(piece) == 1, f"{text.count(piece)} times: {piece}"
    until = text[: text.index(piece) + len(before)]
    return until.count("\n") + 1, len(until) - (until.rfind("\n") + 1) + 1


def checked(text: str, profile_name: str = DEFAULT_PROFILE) -> Diagnostics:
    """What the rules for files find in a module."""
    source = SourceFile("kernels.py", text)
    diagnostics = Diagnostics(profile(profile_name))
    check_module(KernelModule(source, source.parse()), diagnostics)
    return diagnostics


def places(text: str, profile_name: str = DEFAULT_PROFILE) -> list[tuple[str, int, int]]:
    """Code, line and column of each finding."""
    return [(each.code, each.span.line, each.span.column) for each in checked(text, profile_name).all]
