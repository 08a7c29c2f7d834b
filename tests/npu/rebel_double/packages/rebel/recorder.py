"""What the double writes down, and how it is told to fail."""

import json
import os
from pathlib import Path

FAIL = os.environ.get("REBEL_DOUBLE_FAIL", "")
FAILURES = json.loads(Path(__file__).with_name("failures.json").read_text())


def record(event, **what):
    """Add a line to the record."""
    path = os.environ.get("REBEL_DOUBLE_RECORD")
    if path:
        recompiles = os.environ.get("RBLN_WRITE_RTOSA") == "1"
        with open(path, "a") as file:
            file.write(json.dumps({"event": event, "recompiles": recompiles, **what}) + "\n")


def described(values):
    """Arguments as plain data."""
    return [f"{each.dtype}{list(each.shape)}" if hasattr(each, "shape") else each for each in values]


def fail(stage):
    """Print what a failure of this stage prints; its exit status, or None if there is no failure of it."""
    failure = FAILURES.get(FAIL)
    if failure is None or failure["stage"] != stage:
        return None
    return failure["message"]
