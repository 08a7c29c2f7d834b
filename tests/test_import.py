"""Importing touches nothing, and a missing or broken Triton disables one implementation and no more."""

import os
import subprocess
import sys
import textwrap


def run(program, **environment):
    """Run a program in a fresh interpreter; it must succeed and print nothing on standard error."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TILEWRIGHT_CHECK_DEVICE_VALUES")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(program)],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    run(
        """
        import os, sys

        read = []
        get, item = os.environ.get, type(os.environ).__getitem__

        class Watched(type(os.environ)):
            def __getitem__(self, key):
                read.append(key)
                return super().__getitem__(key)

        os.environ.__class__ = Watched
        import tilewright
        os.environ.__class__ = Watched.__base__

        assert not read, read
        loaded = [name for name in ("torch", "triton", "numpy", "rich", "matplotlib") if name in sys.modules]
        assert not loaded, loaded
        assert "rope" in dir(tilewright)
        assert tilewright.__version__
        try:
            tilewright.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise AssertionError

        import torch
        before = set(sys.modules)
        for name in tilewright.__all__:
            getattr(tilewright, name)
        cos, sin = tilewright.rope_table(16, 8)
        x = torch.ones(1, 8, 2, 16, requires_grad=True)
        with tilewright.use("reference"):
            tilewright.rope(x, cos, sin).sum().backward()
            assert tilewright.explain("rope", x, cos, sin).chosen == "reference"
        tilewright.register()
        assert "triton" not in set(sys.modules) - before
        assert "tilewright.ops.rope.kernels" not in sys.modules
        assert not torch.cuda.is_initialized()
        """,
        TILEWRIGHT_CHECK_DEVICE_VALUES="neither yes nor no",
    )


# Each scenario breaks Triton in its own way; after each, everything that was loaded of Triton is forgotten.
BROKEN = """
import importlib, sys, types, warnings
import torch
import tilewright
from tilewright.dispatch import selection
from tilewright.dispatch.eager import PlanCache
from tilewright.errors import ImplementationError
from tilewright.ops.rope import op
from tilewright.platforms import DeviceFacts

cos, sin = tilewright.rope_table(16, 8)
x = torch.randn(1, 8, 2, 16)
expected = tilewright.rope(x, cos, sin, interleaved=True)
real_facts = selection.facts
failures = []


class Blocker:
    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise self.error
        return None


def forget():
    for name in list(sys.modules):
        if name.partition(".")[0] == "triton" or name == "tilewright.ops.rope.kernels":
            del sys.modules[name]
    for implementation in op.IMPLEMENTATIONS:
        implementation._loaded.clear()
    op._PLANS = PlanCache()


def check(scenario, reason):
    def expect(truth, what):
        if not truth:
            failures.append(f"{scenario}: {what}")

    # On request: it raises, again and again, and never falls back.
    for _ in range(2):
        try:
            tilewright.rope(x, cos, sin, interleaved=True, impl="triton")
        except ImplementationError as error:
            expect(reason in str(error), f"the error does not say {reason!r}: {error}")
        except BaseException as error:
            expect(False, f"raised {type(error).__name__}: {error}")
        else:
            expect(False, "served")
    explanation = tilewright.explain("rope", x, cos, sin, interleaved=True, impl="triton")
    expect(explanation.chosen is None, "explained as served")
    expect(reason in explanation.reason, f"the explanation does not say {reason!r}: {explanation.reason}")

    # By detection, where Triton would come first: the reference serves, with one warning.
    selection.facts = lambda device: DeviceFacts("nvidia", "sm_90", triton="compiled")
    op._PLANS = PlanCache()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for n in (8, 4):
                y = tilewright.rope(x[:, :n], cos, sin, interleaved=True)
                expect(torch.equal(y, expected[:, :n]), "another result")
        except BaseException as error:
            expect(False, f"detection raised {type(error).__name__}: {error}")
    seen = [str(w.message) for w in caught if w.category is RuntimeWarning]
    expect(len(seen) == 1 and reason in seen[0], f"warnings: {seen}")
    explanation = tilewright.explain("rope", x, cos, sin, interleaved=True)
    expect(explanation.chosen == "reference", f"{explanation.chosen} serves")
    expect(reason in explanation.candidates[0].reason, "the reason is not kept")
    selection.facts = real_facts
    op._PLANS = PlanCache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expect(torch.equal(tilewright.rope(x, cos, sin, interleaved=True), expected), "the reference is broken too")
    forget()


forget()
for error in (
    ModuleNotFoundError("No module named 'triton'", name="triton"),
    OSError("libcuda.so.1: cannot open shared object file"),
    RuntimeError("0 active drivers ([]). There should only be one."),
):
    blocker = Blocker(error)
    sys.meta_path.insert(0, blocker)
    check(type(error).__name__, str(error))
    sys.meta_path.remove(blocker)

# A stub of that name that is no Triton, as some packages leave behind.
sys.modules["triton"] = types.ModuleType("triton")
sys.modules["triton.language"] = sys.modules["triton"].language = types.ModuleType("triton.language")
check("stub", "AttributeError")
"""

REPORT = """
assert not failures, "\\n".join(failures)
assert not torch.cuda.is_initialized()
"""


def test_triton_absent_or_broken():
    run(BROKEN + REPORT, TRITON_INTERPRET="1")


def test_triton_too_old():
    """A Triton that imports but lacks a function that the kernel calls."""
    run(
        BROKEN
        + """
import triton.language
del triton.language.join
check("join", "join")
"""
        + REPORT,
        TRITON_INTERPRET="1",
    )
