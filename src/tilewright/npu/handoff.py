"""Handing a kernel over to the vendor's compiler, where that is installed: compiled, run, and compared with the CPU.

Everything here follows what is public about ``rebel``: its documentation, and the projects that call it. No NPU and no
copy of the compiler were at hand, so it was only ever run against a double of them that the tests have.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from tilewright.errors import ArgumentError, MissingDependencyError, NpuHandoffError
from tilewright.npu import handoff_runner
from tilewright.npu.check.host import NAMESPACE
from tilewright.npu.device_file import device_module
from tilewright.npu.diagnostics import failure
from tilewright.npu.ir.dialect import MatmulOp
from tilewright.npu.profiles import profile as profile_of
from tilewright.npu.shim import real_rebel
from tilewright.npu.vendor_messages import ending, sources_of, understood
from tilewright.numerics import device_difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tilewright.npu.operator import Operator
    from tilewright.npu.program import Program

_MISSING = (
    "hand_off: the vendor's compiler is not installed: there is no package 'rebel'. Install rebel-compiler 0.10 or "
    "newer from Rebellions (https://docs.rbln.ai); where there is no NPU it can compile only. Without it, an operator "
    "runs on the CPU when it is called, and tilewright.npu.device_file.device_module writes the file for the compiler"
)
_FALLBACK = "Fallback to eager execution"
_LAST_LINES = 20
_NOISE = (" ", "Traceback (most recent call last)", "Set TORCHDYNAMO_VERBOSE=1")
_NOT_INHERITED = ("RBLN_WRITE_RTOSA", "TRITON_BACKENDS_IN_TREE", "TRITON_CACHE_DIR", "TRITON_INTERPRET")
"""Variables that would make the compiler do something else, or use what it has compiled for others."""


@dataclass(frozen=True)
class HandOffOptions:
    """How a kernel is handed over.

    Attributes:
        target_soc: the device to compile for, such as ``"RBLN-CA25"``; "" for the one that is there.
        compile_only: compile, and run nothing: that needs no NPU.
        timeout: seconds after which the compiler is stopped.
        keep: a folder, empty or new, for all files of the run, the compiler's own included, after a failure as well;
            None keeps nothing.
        environment: more variables for the compiler's process, such as ``{"RBLN_DEVICES": "0"}``.
        compare_mutated: whether tensors that are changed in place are compared. A release that keeps them on the
            device, and copies nothing back, needs False.
    """

    target_soc: str = ""
    compile_only: bool = False
    timeout: float = 600.0
    keep: str | os.PathLike[str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    compare_mutated: bool = True


@dataclass(frozen=True, eq=False)
class HandOffResult:
    """What the vendor's compiler and its device made of an operator.

    Attributes:
        outputs: the operator's outputs; none where nothing was run.
        mutated: the tensors that are changed in place, as they came back, by name.
        errors: the greatest absolute difference from the CPU's run, by the names of the kernel's tensors.
        compute_dtype: what each operation of the CPU's run was rounded to.
        compiler: the compiler's version; "" if it does not tell.
        seconds: what the compiler's process took.
        stdout: what it wrote.
        stderr: what it wrote as errors and warnings.
        folder: where its files are; None if they were not kept.
    """

    outputs: tuple[torch.Tensor, ...]
    mutated: dict[str, torch.Tensor]
    errors: dict[str, float]
    compute_dtype: str
    compiler: str
    seconds: float
    stdout: str
    stderr: str
    folder: Path | None

    def __str__(self) -> str:
        if not self.errors:
            return f"compiled by rebel {self.compiler} in {self.seconds:.1f} s; nothing was run"
        shown = ", ".join(f"{name} {error:.3e}" for name, error in self.errors.items())
        return f"rebel {self.compiler} agrees with the CPU in {self.compute_dtype}; greatest differences: {shown}"


def hand_off(operator: Operator, *tensors: torch.Tensor, options: HandOffOptions | None = None) -> HandOffResult:
    """Compile an operator with the vendor's compiler, run it, and compare what it gives with the CPU's run.

    The compiler works in a process and a folder of its own, in strict mode, which forbids it to fall back to Python.
    The CPU's run rounds every operation as the profile says that the device does;
    :func:`tilewright.numerics.device_difference` says how far the two may be apart.

    Args:
        operator: what :func:`tilewright.npu.register` made of a kernel, with a profile of the back end ``"rbln"``.
        tensors: its arguments. They are copied; nothing is changed in place.
        options: how it is handed over.

    Returns:
        What came back.

    Raises:
        MissingDependencyError: the compiler is not installed.
        ArgumentError: the arguments do not fit the operator, or the folder to keep is not empty.
        NpuKernelError: with these shapes the kernel breaks rules of the profile.
        NpuHandoffError: the compiler failed, crashed, took too long or fell back, or the results differ. What it said
            about the kernel is in ``diagnostics``, and in the message with its lines.
    """
    options = options or HandOffOptions()
    if not real_rebel():
        raise MissingDependencyError(_MISSING)
    if profile_of(operator.profile).backend != "rbln":
        raise ArgumentError("hand_off", "operator", f"profile '{operator.profile}' is not one of RBLN")
    if len(tensors) != len(operator.inputs):
        raise ArgumentError("hand_off", "tensors", f"got {len(tensors)}, expected {', '.join(operator.inputs)}")
    given = {name: _copy(each) for name, each in zip(operator.inputs, tensors, strict=True)}
    run = _HandOff(operator, operator.program(given), given, options)
    with _folder(options.keep) as folder:
        return run.run(folder)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _folder(keep: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder to keep, or one that is removed in the end."""
    if keep is None:
        with TemporaryDirectory(prefix="tilewright-npu-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    folder = Path(keep).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ArgumentError("hand_off", "keep", f"{folder} is not empty")
    yield folder


@dataclass(frozen=True)
class _HandOff:
    operator: Operator
    program: Program
    given: dict[str, torch.Tensor]
    options: HandOffOptions

    def run(self, folder: Path) -> HandOffResult:
        """Everything that happens in a folder."""
        expected = self._expected()
        self._write(folder)
        start = time.perf_counter()
        status = self._call(folder)
        seconds = time.perf_counter() - start
        stdout, stderr = (
            (folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout.txt", "stderr.txt")
        )
        output = f"{stdout}\n{stderr}"
        results = folder / "results.pt"
        if status != 0 or _FALLBACK in output or not results.exists():
            raise self._failed(output, status)
        back = torch.load(results, weights_only=True)
        outputs, mutated = tuple(back["outputs"]), dict(back["mutated"])
        errors: dict[str, float] = {}
        if self.options.compile_only:
            outputs, mutated = (), {}
        else:
            compared = dict(zip(self.operator.outputs, outputs, strict=True))
            errors = self._compare(compared | (mutated if self.options.compare_mutated else {}), expected)
        kept = None if self.options.keep is None else folder
        dtype = self.program.manifest.compute_dtype
        return HandOffResult(outputs, mutated, errors, dtype, back["compiler"], seconds, stdout, stderr, kept)

    def _expected(self) -> dict[str, torch.Tensor]:
        """What the CPU makes of the arguments: outputs, and what is changed in place, by name."""
        if self.options.compile_only:
            return {}
        operator = self.operator
        copies = {name: _copy(each) for name, each in self.given.items()}
        results = operator(*copies.values(), compute_dtype=self.program.manifest.compute_dtype)
        outputs = (results,) if isinstance(results, torch.Tensor) else results
        return dict(zip(operator.outputs, outputs, strict=True)) | {name: copies[name] for name in operator.mutated}

    def _write(self, folder: Path) -> None:
        operator = self.operator
        job = {
            "operator": operator.name,
            "namespace": NAMESPACE,
            "inputs": operator.inputs,
            "mutated": operator.mutated,
            "modes": ["strict", *(["compile_only"] if self.options.compile_only else [])],
        }
        (folder / "device_module.py").write_text(device_module(operator), encoding="utf-8")
        (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
        shutil.copyfile(handoff_runner.__file__, folder / "run.py")
        torch.save(self.given, folder / "inputs.pt")
        for name in ("triton", "cache"):
            (folder / name).mkdir()

    def _environment(self, folder: Path) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        # The compiler starts `python3` from PATH to compile the kernel, and that has to find what this process finds.
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
        variables["PYTHONPATH"] = os.pathsep.join(str(Path(each or ".").absolute()) for each in sys.path)
        variables["TRITON_HOME"] = str(folder / "triton")  # kernels are found there again by nothing but their name
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
        variables["RBLN_USE_CUSTOM_KERNEL"] = "1"
        if self.options.target_soc:
            variables["RBLN_TARGET_SOC"] = self.options.target_soc
        return {**variables, **self.options.environment}

    def _call(self, folder: Path) -> int:
        """Run the compiler's process; its exit status."""
        command = [sys.executable, "run.py", str(folder)]
        with (folder / "stdout.txt").open("wb") as stdout, (folder / "stderr.txt").open("wb") as stderr:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=self._environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # so that what it starts itself can be stopped with it
            )
            try:
                return process.wait(self.options.timeout)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
        message = f"hand_off: '{self.operator.name}': not finished after {self.options.timeout:g} s"
        raise NpuHandoffError(message + _last_lines((folder / "stderr.txt").read_text(errors="replace")))

    def _failed(self, output: str, status: int) -> NpuHandoffError:
        """What is raised where the compiler failed."""
        diagnostics, remarks = understood(output, self.operator, self.program)
        told = [each for each in (ending(status), *remarks) if each] or ["the compiler wrote no result"]
        what = f"hand_off: '{self.operator.name}': {'; '.join(told)}"
        if diagnostics:
            what = failure(what, diagnostics, sources_of(self.operator))
        return NpuHandoffError(what + _last_lines(output), diagnostics)

    def _compare(self, results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
        """The greatest difference of each result.

        Raises:
            NpuHandoffError: one of them is too far off.
        """
        dtype = self.program.manifest.compute_dtype
        products = any(isinstance(each, MatmulOp) for each in self.program.module.walk())
        wrong = []
        for name, result in results.items():
            reason = device_difference(result, expected[name], compute_dtype=dtype, products=products)
            if reason and name in self.given and torch.equal(result, self.given[name]):
                reason = f"came back as it was; {reason}"
            if reason:
                wrong.append(f"'{name}': {reason}")
        if wrong:
            message = (
                f"hand_off: '{self.operator.name}': the device differs from the CPU in {dtype}: {'; '.join(wrong)}"
            )
            raise NpuHandoffError(message)
        return {name: _greatest(result, expected[name]) for name, result in results.items()}


def _last_lines(text: str) -> str:
    """The end of an output without the insides of tracebacks, to be added to a message."""
    lines = [each for each in text.splitlines() if each.strip() and not each.startswith(_NOISE)]
    return "\n".join(["\nThe compiler's last lines:", *lines[-_LAST_LINES:]]) if lines else ""


def _greatest(result: torch.Tensor, expected: torch.Tensor) -> float:
    apart = (result.double() - expected.double()).abs()
    return float(apart.nan_to_num(nan=0.0).max()) if apart.numel() else 0.0
