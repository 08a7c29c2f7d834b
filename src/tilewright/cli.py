"""The command line: ``tilewright list | explain | bench | fuse | npu | demo | collect-env``.

Nothing is imported before the command that needs it runs, so that ``collect-env`` works when torch or Triton does not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from tilewright.errors import ArgumentError, TilewrightError, UnknownNameError
from tilewright.optional import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tilewright.ops.contract import Arguments

EXIT_DISAGREEMENT = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for a result that is wrong, 2 for an error."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except TilewrightError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except ImportError as error:
        print(f"tilewright: error: {error}; `tilewright collect-env` says what is there", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tilewright", description="Fused Triton kernels, everywhere, explained.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print JSON for a program to read")
        return made

    command("list", _list, "list the operations and what can compute them here")

    explain = command("explain", _explain, "say which implementation serves an operation, and why")
    explain.add_argument("operation", help="a public function, such as rope_qk")
    explain.add_argument("--workload", help="a workload of the benchmark, such as 'b32 s1 h32 d128'")
    explain.add_argument("--dtype", default="bfloat16")
    explain.add_argument("--device", help="by default the accelerator, else the CPU")
    explain.add_argument("--impl", help="ask for this implementation")

    bench = command("bench", _bench, "measure an operation against its peers, or the compiled CPU target")
    bench.add_argument(
        "family",
        help="an operation family, such as rope; `cpu`: plain Triton kernels on the CPU; `fusion`: a decoder layer "
        "compiled with graph fusion and without",
    )
    bench.add_argument("--providers", nargs="+", help="what to measure (default: all that are installed)")
    bench.add_argument("--workloads", nargs="+", help="which shapes, by name (default: all)")
    bench.add_argument(
        "--directions", nargs="+", choices=["forward", "backward"], help="which of forward and backward (default: both)"
    )
    bench.add_argument("--dtype", help="of the workloads (default: bfloat16)")
    bench.add_argument("--device", help="by default the accelerator, else the CPU")
    bench.add_argument("--output", default="bench-results", help="folder for records and plots")
    bench.add_argument(
        "--quick", action=argparse.BooleanOptionalAction, help="few repetitions (default: for a family on a CPU)"
    )

    demo = command("demo", _demo, "train a small decoder with plain PyTorch parts and with tilewright's, and compare")
    demo.add_argument("--device", help="by default the accelerator, else the CPU")
    demo.add_argument("--steps", type=int, help="training steps (default: 400 on a CPU, 300 on a GPU)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output", default="report.html", help="the report to write")
    demo.add_argument("--compile", action="store_true", help="also compile, and show what graph fusion did")
    demo.add_argument("--npu", action="store_true", help="also decode through kernels for NPUs, and compare the text")

    from tilewright.fusion.command import add_parser as add_fuse
    from tilewright.npu.command import add_parser as add_npu

    add_fuse(commands)
    add_npu(commands)
    command("collect-env", _collect_env, "print what a bug report needs to say about this machine")
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from tilewright.ops import families, operation
    from tilewright.platforms import usable_device

    device = usable_device(None, "list")
    rows = [
        {
            "operation": function,
            "family": family.name,
            "summary": family.summary,
            "dtypes": [_dtype_name(dtype) for dtype in family.dtypes],
            "layouts": list(family.layouts),
            "implementations": [i.name for i in operation(function).implementations],
            "here": _explanation(function, None, None, device, None).chosen,
        }
        for family in families()
        for function in family.functions
    ]
    if arguments.json:
        print(json.dumps({"device": str(device), "operations": rows}))
        return 0
    require("rich", "tilewright list without --json")
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("family", overflow="fold")
    for head in ("operations", f"on {device}", "dtypes", "layouts"):
        table.add_column(head, no_wrap=True)  # the summary alone gives way: names are whole, each beside what serves it
    for family in families():
        mine = [row for row in rows if row["family"] == family.name]
        names, served = ([row[key] for row in mine] for key in ("operation", "here"))
        cells = (names, served, mine[0]["dtypes"], mine[0]["layouts"])
        table.add_row(f"{family.name}\n{family.summary}", *("\n".join(cell) for cell in cells))
    Console().print(table)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from tilewright.platforms import usable_device

    device = usable_device(arguments.device, "explain")
    explanation = _explanation(arguments.operation, arguments.workload, arguments.dtype, device, arguments.impl)
    print(json.dumps(explanation.to_json()) if arguments.json else explanation)
    return 0 if explanation.chosen else EXIT_DISAGREEMENT


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.family == "cpu":
        return _bench_cpu(arguments)
    if arguments.family == "fusion":
        return _bench_fusion(arguments)
    from tilewright.bench import runner

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # as a time limit sends it: what was measured by then is kept
    result = runner.run(
        arguments.family,
        device=arguments.device,
        dtype=arguments.dtype or "bfloat16",
        providers=arguments.providers,
        directions=arguments.directions or ("forward", "backward"),
        workloads=arguments.workloads,
        output=arguments.output,
        quick=arguments.quick,
        quiet=arguments.json,
    )
    if arguments.json:
        print(json.dumps(list(result.records)))
    if result.interrupted:
        print(f"interrupted; what was measured is in {result.path}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DISAGREEMENT if result.wrong else 0


def _leave_out(arguments: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(arguments, option) is not None:
            name = f"bench {arguments.family}"
            raise ArgumentError(name, option, "this benchmark has workloads of its own; leave the option out")


def _bench_fusion(arguments: argparse.Namespace) -> int:
    _leave_out(arguments, "providers", "directions", "dtype")
    from tilewright.bench import fusion

    return fusion.main(
        arguments.output,
        device=arguments.device,
        workloads=arguments.workloads,
        quick=arguments.quick,
        json_output=arguments.json,
    )


def _bench_cpu(arguments: argparse.Namespace) -> int:
    _leave_out(arguments, "providers", "workloads", "directions", "dtype", "device")
    from tilewright.bench import cpu_target

    return cpu_target.main(arguments.output, quick=bool(arguments.quick), json_output=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from tilewright.models import demo

    result = demo.run(
        device=arguments.device,
        steps=arguments.steps,
        seed=arguments.seed,
        output=arguments.output,
        json_output=arguments.json,
        quiet=arguments.json,
        compile=arguments.compile,
        npu=arguments.npu,
    )
    return 0 if result.all_agree else EXIT_DISAGREEMENT


def _collect_env(arguments: argparse.Namespace) -> int:
    from tilewright.bench import environment

    record = environment.collect()
    print(json.dumps(record, default=str) if arguments.json else environment.format(record))
    return 0


def _explanation(function: str, workload: str | None, dtype: str | None, device: torch.device, impl: str | None) -> Any:
    from tilewright.ops import operation

    args, kwargs = _sample(function, workload, dtype, device)
    return operation(function).explain(*args, **kwargs, impl=impl)


def _sample(function: str, workload: str | None, dtype: str | None, device: torch.device) -> Arguments:
    """A call of a public function: a named workload, or the first case of the test grid."""
    import torch

    from tilewright.ops import families, operation

    operation(function)  # an unknown one is an error that says so
    chosen = getattr(torch, dtype or "bfloat16", None)
    if not isinstance(chosen, torch.dtype):
        raise UnknownNameError(f"explain: torch has no dtype called '{dtype}'; try bfloat16, float16 or float32")
    family = next(family for family in families() if function in family.functions)
    if workload is None:
        return next(case for case in family.cases if case.function == function).arguments(device, chosen)
    named = {each.name: each for each in family.workloads if each.function == function}
    if workload not in named:
        raise UnknownNameError(f"explain: {function} has no workload '{workload}'; there are: {', '.join(named)}")
    return named[workload].arguments(device, chosen)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
