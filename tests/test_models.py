"""The demo decoder: its text, its mathematics, its training, and what is made of them."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import tilewright
from tilewright.errors import ArgumentError, DTypeError, MissingDependencyError
from tilewright.models import demo, figures, report
from tilewright.models.decoder import Decoder, DecoderConfig, KeyValueCache, generate
from tilewright.models.fp8 import SCALE_FORMATS, Fp8Linear, fp8_validation_loss, quantised
from tilewright.models.parts import Parts, Served
from tilewright.models.text import batches, decode, encode, load_corpus, read_work, windows
from tilewright.models.training import Recipe, train, validation_loss
from tilewright.numerics import compare, compare_curves, curve_budget, disagreement
from tilewright.platforms import facts

TINY = DecoderConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn_width=48, context=32)
TINY_SCALE = demo.Scale(
    TINY, Recipe(batch=4, learning_rate=3e-3, warmup=4), steps=6, dtype=torch.float32, sample_bytes=50
)
BOTH = pytest.mark.parametrize("parts", [Parts.plain(), Parts.tilewright()], ids=lambda parts: parts.name)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module")
def result():
    return demo.run(device="cpu", output=None, quiet=True, scale=TINY_SCALE)


def tokens(batch, seq, seed=0):
    return torch.randint(256, (batch, seq), generator=torch.Generator().manual_seed(seed))


# The text


def test_works_are_what_they_say():
    alice, play = read_work("alice_in_wonderland"), read_work("as_you_like_it")
    assert b"ALICE'S ADVENTURES IN WONDERLAND" in alice[:100]
    assert b"Down the Rabbit-Hole" in alice
    assert b"AS YOU LIKE IT" in play[:100]
    assert b"All the world's a stage" in play
    for work in (alice, play):
        assert set(work) <= {*range(32, 127), *b"\n\t"}
        assert work.endswith(b"\n")
        assert b"MILLENNIUM FULCRUM" not in work
    with pytest.raises(ArgumentError, match="alice_in_wonderland"):
        read_work("moby_dick")


def test_corpus_is_split_without_overlap_or_loss(corpus):
    alice, play = (encode(read_work(name)) for name in ("alice_in_wonderland", "as_you_like_it"))
    assert corpus.train.dtype == corpus.validation.dtype == torch.uint8
    assert len(corpus.train) + len(corpus.validation) == len(alice) + len(play)
    assert torch.equal(corpus.train[:1000], alice[:1000])
    assert torch.equal(corpus.validation[-1000:], play[-1000:])
    alone = load_corpus(("alice_in_wonderland",))
    assert torch.equal(torch.cat((alone.train, alone.validation)), alice)


def test_batches_depend_on_their_seed_alone(corpus):
    def draw(seed):
        torch.manual_seed(torch.seed())  # the global generator must not matter
        return list(batches(corpus.train, steps=3, batch=4, context=16, seed=seed))

    first, again, other = draw(1), draw(1), draw(2)
    assert len(first) == 3
    for (inputs, targets), (inputs_again, targets_again) in zip(first, again, strict=True):
        assert torch.equal(inputs, inputs_again)
        assert torch.equal(targets, targets_again)
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], first[1][0])


def test_targets_are_the_next_bytes(corpus):
    text = bytes(corpus.train.tolist())
    for inputs, targets in batches(corpus.train, steps=2, batch=4, context=16, seed=0):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for row, following in zip(inputs, targets, strict=True):
            assert bytes(row.tolist()) + bytes(following[-1:].tolist()) in text


def test_batches_reach_both_ends_and_no_further():
    data = torch.arange(6, dtype=torch.uint8)
    seen = torch.cat([targets for _, targets in batches(data, steps=50, batch=2, context=4, seed=0)])
    assert set(seen[:, 0].tolist()) == {1, 2}
    with pytest.raises(ArgumentError, match="needs 7"):
        next(batches(data, steps=1, batch=1, context=6, seed=0))


def test_windows_read_each_byte_once():
    data = torch.arange(24, dtype=torch.uint8)
    pairs = list(windows(data, batch=2, context=5))
    assert torch.cat([targets.flatten() for _, targets in pairs]).tolist() == list(range(1, 21))
    assert torch.cat([inputs.flatten() for inputs, _ in pairs]).tolist() == list(range(20))


def test_decode_shows_every_byte():
    shown = decode(torch.arange(256))
    assert len(shown) == 256
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert decode(encode(b"Alice\tand\n")) == "Alice\tand\n"


# The decoder


@BOTH
def test_logits_have_the_vocabulary_and_no_preference_at_first(parts):
    model = Decoder(TINY, parts)
    x = tokens(3, 20)
    assert model(x).shape == (3, 20, 256)
    uniform = torch.tensor(256.0).log()
    assert abs(model.loss(x, x.roll(-1, 1)) - uniform) < uniform / 50


@BOTH
def test_later_bytes_do_not_reach_earlier_logits(parts):
    model = Decoder(TINY, parts, dtype=torch.float64)
    x = tokens(2, 20)
    changed = x.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@BOTH
def test_order_of_bytes_matters(parts):
    # Attention alone does not see the order of what lies behind; RoPE does. The first layer decides it: one layer.
    model = Decoder(dataclasses.replace(TINY, layers=1), parts, dtype=torch.float64)
    x = tokens(1, 10)
    swapped = x[:, [1, 0, *range(2, 10)]]
    assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1])


@BOTH
@torch.no_grad()
def test_cached_logits_equal_those_of_the_whole_text(parts):
    dtype = torch.float32
    x = tokens(2, TINY.context)
    model, exact = Decoder(TINY, parts, dtype=dtype), Decoder(TINY, Parts.plain(), dtype=torch.float64)
    cache = KeyValueCache(model, 2, dtype)
    cuts = (0, 7, 8, 9, 20, TINY.context)  # a prompt, single bytes, and blocks behind a filled cache
    cached = torch.cat([model(x[:, a:b], cache) for a, b in itertools.pairwise(cuts)], dim=1)
    agreement = compare(cached, model(x), exact(x), reduced=TINY.width)
    assert agreement.ok, agreement
    with pytest.raises(ArgumentError, match="past the context"):
        model(x[:, :1], cache)


def test_seed_alone_decides_the_weights():
    first = Decoder(TINY, Parts.plain(), seed=3).state_dict()
    for other in (
        Decoder(TINY, Parts.tilewright(), seed=3).state_dict(),
        Decoder(TINY, Parts.plain(), seed=3, dtype=torch.float64).state_dict(),
    ):
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name].double(), other[name].double()) for name in first)
    assert not torch.equal(first["head.weight"], Decoder(TINY, Parts.plain(), seed=4).state_dict()["head.weight"])


def test_building_a_decoder_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Decoder(TINY, Parts.plain())
    assert torch.equal(before, torch.get_rng_state())


def test_float64_decoder_has_float64_tables():
    single, double = Decoder(TINY, Parts.plain()), Decoder(TINY, Parts.plain(), dtype=torch.float64)
    assert single.cos.dtype == torch.float32
    assert torch.equal(double.cos.float(), single.cos)
    assert not torch.equal(double.cos, single.cos.double())


def norms(parts, dtype, residual_dtype, seed=0):
    """Both norms of the same numbers: their results, and the gradients of ``x``, the residual stream and the weight."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, 3, 7, TINY.width, generator=generator).bfloat16()
    x, residual, grad = (t.to(d) for t, d in zip(drawn, (dtype, residual_dtype, dtype), strict=True))
    weight = torch.rand(TINY.width, generator=generator).add(0.5).bfloat16().to(residual_dtype)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    alone = parts.norm.compute(x, weight, 1e-6)
    y, stream = parts.add_norm.compute(x, residual, weight, 1e-6)
    assert (alone.dtype, y.dtype, stream.dtype) == (dtype, dtype, residual_dtype)
    torch.autograd.backward((alone, y, stream), (grad, grad.flip(0), grad.flip(1).to(residual_dtype)))
    return [alone.detach(), y.detach(), stream.detach()], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),  # under autocast
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_norm_parts_agree(dtype, residual_dtype):
    ours, plain, truth = (
        norms(Parts.tilewright(), dtype, residual_dtype),
        norms(Parts.plain(), dtype, residual_dtype),
        norms(Parts.plain(), torch.float64, torch.float64),
    )
    rows = 2 * 3 * 7  # of both norms, over which the weight's gradient sums
    assert not disagreement("result", ours[0], plain[0], truth[0])
    assert not disagreement("gradient", ours[1], plain[1], truth[1], reduced=(1, 1, rows))


