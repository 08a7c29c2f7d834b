"""Calls that stay within one chunk of the interpreter's stack."""

import sys

import pytest

from tilewright.fusion.roomy import roomy

DEPTHS = range(300)
"""Of frames as small as these, a chunk holds half as many."""
CALLS = 200


def leaf(number):
    return number


def faults():
    """How often calls from here touch memory for the first time."""
    import resource

    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for number in range(CALLS):
        leaf(number)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def at(depth, run):
    return at(depth - 1, run) if depth else run()


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
def test_calls_of_a_roomy_one_map_no_memory_at_any_depth():
    assert max(at(depth, lambda: roomy(faults)) for depth in DEPTHS) < CALLS / 2
    assert max(roomy(at, depth, faults) for depth in DEPTHS) < CALLS / 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="releases since 2026 keep a chunk")
def test_plain_calls_do_at_some_depth():
    """Or the test above shows nothing."""
    assert max(at(depth, faults) for depth in DEPTHS) >= CALLS


def test_arguments_results_and_errors_pass():
    assert roomy(lambda *args, **kwargs: (args, kwargs), 1, 2, three=3) == ((1, 2), {"three": 3})
    with pytest.raises(ZeroDivisionError):
        roomy(lambda: 1 / 0)
