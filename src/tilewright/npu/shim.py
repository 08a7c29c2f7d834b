"""Files written for ``rebel.triton`` run unmodified: modules of its names that stand for this library.

Nothing is ever installed by an import. :func:`install_shim` does it, refuses where the real ``rebel`` is installed, and
:func:`uninstall_shim` undoes it. While it is installed

- ``import rebel``, ``rebel.triton``, ``rebel.triton.language`` and ``...extra.rbln.libdevice`` give the modules here;
- ``kernel.warmup(...)`` also runs the program on the CPU where its tensors have values, so that an operator's wrapper,
  which on the device only writes the compiler's input, gives the operator's result. Outputs and caches are changed in
  place; a cache that the wrapper casts is a copy, whose change is lost: :func:`tilewright.npu.register` writes back;
- ``torch.compile(backend="rbln")`` runs the graph as it is.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import warnings
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

from tilewright.errors import ImplementationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from tilewright.npu.program import Program

MARK = "__tilewright_shim__"
"""The attribute by which a module of the shim is told from the real one."""

_BACKEND = "rbln"


def install_shim(*, execute: bool = True) -> None:
    """Let ``import rebel`` give this library's modules.

    Args:
        execute: whether ``warmup`` also runs the program on the CPU.

    Raises:
        ImplementationError: the real ``rebel`` is installed; kernels are compiled by it.
    """
    if real_rebel():
        message = "install_shim: the real rebel is installed; its own modules compile kernels for the device"
        raise ImplementationError(message)
    if _finder not in sys.meta_path:
        _state.backend = _register_backend()
        sys.meta_path.append(_finder)
    _state.execute = execute


def uninstall_shim() -> None:
    """Undo :func:`install_shim`. Modules that imported its names keep them."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for name in [name for name, module in sys.modules.items() if name in _finder.modules() and is_shim(module)]:
        del sys.modules[name]
    if _state.backend:
        _unregister_backend()
    _state.execute = _state.backend = False


@contextmanager
def shim(*, execute: bool = True) -> Iterator[None]:
    """:func:`install_shim` for a while; then it is as it was before."""
    before = _state.execute if _finder in sys.meta_path else None
    install_shim(execute=execute)
    try:
        yield
    finally:
        if before is None:
            uninstall_shim()
        else:
            _state.execute = before


def real_rebel() -> bool:
    """Whether the vendor's compiler is installed."""
    loaded = sys.modules.get("rebel")
    if loaded is not None:
        return not is_shim(loaded)
    try:
        found = importlib.util.find_spec("rebel")
    except (ImportError, ValueError):
        return False
    return found is not None and found.loader is not _finder


def is_shim(module: ModuleType) -> bool:
    """Whether a module stands for one of ``rebel``."""
    return bool(getattr(module, MARK, False))


def warmed_up(program: Program, arguments: dict[str, Any]) -> None:
    """Run a program that was compiled while the shim is installed, if its tensors have values.

    What the checker found is told as Python's warnings, as nobody looks at the program.
    """
    if _finder not in sys.meta_path:
        return
    for found in program.diagnostics:
        warnings.warn(str(found), stacklevel=3)
    if not _state.execute:
        return
    from torch._subclasses.fake_tensor import FakeTensor

    tensors = [arguments[info.name] for info in program.manifest.arguments]
    if all(each.device.type == "cpu" and not isinstance(each, FakeTensor) for each in tensors):
        program.run(*tensors)


class _State:
    execute = False
    backend = False  # whether torch's back end "rbln" is the one of the shim


_state = _State()


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of ``rebel``, last of all finders."""

    def modules(self) -> dict[str, Callable[[], Any]]:
        """What each name gives: a module whose names are taken over, or None for a package that only leads on."""
        from tilewright.npu import language, triton
        from tilewright.npu.language import rblib

        names: dict[str, Any] = {
            "rebel": None,
            "rebel.core": None,
            "rebel.core.torch_compile": None,
            "rebel.triton": triton,
            "rebel.triton.language": language,
            "rebel.triton.language.math": language,
            "rebel.triton.language.extra": None,
            "rebel.triton.language.extra.rbln": None,
            "rebel.triton.language.extra.rbln.libdevice": rblib,
        }
        return names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A module of ``rebel``; None for any other."""
        if fullname not in self.modules():
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """An ordinary module; what it stands for is filled in next."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module the names of the one that it stands for."""
        setattr(module, MARK, True)
        module.__path__ = []
        stands_for: Any = self.modules()[module.__name__]
        if stands_for is not None:
            module.__doc__ = stands_for.__doc__
            module.__all__ = [name for name in dir(stands_for) if not name.startswith("_")]  # type: ignore[attr-defined]
            module.__getattr__ = lambda name: getattr(stands_for, name)  # type: ignore[method-assign]


_finder = _Finder()


def _register_backend() -> bool:
    """Let ``torch.compile(backend="rbln")`` run graphs as they are: operators compute on the CPU.

    Returns:
        Whether it was done; another back end of that name is left alone.
    """
    from torch._dynamo import list_backends, register_backend

    if _BACKEND in list_backends(exclude_tags=()):
        return False

    def rbln(graph: Any, example_inputs: Any, **options: Any) -> Any:
        return graph.forward

    register_backend(rbln, name=_BACKEND)
    return True


def _unregister_backend() -> None:
    from torch._dynamo.backends import registry

    registry._COMPILER_FNS.pop(_BACKEND, None)
    registry._BACKENDS.pop(_BACKEND, None)
