"""What each release of a compiler accepts: ``profiles.json``. A new release adds an entry there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

from tilewright.errors import UnknownNameError
from tilewright.npu.rules import RULES, rule

if TYPE_CHECKING:
    from tilewright.npu.diagnostics import Severity

DEFAULT_PROFILE = "hw-0.11.1"


@dataclass(frozen=True)
class Profile:
    """What a release of a compiler, or a kind of NPU, accepts.

    Attributes:
        name: such as ``"hw-0.11.1"``.
        summary: what it is.
        backend: name of the back end that emits for it.
        compute_dtype: what its arithmetic is rounded to: ``"float32"``, ``"bfloat16"`` or ``"dlfloat16"``.
        supported: functions of ``tl`` that are documented for it.
        fails: those among them that were seen to fail, with what was seen.
        data_dtypes: dtypes of data that can be loaded and stored, by Triton's names.
        index_dtypes: dtypes of tables of indices.
        data_ranks: least and greatest rank of data.
        index_ranks: the same of tables.
        last_dim_multiple: what the last dimension of data should be a multiple of.
        severities: rules that are harder or milder than usual: severity and reason by code.
    """

    name: str
    summary: str
    backend: str
    compute_dtype: str
    supported: frozenset[str]
    fails: dict[str, str]
    data_dtypes: tuple[str, ...]
    index_dtypes: tuple[str, ...]
    data_ranks: tuple[int, int]
    index_ranks: tuple[int, int]
    last_dim_multiple: int
    severities: dict[str, tuple[Severity, str]]

    def severity(self, code: str) -> Severity:
        """How bad it is here to break a rule; ``"off"`` where there is no such rule."""
        return self.severities[code][0] if code in self.severities else cast("Severity", rule(code).severity)


@lru_cache(maxsize=1)
def profiles() -> dict[str, Profile]:
    """All profiles by name."""
    text = files("tilewright.npu").joinpath("profiles.json").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = json.loads(text)
    return {name: _profile(name, entries) for name in entries}


def profile(name: str = DEFAULT_PROFILE) -> Profile:
    """The profile of this name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in profiles():
        raise UnknownNameError(f"there is no profile '{name}'; there are: {', '.join(profiles())}")
    return profiles()[name]


def _profile(name: str, entries: dict[str, dict[str, Any]]) -> Profile:
    entry = dict(entries[name])
    severities = dict(entry.pop("severities", {}))
    while (base := entry.pop("extends", None)) is not None:
        severities = {**entries[base].get("severities", {}), **severities}
        entry = {**entries[base], **entry}
    entry.pop("severities", None)
    known = {each.code for each in RULES}
    if unknown := severities.keys() - known:
        raise UnknownNameError(f"profile '{name}' names rules that do not exist: {', '.join(sorted(unknown))}")
    return Profile(
        name=name,
        summary=entry["summary"],
        backend=entry["backend"],
        compute_dtype=entry["compute_dtype"],
        supported=frozenset(entry["supported"]),
        fails=dict(entry["fails"]),
        data_dtypes=tuple(entry["data_dtypes"]),
        index_dtypes=tuple(entry["index_dtypes"]),
        data_ranks=tuple(entry["data_ranks"]),
        index_ranks=tuple(entry["index_ranks"]),
        last_dim_multiple=entry["last_dim_multiple"],
        severities={code: tuple(given) for code, given in severities.items()},
    )
