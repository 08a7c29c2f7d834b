"""What a run leaves behind: one JSON record a line.

The first record describes the run: environment, copy bandwidth, who was asked and who could not be had. Then comes one
record for each workload, direction and provider, and one for each provider's time on the host.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import BenchmarkError
from tilewright.files import replace_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Record = dict[str, Any]

FORMAT = 1
"""Version of the records' fields, in the first record."""


def path_of(output: Path | str, *words: str) -> Path:
    """Where the records go: ``output`` itself if it ends in ``.jsonl``, else a file in it named after ``words``.

    Example:
        >>> path_of("results", "rope", "NVIDIA H200").name
        'rope-nvidia-h200.jsonl'
    """
    folder = Path(output)
    if folder.suffix == ".jsonl":
        return folder
    return folder / ("-".join(re.sub(r"[^a-z0-9_]+", "-", word.lower()).strip("-") for word in words) + ".jsonl")


def write(path: Path, records: Iterable[Record]) -> None:
    """Write all records or nothing: the file appears, or is replaced, only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records))


def read(path: Path) -> list[Record]:
    """The records of a run.

    Raises:
        BenchmarkError: the file is not the record of a benchmark run.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"bench: '{path.name}' cannot be read as benchmark records: {error}") from error
    if not records or not isinstance(records[0], dict) or records[0].get("record") != "run":
        raise BenchmarkError(f"bench: '{path.name}' does not begin with the record of a run; write it with `bench`")
    if records[0].get("format") != FORMAT:
        raise BenchmarkError(
            f"bench: '{path.name}' has format {records[0].get('format')}, this version reads {FORMAT}; measure again"
        )
    return records


def results(records: Sequence[Record]) -> list[Record]:
    """The records of measurements among ``records``."""
    return [record for record in records if record["record"] == "result"]


def hosts(records: Sequence[Record]) -> list[Record]:
    """The records of time on the host among ``records``."""
    return [record for record in records if record["record"] == "host"]


def workloads(measured: Sequence[Record]) -> list[str]:
    """Names of the workloads, in the order in which they were measured."""
    return list(dict.fromkeys(record["workload"] for record in measured))


def best(measured: Sequence[Record], protocol: str = "stream") -> Record | None:
    """The fastest of these results that does the whole job: neither the copy nor a less precise job counts."""
    rivals = [
        record
        for record in measured
        if record["status"] == "ok" and record["provider"] != "copy" and not record["gate"]["less_precise"]
    ]
    return min(rivals, key=lambda record: float(record[protocol]["median_us"]), default=None)


def _finite(value: Any) -> Any:
    """``value`` with None for the numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
