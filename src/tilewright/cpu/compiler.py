"""The compiler half of the back end, as Triton's plug-ins have it: options, passes, stages.

Triton finds this module through the entry point and imports it while it is itself half imported, so everything of
Triton's but the base class is imported where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton.backends.compiler import BaseBackend

from tilewright import settings

if TYPE_CHECKING:
    from types import ModuleType

BACKEND = "tilewright_cpu"
"""The name of the target; ``cpu``, which Inductor asks for, is taken too unless a back end of that name is there."""

EXTENSION = "cpukernel"
"""The last stage: a kernel as JSON, with its C text."""


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled with. Most of it is for GPUs; Triton reads it all the same."""

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 3
    warp_size: int = 1
    enable_fp_fusion: bool = True
    launch_cooperative_grid: bool = False
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e4nv", "fp8e5")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    extern_libs: Any = None
    debug: bool = False
    sanitize_overflow: bool = False
    backend_name: str = "cpu"
    arch: str = ""
    instrumentation_mode: str = ""
    ir_override: str | None = None
    fpsan_homomorphic_casts: bool = False
    executor: str = "native"
    checked: bool = False

    def hash(self) -> str:
        """A key that changes with any option."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()


class CPUBackend(BaseBackend):  # type: ignore[misc]
    """Compiles kernels for the host's processor."""

    binary_ext = EXTENSION

    @staticmethod
    def supports_target(target: Any) -> bool:
        """Whether this back end compiles for the target."""
        from triton.backends import backends

        return target.backend == BACKEND or (target.backend == "cpu" and "cpu" not in backends)

    def hash(self) -> str:
        """A key of what the result depends on besides the kernel: this compiler, the C compiler, the processor."""
        from tilewright.cpu.build import machine

        return f"{BACKEND}-{_own_source()}-{hashlib.sha256(machine().encode()).hexdigest()}"

    def parse_options(self, opts: dict[str, Any]) -> Options:
        """Options from a launch's keywords; the ones that mean nothing here are dropped."""
        known = {field.name for field in fields(Options)}
        given = {key: value for key, value in opts.items() if key in known and value is not None}
        if "enable_fp_fusion" not in given:
            from triton import knobs

            given["enable_fp_fusion"] = bool(knobs.language.default_fp_fusion)
        given.setdefault("executor", settings.cpu_executor())
        given.setdefault("checked", settings.cpu_sanitize())
        return Options(**given)

    def pack_metadata(self, metadata: Any) -> Any:
        """What Triton hands to every launch; the loaded kernel knows all by itself."""
        return (metadata.num_warps, metadata.num_ctas, metadata.shared)

    def get_codegen_implementation(self, options: Options) -> dict[str, Any]:
        """Functions that Triton's front end asks for."""
        return {"min_dot_size": lambda lhs_type, rhs_type: (1, 1, 1)}

    def get_module_map(self) -> dict[str, ModuleType]:
        """What serves ``tl.extra.libdevice``: its symbols are the same as on NVIDIA GPUs, see ``libdevice.py``."""
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, context: Any) -> None:
        """No dialects of our own."""

    def add_stages(self, stages: dict[str, Any], options: Options, language: Any = None) -> None:
        """The way of a kernel: Triton IR, then C."""
        stages["ttir"] = _tile_ir
        stages[EXTENSION] = lambda module, metadata: _kernel(module, metadata, options)


def _tile_ir(module: Any, metadata: dict[str, Any]) -> Any:
    """Inline, simplify, and turn block pointers and descriptors into plain pointers, where this Triton has passes."""
    from triton._C.libtriton import ir, passes

    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    passes.common.add_inliner(manager)
    for name in ("add_rewrite_tensor_pointer", "add_rewrite_tensor_descriptor_to_pointer"):
        add = getattr(passes.ttir, name, None)
        if add is not None:
            add(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.ttir.add_triton_licm(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    manager.run(module, "tile_ir")
    return module


def _kernel(module: Any, metadata: dict[str, Any], options: Options) -> bytes:
    """The kernel as JSON. With a compiler it is also built, so that what is wrong with it shows here."""
    from tilewright.cpu import reader
    from tilewright.cpu.kernel import describe

    started = time.perf_counter()
    executor = _executor(options)
    text = reader.generic_text(module)
    artifact = describe(text, executor, options.enable_fp_fusion, options.checked)
    metadata["name"] = artifact["name"]
    metadata["shared"] = 0
    metadata["executor"] = executor
    metadata["build_seconds"] = {"tilewright": time.perf_counter() - started}
    return json.dumps(artifact).encode()


def _executor(options: Options) -> str:
    """What runs the kernel. Without a C compiler that is the interpreter, which is said once."""
    from tilewright.platforms.cpu import c_compiler

    if options.executor == "native" and c_compiler() is None:
        _warn_of_missing_compiler()
        return "interpreter"
    return options.executor


@lru_cache(maxsize=1)
def _warn_of_missing_compiler() -> None:
    warnings.warn(
        "tilewright finds no C compiler (gcc or clang, or what CC names): Triton kernels on the CPU are interpreted, "
        "which is correct but slow",
        RuntimeWarning,
        stacklevel=2,
    )


@lru_cache(maxsize=1)
def _own_source() -> str:
    """A key of this package's source: kernels built by another version of it are not used."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in {".py", ".h"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()