@BOTH
def test_norm_parts_divide_by_the_root_mean_square(parts):
    x, residual, weight = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([1.0, 2.0])
    y, stream = parts.add_norm.compute(x.double(), residual.double(), weight.double(), 0.5)
    assert stream.tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]).double() / 13**0.5)  # mean of squares 12.5, and eps
    torch.testing.assert_close(parts.norm.compute(stream, weight.double(), 0.5), y)


@BOTH
def test_each_residual_add_is_fused_with_the_norm_behind_it(parts):
    calls = []

    def counted(name):
        part = getattr(parts, name)
        return dataclasses.replace(part, compute=lambda *args: calls.append(name) or part.compute(*args))

    model = Decoder(TINY, dataclasses.replace(parts, norm=counted("norm"), add_norm=counted("add_norm")))
    model(tokens(1, 5))
    assert calls == ["norm"] + ["add_norm"] * 2 * TINY.layers


@BOTH
@pytest.mark.parametrize("start", [0, 5])
def test_rope_parts_turn_pairs_by_their_angle(parts, start):
    model = Decoder(TINY, parts, dtype=torch.float64)
    q, k = torch.randn(2, 2, 6, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = parts.rope.compute(q, k, model.cos, model.sin, start)
    angle = torch.arange(start, start + 6, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(4.0).double() / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # a complex number per position and pair
    for x, y in zip((q, k), turned, strict=True):
        expected = torch.complex(x[..., :4], x[..., 4:]) * turn
        torch.testing.assert_close(y, torch.cat((expected.real, expected.imag), -1))


def test_sizes_that_cannot_be():
    with pytest.raises(ArgumentError, match="kv_heads"):
        dataclasses.replace(TINY, kv_heads=3)
    with pytest.raises(ArgumentError, match="head_dim"):
        dataclasses.replace(TINY, head_dim=7)


@BOTH
def test_generation_with_a_cache_picks_what_the_whole_window_would(parts):
    # Nearly greedy, in float64: the likeliest byte is picked, so a sum over the whole window must pick the same.
    model = Decoder(TINY, parts, dtype=torch.float64)
    written = generate(model, encode(b"Alice"), 20, temperature=1e-6)
    assert bytes(written[:5].tolist()) == b"Alice"
    text = encode(b"Alice").long()
    for _ in range(20):
        text = torch.cat((text, model(text[None])[0, -1:].argmax(-1)))
    assert torch.equal(written.long(), text)


def test_generation_goes_on_past_the_context():
    model = Decoder(TINY, Parts.plain())
    written = generate(model, encode(b"Alice"), 3 * TINY.context, seed=1)
    assert len(written) == 5 + 3 * TINY.context
    assert torch.equal(written, generate(model, encode(b"Alice"), 3 * TINY.context, seed=1))
    assert not torch.equal(written, generate(model, encode(b"Alice"), 3 * TINY.context, seed=2))
    for prompt in (b"", b"x" * (TINY.context + 1)):
        with pytest.raises(ArgumentError, match="prompt"):
            generate(model, encode(prompt), 1)


# Training


def test_training_learns(corpus):
    recipe = Recipe(batch=8, learning_rate=1e-2, warmup=5)
    untrained = train(TINY, Parts.plain(), corpus, steps=1, recipe=dataclasses.replace(recipe, learning_rate=0.0))
    trained = train(TINY, Parts.tilewright(), corpus, steps=40, recipe=recipe)
    assert trained.losses[0] == pytest.approx(untrained.losses[0])
    # Better than to know how often each byte comes.
    chances = corpus.train.long().bincount(minlength=256).float()
    frequencies = torch.distributions.Categorical(chances).entropy().item()
    assert validation_loss(trained, corpus) < frequencies < validation_loss(untrained, corpus)


def test_curves_agree(corpus):
    def losses(parts, dtype):
        return train(TINY, parts, corpus, steps=8, seed=1, dtype=dtype, recipe=TINY_SCALE.recipe).losses

    truth = losses(Parts.plain(), torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        agreement = compare_curves(losses(Parts.tilewright(), dtype), losses(Parts.plain(), dtype), truth, dtype=dtype)
        assert agreement.ok, agreement


def test_steps_are_reported_in_order(corpus):
    seen = []
    run = train(TINY, Parts.plain(), corpus, steps=3, on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(run.losses, start=1))
    assert len(run.step_seconds) == 3
    assert run.tokens_per_step == Recipe().batch * TINY.context
    assert run.peak_bytes is None


def test_training_that_cannot_be(corpus):
    with pytest.raises(ArgumentError, match="steps"):
        train(TINY, Parts.plain(), corpus, steps=0)
    with pytest.raises(DTypeError, match="float16"):
        train(TINY, Parts.plain(), corpus, steps=1, dtype=torch.float16)


def test_learning_rate_rises_and_falls():
    recipe = Recipe(learning_rate=1.0, warmup=10)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
    assert recipe.rate(0, 1) == 1.0


# FP8


@pytest.fixture(scope="module")
def trained(corpus):
    return train(TINY, Parts.tilewright(), corpus, steps=40, recipe=Recipe(batch=8, learning_rate=1e-2, warmup=5))


def with_wrong_scales(model):
    """The same FP8 decoder, the scales of its weights doubled."""
    for block in model.blocks:
        for linear in (block.qkv, block.out, block.gate_up, block.down):
            values, scales = linear.weight
            linear.weight = (values, (2 * scales.float()).to(scales.dtype))
    return model


SCALES = pytest.mark.parametrize("scale_format", SCALE_FORMATS)


@SCALES
@pytest.mark.parametrize("n_in", [48, 300])
def test_fp8_linear_layer_is_off_by_the_rounding_of_its_operands(scale_format, n_in):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(n_in, 20, bias=False)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
    x = torch.randn(5, n_in, generator=generator)
    layer = Fp8Linear(linear, torch.float32, scale_format)
    quantised_x = tilewright.quant_fp8(x, scale_format=scale_format)

    def rounding(operand, scales):
        # Half a unit in the last place of a normal number, half the least number of any other.
        about = torch.finfo(torch.float8_e4m3fn)
        wide = scales.double().repeat_interleave(128, -1)[:, : operand.shape[1]]
        return torch.maximum(about.eps / 2 * operand.abs(), about.tiny * about.eps / 2 * wide)

    x, weight = x.double(), linear.weight.detach().double()
    of_x, of_weight = rounding(x, quantised_x.scales), rounding(weight, layer.weight.scales)
    allowed = of_x @ weight.abs().T + x.abs() @ of_weight.T + of_x @ of_weight.T
    error = (layer(*quantised_x) - x @ weight.T).abs()
    assert (error <= allowed).all()
    assert (error > 0).any()
    layer.weight = (layer.weight.values, (2 * layer.weight.scales.float()).to(layer.weight.scales.dtype))
    assert not ((layer(*quantised_x) - x @ weight.T).abs() <= allowed).all()


def test_fp8_linear_layer_sums_in_float32_under_autocast():
    x, linear = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), torch.nn.Linear(48, 20, bias=False)
    layer = Fp8Linear(linear, torch.bfloat16, "fp32")
    expected = tilewright.scaled_mm_fp8(tilewright.quant_fp8(x), tilewright.quant_fp8(linear.weight.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(*tilewright.quant_fp8(x)), expected)


@SCALES
@torch.no_grad()
def test_fp8_blocks_quantise_in_one_format_and_where_the_input_is_made(scale_format, monkeypatch):
    calls = []

    def spied(name):
        function = getattr(tilewright, name)
        return lambda *args, **options: calls.append((name, options["scale_format"])) or function(*args, **options)

    sources = ["quant_fp8", "rms_norm_quant_fp8", "add_rms_norm_quant_fp8", "silu_mul_quant_fp8"]
    for name in sources:
        monkeypatch.setattr(tilewright, name, spied(name))
    model = quantised(Decoder(TINY, Parts.tilewright()), torch.float32, scale_format)
    assert [name for name, _ in calls] == ["quant_fp8"] * 4 * TINY.layers  # the weights
    model(tokens(1, 5))
    plain, first, later, activation = sources
    inputs = [name for norm in (first, later) for name in (norm, plain, later, activation)]
    assert [name for name, _ in calls[4 * TINY.layers :]] == inputs
    assert {used for _, used in calls} == {scale_format}


@SCALES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_evaluation_costs_less_than_a_wrong_scale(trained, corpus, scale_format, dtype):
    run = dataclasses.replace(trained, dtype=dtype)
    exact, fp8 = validation_loss(run, corpus), fp8_validation_loss(run, corpus, scale_format)
    wrong = dataclasses.replace(run, model=with_wrong_scales(quantised(run.model, dtype, scale_format)))
    assert 0 < abs(fp8 - exact) < abs(validation_loss(wrong, corpus) - exact)
    assert validation_loss(run, corpus) == exact  # the decoder itself is left alone


class RoundedLinear(torch.nn.Module):
    """A linear layer of the operands that FP8 and back makes of its own."""

    def __init__(self, linear, scale_format):
        super().__init__()
        self.scale_format = scale_format
        self.weight = self.rounded(linear.weight.detach())

    def rounded(self, operand):
        return tilewright.dequant_fp8(*tilewright.quant_fp8(operand, scale_format=self.scale_format))

    def forward(self, x):
        return self.rounded(x) @ self.weight.T


@SCALES
@torch.no_grad()
def test_fp8_decoder_is_the_decoder_of_rounded_operands(trained, scale_format):
    # The same sums, but for a code here and there where SiLU is rounded otherwise: far nearer than the decoder itself.
    rounded, x = copy.deepcopy(trained.model), tokens(4, TINY.context)
    for block in rounded.blocks:
        for layer in (block.attention, block.ffn):
            for name, linear in list(layer.named_children()):
                setattr(layer, name, RoundedLinear(linear, scale_format))
    fp8 = quantised(trained.model, torch.float32, scale_format)
    cost = (rounded(x) - trained.model(x)).square().mean()
    assert (fp8(x) - rounded(x)).square().mean() < cost


# The demo


def test_demo_agrees_and_explains(result):
    assert result.agrees
    assert result.steps == 6
    assert result.truth.dtype == "float64"
    operations = ["rms_norm", "rope_qk", "add_rms_norm"]  # in the order of their first calls
    assert [served.operation for served in result.plain.served] == operations
    assert [served.operation for served in result.tilewright.served] == operations
    assert {served.implementation for served in result.plain.served} == {"plain PyTorch"}
    chosen = "triton" if facts(torch.device("cpu")).triton else "reference"  # not beside an accelerator
    assert {served.implementation for served in result.tilewright.served} == {chosen}
    assert all(served.reason for served in result.tilewright.served)
    assert len(result.plain.sample) == len(result.tilewright.sample) == 50
    assert result.truth.sample is None


def test_demo_sees_a_wrong_part(monkeypatch):
    right = Parts.tilewright()

    def wrong_rope(q, k, cos, sin, start):
        q, k = right.rope.compute(q, k, cos, sin, start)
        return q * 1.001, k

    wrong = dataclasses.replace(right, rope=dataclasses.replace(right.rope, compute=wrong_rope))
    monkeypatch.setattr(Parts, "tilewright", classmethod(lambda cls: wrong))
    result = demo.run(device="cpu", output=None, quiet=True, scale=TINY_SCALE)
    assert not result.agrees
    assert "DISAGREE" in result.verdict
    assert 'class="verdict bad"' in report.render(result)


def test_drawn_budget_is_the_policy(result):
    plain, truth = result.plain.losses, result.truth.losses
    budget = curve_budget(plain, truth, dtype=torch.float32)
    assert budget == result.budget
    for step, allowed in enumerate(budget):
        for share, ok in ((0.99, True), (1.01, False)):
            curve = [*truth[:step], truth[step] + share * allowed, *truth[step + 1 :]]
            assert compare_curves(curve, plain, truth, dtype=torch.float32).ok is ok


def test_json_parses(result, capsys):
    again = demo.run(device="cpu", output=None, quiet=True, json_output=True, scale=TINY_SCALE)
    document = json.loads(capsys.readouterr().out)
    assert document["agrees"] is True
    assert document["tilewright"]["losses"] == list(again.tilewright.losses) == list(result.tilewright.losses)
    assert document["tilewright"]["served"][1]["operation"] == "rope_qk"
    assert document["fp8"] == [dataclasses.asdict(fp8) for fp8 in again.fp8]
    assert [fp8["scale_format"] for fp8 in document["fp8"]] == ["fp32", "ue8m0"]
    assert document["steps"] == 6


def test_json_has_no_number_that_json_lacks(result):
    broken = dataclasses.replace(result, seconds=float("inf"), budget=(float("nan"),))
    document = json.loads(json.dumps(broken.to_json(), allow_nan=False))
    assert document["seconds"] is None
    assert document["budget"] == [None]


def test_table_on_the_terminal(result):
    from rich.console import Console

    from tilewright.models import terminal

    console = Console(file=io.StringIO(), width=120)
    served = Served("rope_qk", "[bold]x", "because [/b]")  # markup must not be understood
    with terminal.progress(console) as follow:
        follow("plain", 0, 2, float("nan"))
        follow("plain", 2, 2, 1.25)
    terminal.show(
        dataclasses.replace(result, tilewright=dataclasses.replace(result.tilewright, served=(served,))), console
    )
    shown = console.file.getvalue()
    for expected in ("loss 1.250", "step time", "[bold]x", "because [/b]", result.verdict, *result.fp8_lines):
        assert expected in shown


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"scale": dataclasses.replace(TINY_SCALE, dtype=torch.float64)}, "scale"),
        ({"device": "nonsense"}, "device"),
        ({"device": "meta"}, "device"),
        ({"output": "no/such/folder/report.html"}, "does not exist"),
        ({"output": "."}, "is a folder"),
    ],
)
def test_demo_refuses_before_it_trains(arguments, match, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ArgumentError, match=match):
        demo.run(**{"output": None, "quiet": True, "scale": TINY_SCALE} | arguments)


