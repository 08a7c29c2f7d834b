"""``tilewright npu demo``: a decode step of flash attention from its source to its result, on a CPU."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from tilewright.npu import artifact
from tilewright.npu.check import check_file
from tilewright.npu.ir.text import print_program
from tilewright.npu.kernels import OPERATORS
from tilewright.npu.profiles import DEFAULT_PROFILE
from tilewright.npu.rounding import COMPUTE_DTYPES

if TYPE_CHECKING:
    from tilewright.npu.program import Program

_KERNEL = "flash_causal_attention_naive_decode"
_SHOWN = 36  # lines of the program

_MISTAKES = """\
from rebel import triton
from rebel.triton import language as tl


@triton.jit
def row_maximum(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x_block = tl.make_block_ptr(
        base=x_ptr, shape=(1, ROWS, COLUMNS), strides=(ROWS * COLUMNS, COLUMNS, 1), offsets=(0, 0, 0),
        block_shape=(1, ROWS, COLUMNS), order=(2, 1, 0),
    )
    x = tl.exp2(tl.load(x_block))
    tl.store(out_ptr + tl.program_id(0), tl.max(x, axis=2))
"""


@dataclass(frozen=True)
class Error:
    """How far a result is from the truth.

    Attributes:
        compute_dtype: what each operation's result was rounded to.
        greatest: the greatest absolute error of an element.
        relative: root mean square of the error over that of the truth.
        seconds: what the run took.
    """

    compute_dtype: str
    greatest: float
    relative: float
    seconds: float


@dataclass(frozen=True)
class Case:
    """One decode step: 32 query heads on 8 heads of keys and values, 4 partitions of 1024 rows.

    Attributes:
        batch: sequences.
        heads: heads of keys and values.
        group: query heads for each of them.
        head_dim: size of a head.
        partition: rows of a partition.
        partitions: how many a sequence has.
        position: rows that are in the cache already.
    """

    batch: int = 1
    heads: int = 8
    group: int = 4
    head_dim: int = 128
    partition: int = 1024
    partitions: int = 4
    position: int = 3300

    def tensors(self) -> dict[str, torch.Tensor]:
        """The operator's arguments: random data, a cache in permuted blocks."""
        generator = torch.Generator().manual_seed(0)
        blocks = self.partitions + 2

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator)

        starts = torch.arange(self.partitions) * self.partition
        return {
            "query": draw(self.batch, self.heads, self.group, 1, self.head_dim),
            "key": draw(self.batch, self.heads, 1, 1, self.head_dim),
            "value": draw(self.batch, self.heads, 1, 1, self.head_dim),
            "kv_cache": draw(2, blocks, self.heads, 1, self.partition, self.head_dim),
            "qk_scale": torch.tensor(self.head_dim**-0.5),
            "seq_idx": (self.position - starts).clamp(0, self.partition).to(torch.int32)[None],
            "block_table": torch.randperm(blocks, generator=generator)[: self.partitions].to(torch.int32)[None],
            "dummy": torch.tensor(0.0),
        }


def truth(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Attention of the step in float64 over the rows gathered from the cache, [1, heads, group, 1, head_dim]."""
    rows = tensors["kv_cache"][:, tensors["block_table"][0].long()].double()  # [2, partitions, heads, 1, rows, d]
    rows = rows.squeeze(3).transpose(1, 2).flatten(2, 3)[:, :, : int(tensors["seq_idx"].sum())]
    keys, values = (
        torch.cat((old, tensors[name][0, :, 0].double()), 1) for old, name in zip(rows, ("key", "value"), strict=True)
    )
    scores = tensors["query"][0].flatten(1, 2).double() @ keys.transpose(1, 2) * tensors["qk_scale"].double()
    return (scores.softmax(-1) @ values).reshape(tensors["query"].shape)


def run(output: str | None = None, case: Case | None = None) -> list[Error]:
    """Check, compile, print and run a decode step, and show its error in three compute dtypes.

    Args:
        output: a folder to write the bundle to; None writes it nowhere that lasts.
        case: the step.

    Returns:
        The error for each compute dtype.
    """
    _check()
    program = _compile(output, case or Case())
    _show(program)
    return _errors(case or Case())


def _check() -> None:
    print("1. Check\n")
    path = OPERATORS[_KERNEL].kernel.module.source.path
    report = check_file(path)
    print(f"{Path(path).name}: {len(report.errors)} errors, {len(report.warnings)} warnings ({DEFAULT_PROFILE})")
    print("A kernel with mistakes, all of them told at once:\n")
    with TemporaryDirectory() as folder:
        wrong = Path(folder) / "row_maximum.py"
        wrong.write_text(_MISTAKES)
        print(str(check_file(str(wrong))).replace(f"{folder}/", ""))


def _compile(output: str | None, case: Case) -> Program:
    print("\n2. Compile\n")
    start = time.perf_counter()
    program = OPERATORS[_KERNEL].program(case.tensors())
    print(f"{program.name} in {time.perf_counter() - start:.2f} s")
    for name, told in program.describe().items():
        print(f"  {name:12} {told}")
    with TemporaryDirectory() as folder:
        bundle = artifact.save(program, output or folder)
        print(f"bundle {bundle if output else bundle.name}")
        for file in sorted(bundle.iterdir()):
            print(f"  {file.name:20} {file.stat().st_size:7} bytes")
        artifact.load(bundle)
    print("read again and verified")
    return program


def _show(program: Program) -> None:
    print("\n3. The program\n")
    lines = print_program(program.module, locations=False, readable=True).splitlines()
    print("\n".join(line if len(line) <= 160 else line[:157] + "..." for line in lines[:_SHOWN]))
    print(f"... {len(lines) - _SHOWN} more lines")


def _errors(case: Case) -> list[Error]:
    print("\n4. Run on the CPU, each operation rounded as a device would\n")
    operator = OPERATORS[_KERNEL]
    expected = truth(case.tensors())
    found = []
    for compute_dtype in COMPUTE_DTYPES:
        tensors = case.tensors()
        start = time.perf_counter()
        result = operator(*tensors.values(), compute_dtype=compute_dtype)
        seconds = time.perf_counter() - start
        error = (result - expected).abs()
        relative = float(error.square().mean().sqrt() / expected.square().mean().sqrt())
        found.append(Error(compute_dtype, float(error.max()), relative, seconds))
    print(f"{'compute dtype':14} {'greatest error':>15} {'relative error':>15} {'seconds':>9}")
    for each in found:
        print(f"{each.compute_dtype:14} {each.greatest:15.2e} {each.relative:15.2e} {each.seconds:9.3f}")
    return found


def to_json(errors: list[Error]) -> list[dict[str, object]]:
    """The errors as plain data."""
    return [asdict(each) for each in errors]
