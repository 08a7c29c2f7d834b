import itertools

import pytest
import torch

from tilewright.errors import ArgumentError
from tilewright.models.decoder import Decoder, DecoderConfig, KeyValueCache
from tilewright.models.npu import KERNELS, BlockCache, decode_through_kernels
from tilewright.models.parts import Parts
from tilewright.models.text import encode, load_corpus
from tilewright.models.training import Recipe, train
from tilewright.numerics import compare

CONFIG = DecoderConfig(layers=2, width=64, heads=6, kv_heads=2, head_dim=32, ffn_width=128, context=64)
PROMPT = encode(b"Alice was beginning to get very tired")


@pytest.fixture(scope="module")
def model():
    recipe = Recipe(batch=8, learning_rate=3e-3, warmup=5)
    return train(CONFIG, Parts.plain(), load_corpus(), steps=30, recipe=recipe).model


@pytest.mark.parametrize("kernels", KERNELS)
def test_text_is_the_same_byte_for_byte(model, kernels):
    # More bytes than the context has: the last half is read again, as a prompt of several chunks.
    decoded = decode_through_kernels(model, PROMPT, 60, kernels=kernels, partition=16)
    assert decoded.agrees
    assert len(decoded.text) == len(PROMPT) + 60
    likeliest = decode_through_kernels(model, PROMPT, 20, kernels=kernels, partition=16, temperature=0)
    assert likeliest.agrees
    assert not torch.equal(likeliest.text, decoded.text[: len(PROMPT) + 20])


@torch.no_grad()
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cuts", [(0, 64), (0, 1, 2, 40, 64), (0, 15, 16, 17, 50)])
def test_logits(model, kernels, cuts):
    tokens = load_corpus().validation[None, : cuts[-1]].long()
    exact = Decoder(CONFIG, Parts.plain(), dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    cache, plain = BlockCache(model, kernels=kernels, partition=16), KeyValueCache(model, 1, torch.float32)
    logits, reference = (
        torch.cat([model(tokens[:, a:b], each) for a, b in itertools.pairwise(cuts)], 1) for each in (cache, plain)
    )
    agreement = compare(logits, reference, exact(tokens), reduced=CONFIG.width)
    assert agreement.ok, agreement
    assert cache.calls >= CONFIG.layers * (len(cuts) - 1)


@torch.no_grad()
def test_a_devices_rounding_is_seen(model):
    tokens = load_corpus().validation[None, :40].long()
    results = {
        dtype: model(tokens, BlockCache(model, partition=16, compute_dtype=dtype))
        for dtype in ("float32", "dlfloat16", "bfloat16")
    }
    truth = model(tokens)
    errors = {dtype: float((result - truth).abs().mean()) for dtype, result in results.items()}
    assert errors["float32"] < errors["dlfloat16"] < errors["bfloat16"]


def test_bad_arguments(model):
    with pytest.raises(ArgumentError, match="flash_causal_attention_naive"):
        BlockCache(model, kernels="dense")
    with pytest.raises(ArgumentError, match="does not divide the context of 64"):
        BlockCache(model, partition=24)
