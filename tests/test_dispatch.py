"""Who serves a call: the order of choice, its explanation, broken implementations, and the plans that calls share."""

import json
import threading
import warnings
from dataclasses import FrozenInstanceError

import pytest
import torch

import tilewright
from tilewright import rope, rope_qk, rope_table
from tilewright.dispatch import Described, Implementation, Operation, Supported, Unsupported, asked_for, select, use
from tilewright.dispatch.eager import PlanCache
from tilewright.errors import ArgumentError, ImplementationError, TilewrightError, UnknownNameError
from tilewright.ops.rope import op
from tilewright.platforms import DeviceFacts
from tilewright.testing import targets

TARGETS = [pytest.param(t, id=str(t), marks=[pytest.mark.gpu] if t.on_gpu else []) for t in targets()]
CPU = torch.device("cpu")


def implementation(name, *, verdict=None, load=None):
    return Implementation(name, load or (lambda: name), lambda device, dtypes, shape: verdict or Supported())


def choose(*implementations, impl=None):
    """The planner that serves a call; each is its implementation's name."""
    return select("thing", implementations, asked_for(Described(CPU, (torch.float32,), "a shape", impl)))


def explain(*implementations, impl=None):
    return Operation("thing", lambda: Described(CPU, (torch.float32,), "a shape", impl), implementations).explain()


FAST, SLOW = implementation("fast"), implementation("slow")
SHY = implementation("shy", verdict=Supported("for tests", on_request=True))
UNABLE = implementation("unable", verdict=Unsupported("has no target"))


# The order of choice.


def test_detection_takes_the_first_that_can():
    assert choose(FAST, SLOW) == "fast"
    assert choose(UNABLE, SLOW, FAST) == "slow"
    assert choose(SHY, SLOW) == "slow", "detection passes over what serves on request"


def test_use_precedes_detection_and_impl_precedes_use():
    with use("slow"):
        assert choose(FAST, SLOW) == "slow"
        assert choose(FAST, SLOW, impl="fast") == "fast"
        with use("shy"):
            assert choose(FAST, SLOW, SHY) == "shy"
        assert choose(FAST, SLOW) == "slow"
    assert choose(FAST, SLOW) == "fast"


def test_use_ends_with_its_block_when_the_block_raises():
    with pytest.raises(KeyError), use("slow"):
        raise KeyError
    assert choose(FAST, SLOW) == "fast"


def test_use_is_per_thread():
    seen = {}
    started, finish = threading.Event(), threading.Event()

    def work():
        seen["inherited"] = choose(FAST, SLOW)
        with use("slow"):
            started.set()
            finish.wait(timeout=60)
            seen["own"] = choose(FAST, SLOW)

    with use("shy"):
        thread = threading.Thread(target=work)
        thread.start()
        assert started.wait(timeout=60)
        assert choose(FAST, SLOW, SHY) == "shy"
        finish.set()
        thread.join()
    assert seen == {"inherited": "fast", "own": "slow"}


@pytest.mark.parametrize("how", ["impl", "use"])
def test_a_choice_that_cannot_be_honoured_raises(how):
    def attempt(name):
        if how == "impl":
            return choose(FAST, UNABLE, impl=name)
        with use(name):
            return choose(FAST, UNABLE)

    with pytest.raises(ImplementationError, match="has no target") as caught:
        attempt("unable")
    assert "'unable' was asked for" in str(caught.value)
    with pytest.raises(UnknownNameError, match="there are: fast, unable") as caught:
        attempt("cuda")
    assert "'cuda'" in str(caught.value)
    with pytest.raises(UnknownNameError):
        attempt("")


def test_nothing_can_serve():
    with pytest.raises(ImplementationError, match="no implementation can serve it"):
        choose(UNABLE)
    assert explain(UNABLE).chosen is None


def test_the_errors_can_be_caught_without_knowing_them():
    assert issubclass(UnknownNameError, TilewrightError)
    assert issubclass(UnknownNameError, LookupError)
    assert issubclass(ImplementationError, RuntimeError)


# The explanation.


def test_explanation():
    explanation = explain(UNABLE, SHY, FAST, SLOW)
    assert explanation.operation == "thing"
    assert explanation.device.startswith("cpu")
    assert explanation.dtypes == ("float32",)
    assert explanation.shape == "a shape"
    assert explanation.requested is None
    assert explanation.chosen == "fast"
    assert [c.name for c in explanation.candidates] == ["unable", "shy", "fast", "slow"]
    assert [c.chosen for c in explanation.candidates] == [False, False, True, False]
    assert "has no target" in explanation.candidates[0].reason
    assert "only on request" in explanation.candidates[1].reason
    assert "'fast' comes first" in explanation.candidates[3].reason
    assert "has no target" in explanation.reason, "the summary says why better ones were passed over"
    with pytest.raises(FrozenInstanceError):
        explanation.chosen = "slow"


