"""``rblib``."""

import json
import os
import sys
from pathlib import Path

from rebel import recorder
from tilewright.npu.language import rblib


def write_rtosa(kernel, args):
    """Leave a compiled kernel where the back end finds it."""
    recorder.record("write_rtosa", kernel=kernel.name, arguments=recorder.described(args))
    if (message := recorder.fail("kernel")) is not None:
        print(message, file=sys.stderr, flush=True)
        if recorder.FAILURES[recorder.FAIL].get("aborts"):
            os.abort()
        raise SystemExit(1)
    found = {"program": kernel.text, "manifest": kernel.metadata}
    Path(os.environ["TRITON_HOME"], f"{kernel.name}.json").write_text(json.dumps(found))


def __getattr__(name):
    return getattr(rblib, name)
