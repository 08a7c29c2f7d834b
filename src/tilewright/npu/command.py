"""``tilewright npu``: check kernels for an NPU, compile them, run one on the CPU; list rules and profiles."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import ArgumentError
from tilewright.optional import require

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from tilewright.npu.check import Report

    Run = Callable[[argparse.Namespace], int]

_SUMMARY = "write kernels for an NPU: check, compile and run them, without the NPU and its compiler"
_FOUND = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command, and the commands under it, to those of the command line."""
    parser = commands.add_parser("npu", help=_SUMMARY, description=_SUMMARY)
    inner = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(inner)
    _add_compile(inner)
    _add_demo(inner)
    _add_rules(inner)
    _add_profiles(inner)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Run, summary: str
) -> argparse.ArgumentParser:
    def with_xdsl(arguments: argparse.Namespace) -> int:
        require("xdsl", f"tilewright npu {name}", extra="npu")
        return run(arguments)

    made = commands.add_parser(name, help=summary, description=summary)
    made.set_defaults(run=with_xdsl)
    return made


def _add_profile(parser: argparse.ArgumentParser) -> None:
    from tilewright.npu.profiles import DEFAULT_PROFILE

    told = f"the release of a compiler to check for (default: {DEFAULT_PROFILE}); `tilewright npu profiles` lists them"
    parser.add_argument("--profile", default=DEFAULT_PROFILE, metavar="NAME", help=told)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "hold files of kernels against every rule; the exit status is 1 if one has an error"
    parser = _command(commands, "check", _check, summary)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, or a folder to search for files with kernels")
    _add_profile(parser)
    parser.add_argument(
        "--format", choices=["text", "json", "sarif"], default="text", help="of the findings (default: text)"
    )
    parser.add_argument("--output", metavar="PATH", help="write the findings there instead of printing them")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for a warning as well")


def _check(arguments: argparse.Namespace) -> int:
    from tilewright.npu.check import check_files

    report = check_files(arguments.files, arguments.profile)
    text = _rendered(report, arguments.format)
    if arguments.output is not None:
        _write(arguments.output, text)
        print(f"{_counted(report)}; written to {arguments.output}")
    elif arguments.format == "text":
        print(f"{text}\n{_counted(report)}" if text else _counted(report))
    else:
        print(text)
    return _FOUND if report.errors or (arguments.strict and report.warnings) else 0


def _rendered(report: Report, form: str) -> str:
    from tilewright.npu.check.render import to_json, to_sarif

    if form == "text":
        return str(report)
    return json.dumps(to_json(report) if form == "json" else to_sarif(report), indent=2)


def _write(output: str, text: str) -> None:
    from tilewright.files import replace_text

    try:
        replace_text(Path(output), f"{text}\n" if text else "")
    except OSError as error:
        raise ArgumentError("npu check", "output", f"'{output}' cannot be written: {error}") from error


def _counted(report: Report) -> str:
    """How much was found, in one line."""
    found = [_number(len(report.errors), "error"), _number(len(report.warnings), "warning")]
    if report.ignored:
        found.append(f"{report.ignored} ignored")
    return f"{', '.join(found)} in {_number(len(report.sources), 'file')} ({report.profile})"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s'[: count != 1]}"


