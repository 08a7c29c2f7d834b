"""Looking at graphs: who needs whom, while fusions change them."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from tilewright.fusion.graph import Changes, Editor, Order, depends, needed
from tilewright.ops import register
from tilewright.ops.quant_fp8.format import QuantFormat, encoded


def made(rng, n_nodes):
    """A graph of calls of up to three earlier nodes, mostly near ones."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(n_nodes):
        near = nodes[-8:] if rng.random() < 0.9 else nodes
        nodes.append(graph.call_function(max, tuple(rng.sample(near, min(len(near), rng.randint(1, 3))))))
    return graph, nodes


def needs(node, on):
    """Without a shortcut."""
    return not set(on).isdisjoint(needed([node]))


@pytest.mark.parametrize("seed", range(40))
def test_order_agrees_with_a_walk_of_everything(seed):
    """Also after fusions that tie what stands early to what stands late."""
    rng = random.Random(seed)
    graph, nodes = made(rng, 60)
    order, free, answers = Order(graph), set(nodes[1:]), []
    for _ in range(40):
        old = rng.sample(sorted(free, key=nodes.index), 2)
        inputs = [each for node in old for each in node.all_input_nodes]
        asked = [order.depends(each, old) for each in inputs]
        assert asked == [needs(each, old) for each in inputs]
        answers += asked
        if any(asked):
            continue  # it would wait for itself
        with graph.inserting_before(min(old)):
            new = graph.call_function(max, tuple(inputs))
        for node in old:
            node.replace_all_uses_with(new)
        order.replaced(old, [new])
        free -= set(old)
        if len(free) < 2:
            break
    assert len(set(answers)) == 2, "both answers occur"


@pytest.mark.parametrize("seed", range(10))
def test_depends_agrees_with_a_walk_of_everything(seed):
    rng = random.Random(seed)
    _, nodes = made(rng, 40)
    pairs = [(rng.choice(nodes), rng.sample(nodes, rng.randint(0, 2))) for _ in range(100)]
    answers = [depends(node, on) for node, on in pairs]
    assert answers == [needs(node, on) for node, on in pairs]
    assert len(set(answers)) == 2


def test_a_walk_that_ends_early():
    _, nodes = made(random.Random(0), 30)
    walked = []
    within = lambda node: walked.append(node) or node in nodes[-5:]  # noqa: E731
    assert set(needed([nodes[-1]], within)) <= set(nodes[-5:])
    assert len(walked) < len(nodes)


def test_what_an_operator_gives_is_that_of_a_call_of_its_own():
    """Calls that differ in one thing each, all of them twice, the second time in another order."""
    register()
    kinds = ({}, {"group_size": None}, {"group_size": 64, "scale_layout": "column"}, {"scale_format": "ue8m0"})
    formats = [QuantFormat(**kind, dtype=torch.float8_e4m3fn) for kind in kinds]
    operator = torch.ops.tilewright.silu_mul_quant_fp8.default
    with FakeTensorMode() as mode:
        given = [
            torch.empty(4, 256, dtype=torch.bfloat16),
            torch.empty(4, 256, dtype=torch.float16),
            torch.empty(3, 256, dtype=torch.bfloat16),
            torch.empty(1, 4, 256, dtype=torch.bfloat16),
            torch.empty(256, 4, dtype=torch.bfloat16).t(),
            torch.empty(4, 256, dtype=torch.bfloat16, device="meta"),
        ]
        calls = [
            (place, None, [encoded(f) for f in chosen], emit, None)
            for place in range(len(given))
            for chosen in ([formats[0]], [formats[1]], [formats[2]], formats[2:], formats[:1:-1])
            for emit in (False, True)
        ]
        wanted = [[layout(each) for each in operator(given[place], *rest)] for place, *rest in calls]
    graph, changes, held = Graph(), Changes(), []
    inputs = [graph.placeholder(f"x{place}") for place in range(len(given))]
    for node, fake in zip(inputs, given, strict=True):
        node.meta["val"] = fake
    order = [*range(len(calls)), *reversed(range(len(calls)))]
    for at in order:
        place, *rest = calls[at]
        node = Editor(graph, inputs[place], inputs[0], changes).call(operator, inputs[place], *rest)
        assert [layout(each) for each in node.meta["val"]] == wanted[at], calls[at]
        assert all(each.fake_mode is mode for each in node.meta["val"])
        held += node.meta["val"]
    assert len(changes.layouts) == len(calls)
    assert len({each.untyped_storage()._cdata for each in held}) == len(held), "each is new memory"


def layout(fake):
    return fake.shape, fake.stride(), fake.dtype, fake.device