def test_explanation_as_text():
    lines = str(explain(UNABLE, FAST)).splitlines()
    assert lines[0].startswith("thing on cpu")
    assert "float32" in lines[0]
    assert "a shape" in lines[0]
    assert lines[1].strip().startswith("served by: fast")
    assert [line.split()[0] for line in lines[2:]] == ["unable", "*"]
    assert "the call raises" in str(explain(UNABLE, FAST, impl="unable"))


def test_explanation_as_json():
    explanation = explain(UNABLE, FAST, impl="fast")
    record = explanation.to_json()
    assert json.loads(json.dumps(record)) == record, "in JSON's types"
    assert record["chosen"] == "fast"
    assert record["requested"] == "fast (impl=)"
    assert record["candidates"][0] == {"name": "unable", "chosen": False, "reason": "has no target"}


def test_explaining_rope():
    cos, sin = rope_table(8, 8)
    x = torch.ones(1, 4, 2, 8)
    with use("reference"):
        explanation = tilewright.explain("rope", x, cos, sin)
    assert explanation.requested == "reference (use())"
    assert explanation.chosen == "reference"
    assert "8 of 8 features" in explanation.shape
    with pytest.raises(ArgumentError, match="layout"):
        tilewright.explain("rope", x, cos, sin, layout="hsbd")
    with pytest.raises(TilewrightError):
        tilewright.explain("rope", x, cos)
    with pytest.raises(UnknownNameError, match="rope_qk"):
        tilewright.explain("rotate", x, cos, sin)
    with pytest.raises(UnknownNameError):
        rope(x, cos, sin, impl="no such thing")
    with pytest.raises(UnknownNameError), use("no such thing"):
        rope(x, cos, sin)


ODD_DEVICES = [
    DeviceFacts(""),
    DeviceFacts("npu"),
    DeviceFacts("cpu", triton=""),
    DeviceFacts("cpu", triton="interpreted"),
    DeviceFacts("nvidia", arch="sm_0", triton="compiled"),
    DeviceFacts("amd", triton="no such way"),
    DeviceFacts("somebody else's", n_units=0),
]
ODD_DTYPES = [(), (torch.bool,), (torch.complex64, torch.float8_e4m3fn), (torch.float32,) * 9]


@pytest.mark.parametrize("each", op.IMPLEMENTATIONS, ids=lambda each: each.name)
def test_supports_is_pure(each):
    """It judges whatever it is shown, twice the same, and raises nothing."""
    x, (cos, sin) = torch.ones(1, 4, 2, 8), rope_table(8, 8)
    call = op.described(op.Inputs(x, None, cos, sin, None, None, None), 0, op.Options(), None, "rope").shape
    for device in ODD_DEVICES:
        for dtypes in ODD_DTYPES:
            verdict = each.supports(device, dtypes, call)
            assert isinstance(verdict, Supported | Unsupported)
            assert verdict == each.supports(device, dtypes, call)
            if isinstance(verdict, Unsupported):
                assert verdict.reason


# Broken implementations.


def broken(error):
    loads = []

    def load():
        loads.append(error)
        raise error

    return implementation("broken", load=load), loads