@pytest.mark.parametrize(("package", "quiet"), [("rich", False), ("matplotlib", True)])
def test_missing_package_is_named(package, quiet, monkeypatch, tmp_path):
    def without(name):
        if name == package:
            raise ImportError(f"No module named '{package}'")

    monkeypatch.setattr("tilewright.optional.import_module", without)
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'tilewright\[cli\]'"):
        demo.run(output=tmp_path / "report.html", quiet=quiet, scale=TINY_SCALE)
    assert not list(tmp_path.iterdir())


# The report


class Page(HTMLParser):
    """Collects what a page consists of, and insists that its elements nest."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src", "xlink:href") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_sound_page(result, tmp_path):
    path = report.write(result, tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags.count("svg") == 4
    assert page.tags.count("table") == 2
    assert "script" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    text = "".join(page.text)
    assert result.verdict in text
    assert result.tilewright.served[0].reason in text
    assert len(result.fp8_lines) == 2
    assert all(line in text for line in result.fp8_lines)
    assert result.tilewright.sample in text


def test_drawings_say_what_they_show_in_colours_of_the_page(result):
    for draw in (figures.loss_curves, figures.errors, figures.step_times, figures.throughputs):
        drawing = draw(result)
        assert 'role="img" aria-label="' in drawing
        assert "var(--tilewright)" in drawing
        assert "#01020" not in drawing
        assert "http-equiv" not in drawing


def test_report_escapes(result):
    evil = "<script>alert(1)</script> & \"'"
    tilewright = dataclasses.replace(result.tilewright, sample=evil, served=(Served(evil, evil, evil),), name=evil)
    page = report.render(dataclasses.replace(result, tilewright=tilewright, prompt=evil))
    assert "<script>" not in page
    assert Page(page).open == []
    assert "script" not in Page(page).tags


def test_report_shows_a_training_that_broke(result):
    nan = float("nan")
    losses = (*result.tilewright.losses[:-1], nan)
    broken = dataclasses.replace(result, agrees=False, tilewright=dataclasses.replace(result.tilewright, losses=losses))
    assert result.verdict not in report.render(broken)


def test_report_replaces_a_file_whole_or_not_at_all(result, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(source, target):
        assert Path(source).parent == tmp_path  # a rename within the folder, which is atomic
        assert Path(source).read_text(encoding="utf-8").endswith("</html>\n")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            report.write(result, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    report.write(result, path)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]


def test_report_needs_its_folder(result, tmp_path):
    with pytest.raises(ArgumentError, match="does not exist") as caught:
        report.write(result, tmp_path / "missing" / "report.html")
    assert (caught.value.operation, caught.value.argument) == ("demo", "output")
