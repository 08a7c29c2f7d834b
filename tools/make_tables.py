"""Write the generated tables of the documentation anew: ``make docs``; with ``--check`` only say whether they are true.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` in a Markdown file. Support tables come from each
family's ``spec.py``, figures from the records under ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import preset_table

from tilewright.bench import fusion, records, report
from tilewright.npu.kernels import OPERATORS
from tilewright.npu.profiles import profile, profiles
from tilewright.npu.rules import RULES
from tilewright.npu.rules import rule as rule_of
from tilewright.ops import families, operation
from tilewright.ops.contract import Direction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tilewright.ops.contract import Family

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "benchmarks/results/README.md",
    "src/tilewright/fusion/README.md",
    "src/tilewright/npu/README.md",
    *(f"src/tilewright/ops/{member.name}/README.md" for member in families()),
)
RESULTS = ROOT / "benchmarks" / "results"
CPU = RESULTS / "cpu-amd-epyc.jsonl"
FUSION = RESULTS / "fusion-nvidia-h200-bfloat16.jsonl"
MARK = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """What the table of a family's record on the H200 shows.

    Attributes:
        family: its name.
        workloads: the rows.
        providers: the columns; those that the record has no time of are left out.
    """

    family: str
    workloads: tuple[str, ...]
    providers: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The record."""
        return RESULTS / f"{self.family}-nvidia-h200-bfloat16.jsonl"


H200 = (
    Shown(
        "rope",
        (
            "b4 s2048 h32 d128",
            "b1 s32768 h32 d128",
            "b2 s8192 h64 d128",
            "b8 s8192 h16 d64",
            "b1 s32768 h32+8 d128",
            "b4 s2048 h32 d128 interleaved",
        ),
        ("triton", "compile", "flash_attn", "liger", "triton_hf", "compile_hf", "copy"),
    ),
    Shown(
        "rms_norm",
        ("m8192 n7168", "m8192 n8192", "m4096 n32768", "m524288 n128", "m8192 n7168 residual"),
        ("triton", "compile", "torch", "liger", "flash_attn", "flashinfer", "copy"),
    ),
    Shown(
        "quant_fp8",
        (
            "norm m64 n7168 1x128",
            "norm m8192 n7168 1x128",
            "norm m32768 n7168 1x128",
            "norm m8192 n1536 1x128",
            "norm m16384 n16384 1x128",
            "add m8192 n7168 1x128",
            "norm m8192 n7168 1x128 + 1x32 ue8m0 + norm",
            "quant m32768 n7168 1x128",
            "silu m8192 n4096 1x128",
            "rope m65536 n128 1x128",
        ),
        ("triton", "two_kernels", "compile", "eager", "flashinfer", "torchao", "copy"),
    ),
    Shown(
        "qk_norm_rope",
        (
            "b256 s1 h32+8 d128",
            "b1 s2048 h32+8 d128",
            "b1 s32768 h32+8 d128",
            "b2 s8192 h64+8 d128",
            "b1 s8192 h32+8 d128 interleaved",
        ),
        ("triton", "three_kernels", "compile", "eager", "copy"),
    ),
    Shown(
        "mhc",
        (
            "pre t8192 h7168 n4",
            "pre t8192 h4096 n4",
            "pre t128 h7168 n4",
            "pre t16 h7168 n4",
            "pre t1 h7168 n4",
            "post t8192 h7168 n4",
            "post_pre t8192 h7168 n4",
            "post_pre t16 h7168 n4",
        ),
        ("triton", "tilelang", "tilekernels", "liger", "compile", "copy"),
    ),
)