@pytest.mark.parametrize(
    "error", [ImportError("no module"), OSError("no library"), AttributeError("no join")], ids=repr
)
def test_a_broken_implementation_is_passed_over_with_one_warning(error):
    each, loads = broken(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose(each, SLOW) == "slow"
        assert choose(each, SLOW) == "slow"
    assert [w.category for w in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert all(part in message for part in ("broken", "slow", type(error).__name__, str(error)))
    assert len(loads) == 1, "the outcome is kept"
    explanation = explain(each, SLOW)
    assert explanation.chosen == "slow"
    assert str(error) in explanation.candidates[0].reason
    assert str(error) in explanation.reason


def test_a_broken_implementation_that_was_asked_for_raises():
    each, _ = broken(OSError("no library"))
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImplementationError, match="no library"):
                choose(each, SLOW, impl="broken")


def test_nothing_is_loaded_that_is_not_chosen():
    each, loads = broken(OSError())
    assert choose(FAST, each) == "fast"
    assert choose(each, SLOW, impl="slow") == "slow"
    assert loads == []


# The backward of a call.


@pytest.fixture
def served(monkeypatch):
    """Two implementations of rope that note who served; with a list of the notes."""
    notes = []

    def noting(name):
        def load():
            plan = op._load_reference()

            def noting_plan(call, inputs, outputs):
                run = plan(call, inputs, outputs)
                return lambda *args: (notes.append(name), run(*args))[1]

            return noting_plan

        return Implementation(name, load, lambda device, dtypes, shape: Supported())

    monkeypatch.setattr(op, "IMPLEMENTATIONS", (noting("first"), noting("second")))
    monkeypatch.setattr(op, "_PLANS", PlanCache())
    return notes


@pytest.mark.parametrize("how", ["use", "impl"])
@pytest.mark.parametrize("watched", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_backward_is_served_by_the_same_implementation(served, how, watched, inplace):
    cos, sin = rope_table(8, 8)
    x = torch.ones(1, 4, 2, 8, requires_grad=True)

    def forward(**kwargs):
        if not watched:
            return rope(x * 1, cos, sin, inplace=inplace, **kwargs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            return rope(x * 1, cos, sin, inplace=inplace, **kwargs)

    if how == "use":
        with use("second"):
            y = forward()
    else:
        y = forward(impl="second")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert served == ["second", "second"]
    torch.autograd.grad(rope(x, cos, sin, impl="second").square().sum(), x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert set(served) == {"second"}
    assert torch.equal(x.grad, grad)


def test_the_backward_of_a_detected_call_does_not_follow_a_later_use(served):
    cos, sin = rope_table(8, 8)
    x = torch.ones(1, 4, 2, 8, requires_grad=True)
    y = rope(x, cos, sin)
    with use("second"):
        y.sum().backward()
    assert served == ["first", "first"]


# Plans.


def test_the_cache_is_bounded_and_drops_the_oldest():
    cache = PlanCache(size=3)
    for n in range(10):
        assert cache.put(n, str(n)) == str(n)
        assert len(cache) <= 3
    assert [cache.get(n) for n in (6, 7, 8, 9)] == [None, "7", "8", "9"]


def test_calls_beyond_the_bound_stay_right(monkeypatch):
    monkeypatch.setattr(op, "_PLANS", PlanCache(size=2))
    cos, sin = rope_table(8, 8)
    x = torch.randn(1, 6, 2, 8)
    whole = rope(x, cos, sin)
    for n in (1, 2, 3, 4, 2, 1, 5, 3):
        assert torch.equal(rope(x[:, :n], cos, sin), whole[:, :n])
    assert len(op._PLANS) == 2


def variants(target):
    """Calls that differ from the first in one piece of metadata each; all of them in one cache."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(4096, generator=generator).to(target.device)
    shape, (cos, sin) = (2, 4, 2, 8), rope_table(8, 8, device=target.device)
    x = memory[:128].view(shape)
    cache = torch.cat((cos, sin), 1)
    yield x, cos, sin, {}
    yield memory[1:129].view(shape), cos, sin, {}  # another alignment
    yield memory[4:132].view(shape), cos, sin, {}
    yield memory[:256].view(2, 4, 2, 16)[..., :8], cos, sin, {}  # other strides
    yield memory[:256].view(2, 4, 2, 16)[..., ::2], cos, sin, {}
    yield memory[:128].view(2, 2, 4, 8).transpose(1, 2), cos, sin, {}
    yield memory[:64].view(1, 4, 2, 8).expand(shape), cos, sin, {}
    yield x.half(), cos, sin, {}  # another dtype
    yield x.double(), cos, sin, {}
    yield x, cache[:, :4], cache[:, 4:], {}  # another table
    yield x, cos.t().contiguous().t(), sin, {}
    yield x, cos[:4], sin[:4], {}
    for options in (
        {"interleaved": True},
        {"inverse": True},
        {"layout": "sbhd"},
        {"layout": "bhsd"},
        {"rotary_dim": 4, "rotary_offset": 0},
        {"rotary_dim": 4, "rotary_offset": 4},
        {"context_parallel": (0, 2)},
        {"context_parallel": (1, 2)},
        {"offsets": 1},
        {"offsets": -1},
    ):
        if "rotary_dim" in options:  # a half table and a full one of the same width
            yield x, cos, sin, options
            yield x, cos[:, :2], sin[:, :2], options
        else:
            yield x, cos, sin, options
    ids = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], device=target.device)
    for position_ids in (ids, ids.int(), ids.t().contiguous().t(), ids[:1], ids[1]):
        yield x, cos, sin, {"position_ids": position_ids}
    rows = torch.stack((ids, ids + 1, ids + 2))
    for section in ((2, 1, 1), (1, 2, 1)):
        for interleaved in (False, True):
            options = {"mrope_section": section, "mrope_interleaved": interleaved}
            yield x, cos, sin, {"position_ids": rows, **options}


@pytest.mark.parametrize("target", TARGETS)
def test_no_two_calls_share_a_plan_that_does_not_fit(target, monkeypatch):
    def everything(fresh):
        results = []
        for x, cos, sin, kwargs in variants(target):
            if fresh:
                monkeypatch.setattr(op, "_PLANS", PlanCache())
            results.append(rope(x, cos, sin, impl=target.implementation, **kwargs))
        return results

    assert tilewright.explain("rope", *next(variants(target))[:3], impl=target.implementation).chosen == (
        target.implementation
    )
    expected = everything(fresh=True)
    monkeypatch.setattr(op, "_PLANS", PlanCache())
    for _ in range(2):
        for index, (got, want) in enumerate(zip(everything(fresh=False), expected, strict=True)):
            assert torch.equal(got, want), index
            assert got.stride() == want.stride(), index


@pytest.mark.parametrize("target", TARGETS)
def test_implementations_do_not_share_plans(target, monkeypatch):
    """The reference after the kernel, and the other way round, with the same tensors."""
    cos, sin = rope_table(8, 8, device=target.device)
    x = torch.ones(1, 4, 2, 8, device=target.device)
    monkeypatch.setattr(op, "_PLANS", PlanCache())
    for name in ("reference", target.implementation, "reference"):
        rope(x, cos, sin, impl=name)
    assert len(op._PLANS) == len({"reference", target.implementation})
    for inplace in (False, True):
        rope_qk(x.clone(), x.clone(), cos, sin, impl=target.implementation, inplace=inplace)
    assert len(op._PLANS) == len({"reference", target.implementation}) + 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two devices")
def test_devices_do_not_share_plans():
    kind = torch.accelerator.current_accelerator().type
    for index in (0, 1, 0):
        device = torch.device(kind, index)
        x = torch.arange(64.0, device=device).view(1, 4, 2, 8)
        table = rope_table(8, 8, device=device)
        y = rope(x, *table, impl="triton")
        assert y.device == device
        assert torch.equal(y, rope(x, *table, impl="reference"))


def test_values_are_checked_by_every_call_of_a_plan():
    cos, sin = rope_table(8, 4)
    x = torch.ones(4, 2, 8)
    for _ in range(2):
        rope(x, cos, sin, layout="thd")
        with pytest.raises(ArgumentError, match="position 5"):
            rope(x, cos, sin, layout="thd", offsets=2)
        rope(x, cos, sin, layout="thd", cu_seqlens=torch.tensor([0, 2, 4]))
        with pytest.raises(ArgumentError, match="descends"):
            rope(x, cos, sin, layout="thd", cu_seqlens=torch.tensor([0, 4, 2]))
        rope(x, cos, sin, layout="thd", position_ids=torch.tensor([0, 1, 2, 3]))
        with pytest.raises(ArgumentError, match="position 4"):
            rope(x, cos, sin, layout="thd", position_ids=torch.tensor([0, 1, 2, 4]))


def test_an_invalid_call_leaves_no_plan(monkeypatch):
    monkeypatch.setattr(op, "_PLANS", PlanCache())
    cos, sin = rope_table(8, 4)
    with pytest.raises(ArgumentError):
        rope(torch.ones(1, 5, 2, 8), cos, sin)
    with pytest.raises(UnknownNameError):
        rope(torch.ones(1, 4, 2, 8), cos, sin, impl="nobody")
    assert len(op._PLANS) == 0


def test_pointers_of_another_alignment_have_another_plan(monkeypatch):
    """Triton compiles another kernel for them, which a plan keeps; only a GPU would notice."""
    monkeypatch.setattr(op, "_PLANS", PlanCache())
    cos, sin = rope_table(8, 8)
    memory = torch.zeros(256)
    for start, plans in ((0, 1), (1, 2), (4, 2), (5, 2)):
        rope(memory[start : start + 64].view(1, 4, 2, 8), cos, sin)
        assert len(op._PLANS) == plans
