"""The table builder against first principles, and each scaling against its published formula, in Python's math."""

import math

import pytest
import torch

from tilewright import rope_table
from tilewright.errors import ArgumentError, DTypeError

FLOAT64_EPS = torch.finfo(torch.float64).eps
FLOAT32_EPS = torch.finfo(torch.float32).eps
POSITIONS = (0, 1, 7, 100, 8191)


def agrees(table, frequencies, factor=1.0, positions=POSITIONS):
    """A float64 table is that of these frequencies: the angle may differ in the last places of its own arithmetic."""
    assert table.cos.shape == table.sin.shape == (len(positions), len(frequencies))
    for row, position in enumerate(positions):
        for column, frequency in enumerate(frequencies):
            angle = position * frequency
            # A handful of operations and a power, each rounded, make a frequency; its error grows with the angle.
            bound = factor * FLOAT64_EPS * (16 * abs(angle) + 4)
            assert abs(table.cos[row, column].item() - factor * math.cos(angle)) <= bound, (position, column)
            assert abs(table.sin[row, column].item() - factor * math.sin(angle)) <= bound, (position, column)


def build(head_dim, scaling=None, base=10000.0, positions=POSITIONS):
    return rope_table(head_dim, torch.tensor(positions), base=base, scaling=scaling, dtype=torch.float64)


def plain(head_dim, base=10000.0):
    return [1.0 / math.pow(base, 2 * i / head_dim) for i in range(head_dim // 2)]


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 10.0])
@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}], ids=str)
def test_first_principles(head_dim, base, scaling):
    agrees(build(head_dim, scaling, base), plain(head_dim, base))


def test_a_number_of_positions_counts_from_zero():
    counted, given = rope_table(8, 5), rope_table(8, torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32))
    assert torch.equal(counted.cos, given.cos)
    assert torch.equal(counted.sin, given.sin)
    assert rope_table(8, 0).cos.shape == (0, 4)
    assert rope_table(8, torch.tensor([], dtype=torch.int64)).sin.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once(dtype):
    exact, table = build(16), rope_table(16, torch.tensor(POSITIONS), dtype=dtype)
    assert torch.equal(table.cos, exact.cos.to(dtype))
    assert torch.equal(table.sin, exact.sin.to(dtype))


def test_accuracy_at_one_million():
    position, head_dim = 10**6, 64
    table = rope_table(head_dim, torch.tensor([position]))
    frequencies = plain(head_dim)
    worst = max(abs(table.cos[0, i].item() - math.cos(position * f)) for i, f in enumerate(frequencies))
    # What everybody else does: angles in float32.
    angles = torch.tensor([float(position)]) * torch.tensor(frequencies, dtype=torch.float32)
    worst_of_fp32 = max(
        abs(math.cos(angle) - math.cos(position * f)) for angle, f in zip(angles.tolist(), frequencies, strict=True)
    )
    assert worst < FLOAT32_EPS < worst_of_fp32


def test_linear():
    for factor in (1, 2.0, 8):
        agrees(build(16, {"rope_type": "linear", "factor": factor}), [f / factor for f in plain(16)])


