"""Bundles: a compiled kernel as a folder that is addressed by its content.

.. code-block:: text

    <root>/<hash>/manifest.json       what a runtime has to know, and the hash of every other file
                  program.mlir        the program, MLIR's generic form with locations
                  kernel_compile.py   what the vendor's compiler is given (back end "rbln")
                  linalg.mlir         the program as linalg on tensors (back end "linalg")

The folder's name is the hash of the manifest, so equal bundles are one folder, and two kernels of one name are two.
Loading reads text, and runs nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import MemRefType

from tilewright.errors import NpuArtifactError
from tilewright.npu.front.builder import element_type
from tilewright.npu.ir.dialect import element_of, shape_of
from tilewright.npu.ir.text import argument_names, kernel_name, kernel_of, parse_program
from tilewright.npu.language import DTYPES
from tilewright.npu.profiles import profiles
from tilewright.npu.program import Manifest, Program

if TYPE_CHECKING:
    from xdsl.ir import Attribute

MANIFEST = "manifest.json"
PROGRAM = "program.mlir"


def save(program: Program, root: str | Path) -> Path:
    """Write a bundle. A bundle of the same content that is there already is left as it is.

    Args:
        program: the compiled kernel.
        root: the folder of bundles; it is made if it is not there.

    Returns:
        The bundle's folder.

    Raises:
        NpuArtifactError: there is a folder of that name with another content.
    """
    files = {PROGRAM: program.text, **program.files}
    manifest = program.metadata | {
        "source_map": program.source_map,
        "files": {name: _hash(text.encode()) for name, text in sorted(files.items())},
    }
    text = json.dumps(manifest, indent=1) + "\n"
    root = Path(root)
    folder = root / _hash(text.encode())
    if folder.exists():
        load(folder)
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:8]}.", suffix=".partial", dir=root))
    except OSError as error:
        raise NpuArtifactError(f"{root}: no bundle can be written there: {error}") from error
    try:
        for name, content in {**files, MANIFEST: text}.items():
            (partial / name).write_bytes(content.encode())
        partial.chmod(0o755)
        os.rename(partial, folder)
    except OSError as error:
        if folder.exists():  # another process was first
            load(folder)
        else:
            raise NpuArtifactError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(folder: str | Path) -> Program:
    """Read a bundle, and verify it: every hash, the manifest, the program.

    Raises:
        NpuArtifactError: a file is missing, damaged, or not of this bundle.
        NpuProgramError: the program is not well-formed.
    """
    folder = Path(folder)
    manifest, data = _manifest(folder)
    texts = {name: _read(folder, name, expected) for name, expected in data["files"].items()}
    if PROGRAM not in texts:
        raise NpuArtifactError(f"{folder}: its manifest names no {PROGRAM}")
    others = {entry.name for entry in folder.iterdir()} - texts.keys() - {MANIFEST}
    if others:
        raise NpuArtifactError(f"{folder}: files that its manifest does not name: {', '.join(sorted(others))}")
    program = Program(parse_program(texts.pop(PROGRAM), str(folder / PROGRAM)), manifest, loaded_files=texts)
    _hold_against(folder, manifest, program)
    return program


def _hold_against(folder: Path, manifest: Manifest, program: Program) -> None:
    """Make sure that the manifest says of the program what is so."""
    function = kernel_of(program.module)
    attributes = function.arg_attrs.data if function.arg_attrs is not None else ()
    values = function.body.block.args
    found = [(shape_of(each), element_of(each)) for each in values if isinstance(each.type, MemRefType)]
    roles = [str(getattr(each.data.get("npu.role"), "data", "")) for each in attributes]
    told = [(info.shape, _element(info.dtype)) for info in manifest.arguments]
    names = [info.name for info in manifest.arguments]
    if found != told or names != argument_names(program.module) or roles != [info.role for info in manifest.arguments]:
        raise NpuArtifactError(f"{folder}: manifest and program have other arguments")
    name = kernel_name(program.module)
    if name != manifest.kernel:
        raise NpuArtifactError(f"{folder}: the manifest is of kernel {manifest.kernel!r}, the program of {name!r}")
    outputs = tuple(position for position, role in enumerate(roles) if role == "out")
    if manifest.grid != (1,) or manifest.outputs != outputs or manifest.profile not in profiles():
        raise NpuArtifactError(f"{folder}: grid, outputs or profile of the manifest are none of this program")


def _element(name: str) -> Attribute | None:
    return element_type(DTYPES[name]) if name in DTYPES else None


def _manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    try:
        content = (folder / MANIFEST).read_bytes()
        data = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise NpuArtifactError(f"{folder}: {MANIFEST} cannot be read: {error}") from error
    if _hash(content) != folder.resolve().name:
        raise NpuArtifactError(
            f"{folder}: the folder's name is not the hash of its {MANIFEST}; it was changed or renamed"
        )
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not all(re.fullmatch(r"\w[\w.-]*", name) for name in files):
        raise NpuArtifactError(f"{folder}: {MANIFEST} names no files")
    rest = {key: value for key, value in data.items() if key not in {"files", "source_map"}}
    return Manifest.from_json(rest), {"files": files}


def _read(folder: Path, name: str, expected: str) -> str:
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise NpuArtifactError(f"{folder}: {name} cannot be read: {error}") from error
    if _hash(content) != expected:
        raise NpuArtifactError(f"{folder}: {name} was changed: its hash is not the manifest's")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise NpuArtifactError(f"{folder}: {name} is no text: {error}") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