def _add_compile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "compile a kernel of a file for tensors of given shapes, without running the file, and write a bundle"
    parser = _command(commands, "compile", _compile, summary)
    parser.add_argument("file", metavar="FILE", help="the kernel's file")
    parser.add_argument("--kernel", required=True, help="its name")
    parser.add_argument(
        "--args",
        nargs="+",
        default=[],
        metavar="ARG",
        help="its arguments, as NAME=VALUE or in their order: tensors such as 'f32[1,64]', numbers. Outputs, and "
        "constexprs that are a dimension of a tensor, may be left out",
    )
    parser.add_argument("--align", nargs="+", default=[], metavar="NAME", help="inputs to pad to a multiple of 64")
    parser.add_argument("--host-layout", default="", metavar="1:2:3", help="tensors that stay in the host's layout")
    parser.add_argument("--name", help="of the operator (default: the kernel's)")
    parser.add_argument("--output", default="npu-bundles", metavar="FOLDER", help="of bundles (default: npu-bundles)")
    _add_profile(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _compile(arguments: argparse.Namespace) -> int:
    from tilewright.npu import artifact
    from tilewright.npu.kernel import FileKernel
    from tilewright.npu.operator import compile_operator
    from tilewright.npu.specs import parse_arguments

    kernel = FileKernel(arguments.file, arguments.kernel)
    given = parse_arguments(kernel.arg_names, arguments.args)
    program = compile_operator(
        kernel,
        given,
        name=arguments.name,
        align=arguments.align,
        host_layout=arguments.host_layout,
        profile=arguments.profile,
    )
    folder = artifact.save(program, arguments.output)
    if arguments.json:
        print(json.dumps({"bundle": str(folder), "manifest": program.metadata}))
        return 0
    for found in program.diagnostics:
        print(found)
    for name, told in program.describe().items():
        print(f"{name:16} {told}")
    print(folder)
    return 0


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "check, compile, print and run a decode step of flash attention, with its error in three compute dtypes"
    parser = _command(commands, "demo", _demo, summary)
    parser.add_argument("--output", metavar="FOLDER", help="keep the bundle there")
    parser.add_argument("--json", action="store_true", help="print the errors as JSON, and nothing else")


def _demo(arguments: argparse.Namespace) -> int:
    from tilewright.npu import demo

    if not arguments.json:
        demo.run(arguments.output)
        return 0
    with redirect_stdout(StringIO()):
        errors = demo.run(arguments.output)
    print(json.dumps(demo.to_json(errors)))
    return 0


def _add_rules(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "rules", _rules, "list the rules, and how hard each is for a release of a compiler")
    _add_profile(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for a program to read")


def _rules(arguments: argparse.Namespace) -> int:
    from tilewright.npu.profiles import profile
    from tilewright.npu.rules import RULES

    chosen = profile(arguments.profile)
    rows = [
        {
            "code": rule.code,
            "severity": chosen.severity(rule.code),
            "when": rule.when,
            "summary": rule.summary,
            "why": rule.why,
            "reason": chosen.severities[rule.code][1] if rule.code in chosen.severities else "",
        }
        for rule in RULES
    ]
    if arguments.json:
        print(json.dumps({"profile": chosen.name, "rules": rows}))
        return 0
    print(f"{chosen.name}: {chosen.summary}\n")
    _print_table(rows, ("code", "severity", "when", "summary"), below="reason")
    return 0


def _add_profiles(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "profiles", _profiles, "list the releases of compilers that kernels can be checked for")
    parser.add_argument("--json", action="store_true", help="print JSON for a program to read")


def _profiles(arguments: argparse.Namespace) -> int:
    from tilewright.npu.profiles import DEFAULT_PROFILE, profiles

    rows = [
        {
            "profile": each.name,
            "backend": each.backend,
            "summary": each.summary,
            "default": "the default" if each.name == DEFAULT_PROFILE else "",
        }
        for each in profiles().values()
    ]
    if arguments.json:
        print(json.dumps({"default": DEFAULT_PROFILE, "profiles": rows}))
        return 0
    _print_table(rows, ("profile", "backend", "summary"), below="default")
    return 0


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], below: str) -> None:
    """Print rows under each other; the last column is as long as it is, and a remark stands in a line of its own."""
    widths = [max(len(each) for each in (column, *(row[column] for row in rows))) for column in columns[:-1]]
    indent = " " * (sum(widths) + 2 * len(widths))
    for row in ({column: column.upper() for column in columns}, *rows):
        cells = [row[column].ljust(width) for column, width in zip(columns, widths, strict=False)]
        print("  ".join([*cells, row[columns[-1]]]))
        if row.get(below):
            print(f"{indent}({row[below]})")