@pytest.mark.parametrize("given", [None, 100, 40000])
def test_dynamic_ntk(given):
    """Hugging Face's ``_compute_dynamic_ntk_parameters``."""
    head_dim, base, factor, original = 16, 10000.0, 4.0, 2048
    length = max(8192 if given is None else given, original)
    grown = base * ((factor * length / original) - (factor - 1)) ** (head_dim / (head_dim - 2))
    scaling = {"rope_type": "dynamic", "factor": factor, "original_max_position_embeddings": original}
    if given is not None:
        scaling["seq_len"] = given
    agrees(build(head_dim, scaling), plain(head_dim, grown))
    if given == 100:
        agrees(build(head_dim, scaling), plain(head_dim, base))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def yarn(head_dim, base, factor, original, fast=32.0, slow=1.0, truncate=True):
    """The frequencies of ``YarnRotaryEmbedding`` in the paper's own code."""

    def correction_dim(rotations):
        return (head_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = correction_dim(fast), correction_dim(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for i in range(head_dim // 2):
        power = math.pow(base, 2 * i / head_dim)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        keep = 1 - ramp
        frequencies.append((1.0 / (factor * power)) * (1 - keep) + (1.0 / power) * keep)
    return frequencies


@pytest.mark.parametrize(
    ("entries", "options"),
    [
        ({}, {}),
        ({"beta_fast": 16, "beta_slow": 2.0}, {"fast": 16.0, "slow": 2.0}),
        ({"truncate": False}, {"truncate": False}),
        ({"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}, {"fast": 4.0, "slow": 4.0, "truncate": False}),
    ],
    ids=["plain", "betas", "untruncated", "step"],
)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_yarn_frequencies(entries, options, head_dim):
    frequencies = yarn(head_dim, 10000.0, 4.0, 2048, **options)
    assert frequencies != plain(head_dim)
    agrees(build(head_dim, YARN | entries), frequencies, 0.1 * math.log(4.0) + 1.0)


@pytest.mark.parametrize(
    ("entries", "factor"),
    [
        ({}, 0.1 * math.log(4.0) + 1.0),
        ({"attention_factor": 0.75}, 0.75),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4.0) + 1) / (0.05 * math.log(4.0) + 1)),
        ({"mscale": 0.7}, 0.1 * math.log(4.0) + 1.0),
        ({"mscale": None, "mscale_all_dim": None, "attention_factor": None}, 0.1 * math.log(4.0) + 1.0),
    ],
    ids=["plain", "attention_factor", "equal", "mscale", "mscale alone", "none"],
)
def test_yarn_attention_factor(entries, factor):
    agrees(build(16, YARN | entries), yarn(16, 10000.0, 4.0, 2048), factor)


def test_llama3():
    """``_compute_llama3_parameters``, with the entries of Llama 3.1."""
    base, factor, low, high, original = 500000.0, 8.0, 1.0, 4.0, 8192
    frequencies, kinds = [], set()
    for frequency in plain(128, base):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            frequencies.append(frequency)
            kinds.add("kept")
        elif wavelength > original / low:
            frequencies.append(frequency / factor)
            kinds.add("stretched")
        else:
            smooth = (original / wavelength - low) / (high - low)
            frequencies.append((1 - smooth) * frequency / factor + smooth * frequency)
            kinds.add("between")
    assert kinds == {"kept", "stretched", "between"}
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    agrees(build(128, scaling, base), frequencies)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 5.0, 7, 9.0],
    "original_max_position_embeddings": 4096,
    "factor": 32.0,
}


@pytest.mark.parametrize(("length", "chosen"), [(4096, "short_factor"), (4097, "long_factor")])
@pytest.mark.parametrize("given", [False, True])
def test_longrope(length, chosen, given):
    """Phi-3's ``Phi3LongRoPEScaledRotaryEmbedding``: the long factors once the sequence passes the original length."""
    positions = (0, 3, 5000) if given else (0, 3, length - 1)
    frequencies = [f / factor for f, factor in zip(plain(8), LONGROPE[chosen], strict=True)]
    factor = math.sqrt(1 + math.log(32.0) / math.log(4096))
    scaling = LONGROPE | ({"seq_len": length} if given else {})
    agrees(build(8, scaling, positions=positions), frequencies, factor, positions)


@pytest.mark.parametrize(
    ("entries", "factor"),
    [
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"factor": None, "attention_factor": 1.25}, 1.25),
        ({"short_mscale": 1.1, "long_mscale": 1.2, "seq_len": 1}, 1.1),
        ({"short_mscale": 1.1, "long_mscale": 1.2, "seq_len": 4097}, 1.2),
    ],
    ids=str,
)
def test_longrope_attention_factor(entries, factor):
    scaling = LONGROPE | {"long_factor": LONGROPE["short_factor"]} | entries
    frequencies = [f / each for f, each in zip(plain(8), LONGROPE["short_factor"], strict=True)]
    agrees(build(8, scaling), frequencies, factor)


