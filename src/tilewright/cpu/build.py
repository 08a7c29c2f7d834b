"""From C to a shared object that is loaded, kept in Triton's cache."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from tilewright.errors import KernelBuildError
from tilewright.platforms.cpu import c_compiler

OUTLINED = "tw_nest_0("
"""What a kernel of many nests contains, which are written as functions then."""

MOST_KIB = 8 << 20
"""Memory that the C compiler may take: a kernel that needs more fails, and the machine does not."""

MOST_SECONDS = 300
"""Time that the C compiler may take."""


@lru_cache(maxsize=1)
def machine() -> str:
    """What native code depends on besides its text: the compiler, its version and the processor's features."""
    path = c_compiler()
    if path is None:
        return "no C compiler"
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return f"{path} {version} {platform.machine()} {' '.join(sorted(_features()))}"


@lru_cache(maxsize=1)
def _features() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def flags(fuse_multiply_add: bool) -> list[str]:
    """The options of the compiler.

    None of them lets it take NaN, infinity or the sign of zero for impossible, or change the order of a sum: ours is
    fixed by the loop program. Partial redundancy elimination stays off, as it turns selections into branches, which
    keeps loops from being vectorised.
    """
    found = ["-std=gnu11", "-O3", "-fopenmp", "-shared", "-fPIC", "-w"]
    found += ["-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
    found += [f"-ffp-contract={'fast' if fuse_multiply_add else 'off'}"]
    found += ["-mcpu=native"] if platform.machine() in {"aarch64", "arm64"} else ["-march=native"]
    if "avx512f" in _features():
        found.append("-mprefer-vector-width=512")
    if "clang" not in machine():
        found.append("-fno-tree-pre")
    return found


def shared_object(source: str, name: str, fuse_multiply_add: bool) -> str:
    """The path of the shared object built from a C file, built now unless the cache holds it.

    Raises:
        KernelBuildError: there is no compiler, or it rejects the file.
    """
    from triton.runtime.cache import get_cache_manager

    path = c_compiler()
    if path is None:
        raise KernelBuildError("there is no C compiler: install gcc or clang, or set CC")
    options = flags(fuse_multiply_add)
    if OUTLINED in source and "clang" not in machine():
        options.append("-fno-ivopts")  # whose time and memory grow out of bounds over deep nests
    key = hashlib.sha256("\0".join([source, machine(), *options]).encode()).hexdigest()
    cache = get_cache_manager(key)
    file_name = f"{name[:100]}.so"
    known: str | None = cache.get_file(file_name)
    if known is not None:
        return known
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        c_file, so_file = Path(folder, f"{name[:100]}.c"), Path(folder, file_name)
        c_file.write_text(source, encoding="utf-8")
        limited = ["/bin/sh", "-c", f'ulimit -v {MOST_KIB} 2>/dev/null; exec "$@"', "sh"]
        command = [*limited, path, *options, str(c_file), "-o", str(so_file), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise KernelBuildError(f"{path} has not built the kernel '{name}' in {MOST_SECONDS} s") from error
        if done.returncode:
            raise KernelBuildError(f"{path} cannot build the kernel '{name}':\n{done.stderr[-4000:]}")
        cache.put(source, f"{name[:100]}.c", binary=False)
        built: str = cache.put(so_file.read_bytes(), file_name, binary=True)
    return built


def load(path: str) -> ctypes.CDLL:
    """Load a shared object. torch is loaded first, so that both use one OpenMP and its number of threads.

    Raises:
        KernelBuildError: it cannot be loaded.
    """
    import torch  # noqa: F401 - for its OpenMP

    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise KernelBuildError(f"the native code of a kernel cannot be loaded: {error}") from error
