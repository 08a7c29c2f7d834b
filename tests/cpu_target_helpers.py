"""What the tests of the compiled CPU target share: where they run, programs of their own, lines of a kernel."""

import inspect
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import triton

import tilewright.cpu

if triton.knobs.runtime.interpret:
    pytest.skip("Triton's own interpreter is on, under which nothing is compiled", allow_module_level=True)

NO_ACCELERATOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="the accelerator is Triton's default")
EXECUTORS = ["native", "interpreter"]
OURS = ("TRITON_INTERPRET", "TILEWRIGHT_CPU_SANITIZE", "TILEWRIGHT_CPU_EXECUTOR", "CC")


def on_the_processor():
    """Where there is an accelerator, Triton has to be told."""
    return tilewright.cpu.active() if torch.accelerator.is_available() else nullcontext()


def run_program(program, folder, **environment):
    """Run a program in a process of its own; what it prints. Its kernels need a file for Triton to read."""
    file = folder / "program.py"
    file.write_text(program, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, str(file)],
        env=clean | {"TRITON_CACHE_DIR": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def line_of(kernel, text):
    """The file, the number of the line that holds the text, the line itself, and the text's column, counted from 0."""
    lines, first = inspect.getsourcelines(kernel.fn)
    (place,) = (k for k, line in enumerate(lines) if text in line)
    line = lines[place].rstrip("\n")
    return inspect.getsourcefile(kernel.fn), first + place, line, line.index(text)


def assert_points_at(message, kernel, text):
    """The message starts with file, line and column of the text in a kernel and shows the line with a caret below it.

    The caret stands at the start of a word within what follows the text: some versions of Triton give the place of an
    operation's last argument.
    """
    file, number, line, column = line_of(kernel, text)
    head, source, caret = message.splitlines()[:3]
    place, _, rest = head.partition(": ")
    name, at_line, at_column = place.rsplit(":", 2)
    assert (name, int(at_line)) == (file, number)
    assert rest
    assert source.strip() == line.strip()
    assert caret.strip() == "^"
    shift = source.index(line.lstrip()) - line.index(line.lstrip())
    at = caret.index("^") - shift
    assert at >= column
    assert line[at].strip()
    assert not line[at - 1].isalnum()
    assert int(at_column) == at + 1  # counted from 1, as compilers and editors do
