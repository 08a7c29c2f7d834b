"""A double of ``rebel``; see the README two folders above."""

import os
import signal
import time

from rebel import recorder

__version__ = "0.11.1+double"

recorder.record(
    "import",
    environment={name: value for name, value in os.environ.items() if name.startswith(("RBLN", "TRITON", "PATH"))},
    folder=os.getcwd(),
)
if recorder.FAIL == "hang":
    time.sleep(600)
if recorder.FAIL == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
