"""Fusion of rotary embeddings: one head beside many, tables that are equal, norms of heads of packed projections."""

import pytest
import torch

from fusion_helpers import fresh  # noqa: F401 - a fixture
from test_fusion_forms import Seen
from tilewright.fusion import RULES
from tilewright.fusion.fuse import Policy, fuse
from tilewright.fusion.report import FusionReport
from tilewright.ops import register

pytestmark = pytest.mark.filterwarnings("ignore::tilewright.fusion.FusionWarning")

DIM = 8


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def halves(q, k, cos, sin):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def complex_numbers(q, k, turns):
    def one(x):
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3).to(x.dtype)

    return one(q), one(k)


def counts_of(function, *tensors, dynamic=False, exact=False):
    """What fuses in the graph of a function, without generating code; its results must be those from before."""
    seen = Seen(function, *tensors, dynamic=dynamic)
    (results,) = next(node for node in seen.graph.nodes if node.op == "output").args
    expected = [seen.values[node] for node in results]
    register()
    with torch.no_grad():
        report = fuse(seen.graph, RULES, Policy())
        (results,) = next(node for node in seen.graph.nodes if node.op == "output").args
        values = seen._run(tensors)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close([values[node] for node in results], expected, **tolerance)
    return FusionReport([report]).counts


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_one_head_beside_many(layout, batch, length, heads):
    """Keys of one head, as latent attention has them, whose layout the sizes alone do not tell."""
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, DIM, generator=generator).permute(order).contiguous()

    q, k = made(batch, heads, length), made(batch, 1, length)
    for rows in (batch, 1):
        cos, sin = made(rows, 1, length), made(rows, 1, length)
        turns = torch.complex(cos[..., : DIM // 2].contiguous(), sin[..., : DIM // 2].contiguous())
        assert counts_of(halves, q, k, cos, sin) == {"rope_qk": 1}
        assert counts_of(complex_numbers, q, k, turns) == {"rope_qk": 1}
        if layout == "bhsd" and rows == 1:
            assert counts_of(halves, q, k, cos[0, 0], sin[0, 0]) == {"rope_qk": 1}