def test_a_configuration_is_taken_as_it_is():
    scaling = {"type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    before = dict(scaling)
    agrees(build(8, scaling), [f / 2 for f in plain(8)])
    assert scaling == before, "the mapping belongs to the caller"


@pytest.mark.parametrize("head_dim", [0, -2, 7])
def test_bad_head_dim(head_dim):
    with pytest.raises(ArgumentError) as caught:
        rope_table(head_dim, 4)
    assert caught.value.argument == "head_dim"


@pytest.mark.parametrize(
    "positions",
    [-1, 3.5, torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor(3), torch.tensor([True, False])],
    ids=str,
)
def test_bad_positions(positions):
    with pytest.raises(ArgumentError) as caught:
        rope_table(8, positions)
    assert caught.value.argument == "positions"


@pytest.mark.parametrize("base", [0.0, -1.0, math.inf, math.nan])
def test_bad_base(base):
    with pytest.raises(ArgumentError) as caught:
        rope_table(8, 4, base=base)
    assert caught.value.argument == "base"


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_bad_dtype(dtype):
    with pytest.raises(DTypeError) as caught:
        rope_table(8, 4, dtype=dtype)
    assert caught.value.argument == "dtype"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
REQUIRED = [
    (scaling, name) for scaling in (LINEAR, DYNAMIC, YARN, LLAMA3, LONGROPE) for name in scaling if name != "rope_type"
]


@pytest.mark.parametrize(("scaling", "name"), REQUIRED, ids=lambda p: p if isinstance(p, str) else p["rope_type"])
def test_a_missing_entry_is_named(scaling, name):
    with pytest.raises(ArgumentError, match=f"'{name}'") as caught:
        rope_table(8, 4, scaling={k: v for k, v in scaling.items() if k != name})
    assert caught.value.argument == "scaling"


@pytest.mark.parametrize(
    ("scaling", "entry"),
    [
        (LINEAR, {"factor": 0.5}),
        (LINEAR, {"factor": math.nan}),
        (LINEAR, {"factor": "2"}),
        (LINEAR, {"factor": True}),
        (LINEAR, {"typo": 1}),
        (DYNAMIC, {"original_max_position_embeddings": 0}),
        (DYNAMIC, {"beta_fast": 1}),
        (YARN, {"factor": -4.0}),
        (YARN, {"beta_fast": 0}),
        (YARN, {"beta_fast": -1.0}),
        (YARN, {"beta_slow": 0}),
        (YARN, {"mscale": "1"}),
        (YARN, {"attention_factor": math.inf}),
        (YARN, {"truncate": "no"}),
        (LLAMA3, {"low_freq_factor": 4.0}),
        (LLAMA3, {"high_freq_factor": math.inf}),
        (LONGROPE, {"short_factor": [1.0, 1.0]}),
        (LONGROPE, {"short_factor": 1.0}),
        (LONGROPE, {"long_factor": [1.0, 1.0, 0.0, 1.0]}),
        (LONGROPE, {"long_factor": [1.0, math.nan, 1.0, 1.0]}),
        (LONGROPE, {"long_factor": [1.0, math.inf, 1.0, 1.0]}),
        (LONGROPE, {"long_factor": [1.0, "2", 1.0, 1.0]}),
        (LONGROPE, {"original_max_position_embeddings": 1}),
    ],
    ids=lambda p: p.get("rope_type") or str(p),
)
def test_a_bad_entry_is_named(scaling, entry):
    ((name, _),) = entry.items()
    with pytest.raises(ArgumentError, match=name) as caught:
        rope_table(8, 4, scaling=scaling | entry)
    assert caught.value.argument == "scaling"


@pytest.mark.parametrize("scaling", [{"rope_type": "ntk"}, {"type": "su"}, {"rope_type": None}, "linear"], ids=str)
def test_an_unknown_scaling(scaling):
    with pytest.raises(ArgumentError) as caught:
        rope_table(8, 4, scaling=scaling)
    assert caught.value.argument == "scaling"


def test_yarn_needs_a_base_above_one():
    with pytest.raises(ArgumentError) as caught:
        rope_table(8, 4, base=1.0, scaling=YARN)
    assert caught.value.argument in {"base", "scaling"}