def markdown(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, tuple(":--" for _ in heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def names(values: Iterable[Any]) -> str:
    """Names separated by commas."""
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def operations() -> str:
    """Every public function and what it accepts."""
    return markdown(
        ("operation", "what it does", "dtypes", "layouts", "implementations"),
        (
            (
                f"`{function}`",
                member.summary,
                names(member.dtypes),
                names(member.layouts),
                names(implementation.name for implementation in operation(function).implementations),
            )
            for member in families()
            for function in member.functions
        ),
    )


def support(member: Family) -> str:
    """What a family's contract says, in numbers and names."""
    rows = [
        ("public functions", names(f"`{name}`" for name in member.functions)),
        ("registered operators", names(f"`torch.ops.tilewright.{name}`" for name in member.operators)),
        ("dtypes", names(member.dtypes)),
        ("layouts", names(member.layouts)),
        ("valid calls in the test grid", str(len(member.cases))),
        ("calls that must raise", str(len(member.invalid_cases))),
        ("shapes in the benchmark", str(len(member.workloads))),
    ]
    return markdown(("", ""), rows)


def shares(shown: Shown) -> str:
    """Our times and shares of the copy's bandwidth of the main shapes, forward / backward if both were measured."""
    if not shown.path.exists():
        return unrecorded(shown)
    written = records.read(shown.path)
    found = {
        (record["workload"], record["provider"], record["direction"]): record
        for record in records.results(written)
        if record["status"] == "ok" and record["workload"] in shown.workloads
    }
    measured = {provider for _, provider, _ in found}
    providers = [provider for provider in shown.providers if provider in measured]
    directions = [each for each in get_args(Direction) if any(direction == each for _, _, direction in found)]

    def cell(workload: str, provider: str, value: Callable[[Any], str]) -> str:
        each = [found.get((workload, provider, direction)) for direction in directions]
        return " / ".join("-" if record is None else value(record) for record in each)

    rows = [
        (
            workload,
            cell(workload, "triton", lambda record: f"{record['single']['share']:.2f}"),
            cell(workload, "triton", lambda record: f"{record['stream']['median_us']:.1f}"),
            *(cell(workload, provider, lambda record: f"{record['stream']['share']:.2f}") for provider in providers),
        )
        for workload in shown.workloads
    ]
    heads = ("shape", "`triton` alone", "`triton`, us", *(f"`{provider}`" for provider in providers))
    return "\n".join([*report.header(written[0]), *provisos(written)]) + "\n\n" + markdown(heads, rows)


def everything(shown: Shown) -> str:
    """The whole record."""
    if not shown.path.exists():
        return unrecorded(shown)
    said = provisos(records.read(shown.path))
    return "".join(f"{sentence}\n\n" for sentence in said) + report.to_markdown(shown.path)


def unrecorded(shown: Shown) -> str:
    """What stands in for the table of a record that is still to be made."""
    return to_be_made(shown.family, shown.path)


def to_be_made(family: str, path: Path) -> str:
    """How to make a record."""
    return f"Not recorded yet; `tilewright bench {family} --output {path.parent.relative_to(ROOT)}`.\n"


def layers(path: Path) -> str:
    """Times of a decoder layer with graph fusion off and on."""
    if not path.exists():
        return to_be_made("fusion", path)
    written = records.read(path)
    environment = written[0]["environment"]
    versions = f"torch {environment['torch']['version']}, triton {environment['triton']['version']}"
    compilations = [record for record in written if record["record"] == "compilation"]
    said = "".join(f"\n{each['workload']} in {each['form']}: {fusion.told(each)}.\n" for each in compilations)
    return f"{written[0]['device']}; {versions}.\n\n{markdown(fusion.HEADS, fusion.rows(written))}{said}"


def provisos(written: list[dict[str, Any]]) -> list[str]:
    """In what a record is less than one full run."""
    runs = [record for record in written if record["record"] == "run"]
    said = (
        [f"Put together from {len(runs)} runs; environment and copy are those of the first."] if len(runs) > 1 else []
    )
    if any(run.get("interrupted") for run in runs):
        said.append("Interrupted: not all was measured.")
    if any(run["quick"] for run in runs):
        said.append("Quick: few samples of each time.")
    return said


def cpu_target(path: Path) -> str:
    """Times of plain Triton kernels on a CPU, and how many times as long the others take."""
    written = records.read(path)
    times = {
        (record["workload"], record["dtype"], record["provider"]): record["time"]["median_us"] / 1e3
        for record in written
        if record["record"] == "result" and record["status"] == "ok"
    }
    ratios = {
        (record["workload"], record["dtype"], record["ours"], record["rival"]): record["ratio"]
        for record in written
        if record["record"] == "ratio"
    }

    def against(workload: str, dtype: str, *pairs: tuple[str, str]) -> str:
        found = [ratios.get((workload, dtype, ours, rival)) for ours, rival in pairs]
        return next((f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2f}" for ratio in found if ratio is not None), "-")

    rows = []
    for workload, dtype in dict.fromkeys((workload, dtype) for workload, dtype, _ in times):
        ours = next(p for p in ("triton out", "triton") if (workload, dtype, p) in times)
        rows.append(
            (
                workload,
                dtype,
                f"{times[workload, dtype, ours]:.2f}",
                against(workload, dtype, ("triton out", "torch.compile out")),
                against(workload, dtype, ("triton", "torch.compile")),
                against(workload, dtype, ("triton out", "torch out"), ("triton", "torch")),
                against(workload, dtype, ("triton out", "interpreter"), ("triton", "interpreter")),
            )
        )
    environment = written[0]["environment"]
    machine, torch = environment["machine"], environment["torch"]
    versions = f"torch {torch['version']}, triton {environment['triton']['version']}"
    head = f"{machine['cpu']}, {torch['threads']} threads, {versions}"
    heads = (
        "kernel", "dtype", "Triton, ms", "`torch.compile`, out", "`torch.compile`", "torch", "`TRITON_INTERPRET=1`",
    )  # fmt: skip
    return f"{head}.\n\n" + markdown(heads, rows)


def npu_rules() -> str:
    """Every rule of the checker for NPUs, by the default profile."""
    chosen = profile()

    def severity(code: str) -> str:
        return chosen.severity(code) + ("*" if code in chosen.severities else "")

    return markdown(
        ("code", f"`{chosen.name}`", "rule", "why"),
        ((f"`{rule.code}`", severity(rule.code), rule.summary, rule.why) for rule in RULES),
    ) + "\n".join(
        [
            "",
            *(
                f"\\* `{code}`: otherwise {rule_of(code).severity}; {why}."
                for code, (_, why) in chosen.severities.items()
            ),
            "",
        ]
    )


def npu_profiles() -> str:
    """What kernels for NPUs can be checked and compiled for."""
    return markdown(
        ("profile", "what it is", "back end", "arithmetic"),
        ((f"`{each.name}`", each.summary, f"`{each.backend}`", each.compute_dtype) for each in profiles().values()),
    )


def npu_kernels() -> str:
    """The attention kernels for NPUs, and their arguments."""
    return markdown(
        ("operator", "arguments"),
        (
            (f"`torch.ops.tilewright_npu.{name}`", names(f"`{each}`" for each in made.inputs))
            for name, made in OPERATORS.items()
        ),
    )


def tables() -> dict[str, Callable[[], str]]:
    """Every table by its name."""
    made: dict[str, Callable[[], str]] = {
        "operations": operations,
        "cpu target": partial(cpu_target, CPU),
        "graph fusion on H200": partial(layers, FUSION),
        "presets of quant_fp8": preset_table.presets,
        "npu rules": npu_rules,
        "npu profiles": npu_profiles,
        "npu kernels": npu_kernels,
    }
    made |= {f"{shown.family} on H200": partial(shares, shown) for shown in H200}
    made |= {f"{shown.family} on H200, everything": partial(everything, shown) for shown in H200}
    return made | {f"support of {member.name}": partial(support, member) for member in families()}


def rewritten() -> Iterator[tuple[Path, str, str]]:
    """Each page, as it is and as it should be."""
    made = tables()
    for page in PAGES:
        before = (ROOT / page).read_text()
        yield ROOT / page, before, MARK.sub(lambda match: match[1] + made[match["name"]]() + match[3], before)


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description="Write the generated tables of the documentation anew.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    check = parser.parse_args().check
    stale = [(path, after) for path, before, after in rewritten() if before != after]
    for path, after in stale:
        if not check:
            path.write_text(after)
        print(f"{path.relative_to(ROOT)}: {'out of date, run make docs' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
