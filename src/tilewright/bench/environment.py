"""What a number was measured on: hardware, versions, settings.

Each fact is gathered on its own, and one that cannot be had is recorded as ``{"error": ...}``. So the record can be
made where torch or Triton is missing or broken, which is when it is needed most: nothing here imports them before a
fact asks for them. The record says nothing of paths, hosts or users.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ENVIRONMENT_PREFIXES = ("TRITON_", "TILEWRIGHT_")
"""Environment variables that can change what is measured."""

OPTIONAL_PACKAGES = (
    "aiter",
    "flash-attn",
    "hypothesis",
    "liger-kernel",
    "matplotlib",
    "numpy",
    "packaging",
    "rich",
    "tile-kernels",
    "tilelang",
    "transformer-engine",
    "transformers",
)

_PATH = re.compile(r"(?:[A-Za-z]:|~)?(?:[/\\][\w.@+\-]+){2,}[/\\]?")


def collect() -> dict[str, Any]:
    """Gather the record. Raises nothing, whatever is missing.

    Example:
        >>> sorted(collect())
        ['devices', 'environment', 'machine', 'packages', 'python', 'tilewright', 'torch', 'triton']
    """
    return {
        "tilewright": _facts(version=_tilewright_version, commit=_commit),
        "python": _facts(version=platform.python_version, implementation=platform.python_implementation),
        "machine": _facts(
            platform=platform.platform,
            architecture=platform.machine,
            cpu=cpu_model,
            cores=_cores,
            memory_gib=_memory_gib,
            gpu_driver=_gpu_driver,
        ),
        "torch": _facts(
            version=lambda: str(import_module("torch").__version__),
            build=_torch_build,
            threads=lambda: int(import_module("torch").get_num_threads()),
        ),
        "triton": _facts(version=_triton_version),
        "devices": _fact(_devices),
        "environment": _fact(_variables),
        "packages": _fact(_packages),
    }


def format(record: dict[str, Any]) -> str:
    """The record for people: one fact a line, grouped."""
    lines: list[str] = []
    for group, facts in record.items():
        lines.append(group)
        lines.extend(_lines(facts, "  "))
    return "\n".join(lines)


def scrub(text: str) -> str:
    """``text`` without the folders of paths in it.

    Example:
        >>> scrub("cannot open /home/someone/lib/libexample.so: no such file")
        'cannot open .../libexample.so: no such file'
    """
    return _PATH.sub(lambda match: ".../" + re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], text)


def explain_failure(error: BaseException) -> str:
    """An error in one line, for a record."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return scrub(f"{type(error).__name__}: {first.strip()}" if first else type(error).__name__)


def _fact(gather: Callable[[], Any]) -> Any:
    try:
        return gather()
    except Exception as error:  # a broken package may raise anything
        return {"error": explain_failure(error)}


def _facts(**gatherers: Callable[[], Any]) -> dict[str, Any]:
    return {name: _fact(gather) for name, gather in gatherers.items()}


def _lines(value: Any, indent: str) -> list[str]:
    if isinstance(value, dict) and set(value) == {"error"}:
        return [f"{indent}not available ({value['error']})"]
    if isinstance(value, list):
        if not value:
            return [f"{indent}none"]
        return [
            line for index, item in enumerate(value) for line in (f"{indent}[{index}]", *_lines(item, indent + "  "))
        ]
    if not isinstance(value, dict):
        return [f"{indent}{value}"]
    if not value:
        return [f"{indent}none"]
    lines: list[str] = []
    width = max(len(str(name)) for name in value)
    for name, item in value.items():
        if isinstance(item, dict) and set(item) == {"error"}:
            lines.append(f"{indent}{name:<{width}}  not available ({item['error']})")
        elif isinstance(item, (dict, list)):
            lines.append(f"{indent}{name}")
            lines.extend(_lines(item, indent + "  "))
        else:
            lines.append(f"{indent}{name:<{width}}  {item}")
    return lines


def _tilewright_version() -> str:
    from tilewright import __version__

    return __version__


def _commit() -> str:
    """The commit of the checkout that this file is tracked in, with ``+changes`` if files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or f"git {arguments[0]} failed")
        return done.stdout.strip()

    git("ls-files", "--error-unmatch", Path(__file__).name)  # else the commit found belongs to something else
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def cpu_model() -> str:
    """The processor's name, or its architecture where it has none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpu_driver() -> str:
    for module in ("nvidia", "amdgpu"):
        version = Path("/sys/module", module, "version")
        if version.exists():
            return f"{module} {version.read_text().strip()}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return f"nvidia {done.stdout.splitlines()[0].strip()}"


def _torch_build() -> dict[str, Any]:
    """What torch was built for: every version that ``torch.version`` gives, such as that of the GPU tool kit."""
    version = import_module("torch").version
    names = [name for name in vars(version) if not name.startswith("_") and name != "annotations"]
    return {
        name: getattr(version, name)
        for name in sorted(names)
        if isinstance(getattr(version, name), (str, bool, int)) and getattr(version, name) != ""
    }


def _triton_version() -> str:
    return str(import_module("triton").__version__)


def _devices() -> list[dict[str, Any]]:
    """One record for each accelerator that torch sees."""
    torch = import_module("torch")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator.type)
    return [_device(module, accelerator.type, index) for index in range(torch.accelerator.device_count())]


def _device(module: Any, kind: str, index: int) -> dict[str, Any]:
    properties = _fact(lambda: module.get_device_properties(index))
    if isinstance(properties, dict):
        return {"type": kind, "properties": properties}

    def attribute(*names: str) -> Any:
        return next((getattr(properties, name) for name in names if hasattr(properties, name)), None)

    return {
        "type": kind,
        "name": attribute("name"),
        "architecture": attribute("gcnArchName", "architecture"),
        "capability": _fact(lambda: ".".join(str(part) for part in module.get_device_capability(index))),
        "memory_gib": _fact(lambda: round(attribute("total_memory") / 2**30, 1)),
        "l2_bytes": attribute("L2_cache_size", "last_level_cache_size"),
        "units": attribute("multi_processor_count", "gpu_subslice_count"),
    }


def _variables() -> dict[str, str]:
    chosen = sorted(name for name in os.environ if name.startswith(ENVIRONMENT_PREFIXES))
    return {name: scrub(os.environ[name]) for name in chosen}


def _packages() -> dict[str, str]:
    """Versions of installed optional packages, read from their metadata: nothing is imported."""
    found: dict[str, str] = {}
    for name in OPTIONAL_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    """Print the record, for a machine on which nothing else of tilewright works."""
    sys.stdout.write(format(collect()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
