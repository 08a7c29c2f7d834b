"""Reports on disk: what comes back, what does not, and keys that are the same in every process."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from tilewright.errors import ArgumentError
from tilewright.fusion.report import Decision, GraphReport, Line
from tilewright.fusion.store import Store, graph_key

IDENTITY, KEY, OTHER = "1d" * 32, "ab" * 32, "cd" * 32

GRAPH = GraphReport(
    "forward",
    (
        Decision("rms_norm_quant", "norm", "fused", "one kernel", "m.py:3: f(x)", ("norm", "quant"), ("both",), (2, 1)),
        Decision("rope_qk", "rope", "refused", "the table ends", numerics=("rounding",), verified=False),
    ),
    (Line("norm", "norm = rms_norm(x)  # bf16[2, “8”]", True),),
    (Line("both", "both = rms_norm_quant(x)", True), Line("out", "return both")),
)
BACKWARD = GraphReport("backward", ())


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "reports")


def test_what_was_kept_comes_back_as_cached(store, tmp_path):
    assert store.recall(IDENTITY, KEY) is None
    store.keep(IDENTITY, KEY, [GRAPH, BACKWARD])
    expected = (replace(GRAPH, cached=True), replace(BACKWARD, cached=True))
    assert store.recall(IDENTITY, KEY) == expected
    assert Store(tmp_path / "reports").recall(IDENTITY, KEY) == expected
    assert store.recall(IDENTITY, OTHER) is None
    assert store.recall(OTHER, KEY) is None


def test_no_graphs_are_not_nothing(store):
    store.keep(IDENTITY, KEY, [])
    assert store.recall(IDENTITY, KEY) == ()


def test_keeping_again_replaces(store):
    store.keep(IDENTITY, KEY, [GRAPH])
    store.keep(IDENTITY, KEY, [BACKWARD])
    assert store.recall(IDENTITY, KEY) == (replace(BACKWARD, cached=True),)


def test_what_was_recalled_can_be_kept(store):
    store.keep(IDENTITY, KEY, [GRAPH])
    store.keep(IDENTITY, OTHER, store.recall(IDENTITY, KEY))
    first, second = ((store.root / IDENTITY / f"{key}.json").read_bytes() for key in (KEY, OTHER))
    assert first == second


def test_everything_of_an_identity(store):
    assert store.everything(IDENTITY) == ()
    store.keep(IDENTITY, OTHER, [BACKWARD])
    store.keep(IDENTITY, KEY, [GRAPH])
    store.keep(OTHER, KEY, [GRAPH])
    folder = store.root / IDENTITY
    (folder / f"{'ef' * 32}.json").write_text("{")
    (folder / "notes.json").write_text((folder / f"{KEY}.json").read_text())
    assert store.everything(IDENTITY) == (replace(GRAPH, cached=True), replace(BACKWARD, cached=True))


def edited(change):
    def damage(text):
        record = json.loads(text)
        change(record)
        return json.dumps(record).encode()

    return damage


DAMAGES = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2].encode(),
    "bytes": lambda text: b"\xff\xfe" + text.encode(),
    "number": lambda text: b"3",
    "null": lambda text: b"null",
    "list": lambda text: b"[]",
    "deep": lambda text: b"[" * 100_000,
    "another format": edited(lambda record: record.update(format=2)),
    "no format": edited(lambda record: record.pop("format")),
    "no digest": edited(lambda record: record.pop("sha256")),
    "changed": edited(lambda record: record["graphs"][0]["decisions"][0].update(action="refused")),
    "graphs of another kind": edited(lambda record: record.update(graphs=3)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_as_good_as_none(store, damage):
    store.keep(IDENTITY, KEY, [GRAPH])
    path = store.root / IDENTITY / f"{KEY}.json"
    path.write_bytes(damage(path.read_text(encoding="utf-8")))
    assert store.recall(IDENTITY, KEY) is None
    assert store.everything(IDENTITY) == ()
    store.keep(IDENTITY, KEY, [GRAPH])
    assert store.recall(IDENTITY, KEY) == (replace(GRAPH, cached=True),)


@pytest.mark.parametrize(
    "graphs", [[{}], [{"role": "forward"}], [3], ["ab"], {"role": 1}, [{"role": 1, "decisions": 2}]]
)
def test_whole_files_of_another_shape_are_as_good_as_none(store, graphs):
    import hashlib

    body = json.dumps(graphs, separators=(",", ":"))
    path = store.root / IDENTITY / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 1, "sha256": hashlib.sha256(body.encode()).hexdigest(), "graphs": graphs}))
    assert store.recall(IDENTITY, KEY) is None


def test_a_folder_in_the_place_of_a_file(store):
    (store.root / IDENTITY / f"{KEY}.json").mkdir(parents=True)
    assert store.recall(IDENTITY, KEY) is None
    with pytest.raises(OSError, match=KEY):
        store.keep(IDENTITY, KEY, [GRAPH])
    assert [entry.name for entry in (store.root / IDENTITY).iterdir()] == [f"{KEY}.json"]


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store = Store(tmp_path / "file" / "reports")
    with pytest.raises(OSError, match="file"):
        store.keep(IDENTITY, KEY, [GRAPH])
    assert store.recall(IDENTITY, KEY) is None
    assert store.everything(IDENTITY) == ()


@pytest.mark.parametrize(
    "bad",
    ["", "../../../etc/passwd", "ab/cd" * 8, f"{KEY}/", f"../{KEY}", KEY.upper(), f"{KEY}\n", "ab", "g" * 64, None, 7],
)
def test_only_digests_are_names(store, tmp_path, bad):
    with pytest.raises(ArgumentError, match="'identity'"):
        store.keep(bad, KEY, [GRAPH])
    with pytest.raises(ArgumentError, match="'graph_key'"):
        store.keep(IDENTITY, bad, [GRAPH])
    with pytest.raises(ArgumentError, match="'identity'"):
        store.recall(bad, KEY)
    with pytest.raises(ArgumentError, match="'graph_key'"):
        store.recall(IDENTITY, bad)
    with pytest.raises(ArgumentError, match="'identity'"):
        store.everything(bad)
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_follows_that_of_inductor(monkeypatch, tmp_path):
    store = Store()
    for name in ("one", "two"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        assert store.root == tmp_path / name / "tilewright_fusion"
        assert store.recall(IDENTITY, KEY) is None
        store.keep(IDENTITY, KEY, [GRAPH])
        assert store.recall(IDENTITY, KEY) == (replace(GRAPH, cached=True),)


def test_writers_of_the_same_and_readers_at_once(store):
    graphs = [replace(GRAPH, before=GRAPH.before * 500)]
    expected = (replace(graphs[0], cached=True),)
    store.keep(IDENTITY, KEY, graphs)
    wrong, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            if store.recall(IDENTITY, KEY) != expected:
                wrong.append(1)

    def write():
        for _ in range(20):
            store.keep(IDENTITY, KEY, graphs)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert wrong == []
    assert [entry.name for entry in (store.root / IDENTITY).iterdir()] == [f"{KEY}.json"]


def keys(function, *args, grad=True, **options):
    """The keys of the graphs that Dynamo captures in a call."""
    found = []

    def backend(gm, example_inputs):
        found.append(graph_key(gm, example_inputs))
        return gm

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=backend, **options)(*args)
    return found


class Layer(nn.Module):
    def __init__(self, width=8, constant=2.0):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.constant = constant

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        return torch.where(rows > 0, self.linear(rows) * self.constant, rows)[: x.shape[0]]


BASE = keys(Layer(), torch.ones(3, 2, 8))


def test_equal_programs_have_equal_keys():
    assert len(BASE) == 1
    assert keys(Layer(), torch.zeros(3, 2, 8)) == BASE  # numbers in tensors do not count


DIFFERENT = {
    "shape": lambda: keys(Layer(), torch.ones(4, 2, 8)),
    "stride": lambda: keys(Layer(), torch.ones(3, 4, 8)[:, ::2]),
    "width": lambda: keys(Layer(4), torch.ones(3, 2, 4)),
    "dtype": lambda: keys(Layer().to(torch.bfloat16), torch.ones(3, 2, 8, dtype=torch.bfloat16)),
    "constant": lambda: keys(Layer(constant=3.0), torch.ones(3, 2, 8)),
    "constant of another kind": lambda: keys(Layer(constant=2), torch.ones(3, 2, 8)),
    "no gradients": lambda: keys(Layer(), torch.ones(3, 2, 8), grad=False),
    "frozen weights": lambda: keys(Layer().requires_grad_(False), torch.ones(3, 2, 8)),
    "an input that wants a gradient": lambda: keys(Layer(), torch.ones(3, 2, 8, requires_grad=True)),
    "symbolic sizes": lambda: keys(Layer(), torch.ones(3, 2, 8), dynamic=True),
    "another call": lambda: keys(lambda x: x.sin() + 1, torch.ones(3, 2, 8)),
    "still another call": lambda: keys(lambda x: x.cos() + 1, torch.ones(3, 2, 8)),
    "a method": lambda: keys(lambda x: x.flatten(0, 1) + 1, torch.ones(3, 2, 8)),
    "the other order": lambda: keys(lambda x: 1 - x.sin(), torch.ones(3, 2, 8)),
    "this order": lambda: keys(lambda x: x.sin() - 1, torch.ones(3, 2, 8)),
}


def test_different_programs_have_different_keys():
    found = {name: make() for name, make in DIFFERENT.items()} | {"base": BASE}
    assert all(len(one) == 1 for one in found.values())
    distinct = {one[0] for one in found.values()}
    assert len(distinct) == len(found), found


def test_autocast_and_the_default_dtype_count():
    with torch.autocast("cpu", torch.bfloat16):
        cast = keys(Layer(), torch.ones(3, 2, 8))
    assert cast != BASE
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    before = graph_key(gm, [torch.ones(2)])
    torch.set_default_dtype(torch.float64)
    try:
        assert graph_key(gm, [torch.ones(2, dtype=torch.float32)]) != before
    finally:
        torch.set_default_dtype(torch.float32)
    assert graph_key(gm, [torch.ones(2)]) == before


def test_names_and_the_sizes_at_which_symbols_were_seen_do_not_count():
    def one(x, y):
        total = x @ y
        return total.view(-1) * 2

    def two(first, second):
        product = first @ second
        return product.view(-1) * 2

    assert keys(one, torch.ones(2, 3), torch.ones(3, 4)) == keys(two, torch.ones(2, 3), torch.ones(3, 4))
    at = [keys(one, torch.ones(n, 3), torch.ones(3, 7), dynamic=True) for n in (5, 11)]
    assert at[0] == at[1]
    # 3 and 3 are one symbol, 3 and 5 are two
    product = [keys(lambda x, y: x.sum() + y.sum(), torch.ones(3), torch.ones(n), dynamic=True) for n in (3, 5)]
    assert product[0] != product[1]


def test_names_of_symbols_do_not_count():
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    gm = torch.fx.symbolic_trace(lambda x: x + 1)

    def key(name, factor=2):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
        fake = mode.from_tensor(torch.ones(5, 6), symbolic_context=context, source=ConstantSource(name))
        with mode:
            wide = fake.new_empty(fake.shape[0] * factor + fake.shape[1], 4)
        return graph_key(gm, [fake, wide]), str(tuple(fake.shape))

    named = [key(name) for name in ("one", "two", "three", "four")]
    assert len({symbols for _, symbols in named}) == 4
    assert len({digest for digest, _ in named}) == 1
    assert named[0][0] != key("one", factor=3)[0]
    assert named[0][0] != graph_key(gm, [torch.ones(5, 6), torch.ones(16, 4)])


def graph_of(build):
    graph = torch.fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return graph


def test_attributes_count_by_name_and_shape():
    def key(name, value):
        root = nn.Module()
        root.register_buffer(name, value)
        graph = graph_of(lambda g, x: g.call_function(torch.add, (x, g.get_attr(name))))
        return graph_key(torch.fx.GraphModule(root, graph), [torch.ones(2)])

    base = key("c", torch.ones(2))
    assert base == key("c", torch.zeros(2))
    others = {key("d", torch.ones(2)), key("c", torch.ones(1)), key("c", torch.ones(2, dtype=torch.int32))}
    assert len(others | {base}) == 4


def test_graphs_within_a_graph_count():
    def key(number):
        inner = torch.fx.symbolic_trace(lambda x: x * number)
        root = nn.Module()
        root.add_module("inner", inner)
        graph = graph_of(lambda g, x: g.call_module("inner", (x,)))
        return graph_key(torch.fx.GraphModule(root, graph), [torch.ones(2)])

    assert key(2.0) == key(2.0)
    assert key(2.0) != key(3.0)


def test_a_branch_that_dynamo_captures_counts():
    def key(number):
        def function(x):
            return torch.cond(x.sum() > 0, lambda x: x * number, lambda x: x - 1, (x,))

        return keys(function, torch.ones(3))

    assert key(2.0) == key(2.0)
    assert key(2.0) != key(3.0)


def test_a_function_of_the_users_counts_by_what_it_does():
    def key(code):
        names = {"__name__": "somewhere"}
        exec(code, names)
        graph = graph_of(lambda g, x: g.call_function(names["f"], (x,)))
        return graph_key(torch.fx.GraphModule(nn.Module(), graph), [torch.ones(2)])

    base = "def f(x):\n    return x * 2\n"
    assert key(base) == key(f"\n\n{base}")
    assert key(base) != key(base.replace("2", "3"))
    assert key(base) != key(base.replace("*", "+"))


def test_a_triton_kernel_counts_by_its_source_and_not_by_its_place():
    triton = pytest.importorskip("triton")
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    def one(x_ptr):
        pass

    def two(y_ptr):
        pass

    def key(kernel, constants):
        places = {
            "kernel_idx": kernel_side_table.add_kernel(triton.jit(kernel)),
            "constant_args_idx": kernel_side_table.add_constant_args(constants),
        }
        graph = graph_of(
            lambda g, x: g.call_function(triton_kernel_wrapper_mutation, (), {**places, "kwargs": {"x": x}})
        )
        gm = torch.fx.GraphModule(nn.Module(), graph)
        return graph_key(gm, [torch.ones(2)]), places

    base, places = key(one, {"n": 2})
    again, elsewhere = key(one, {"n": 2})
    assert places != elsewhere
    assert base == again
    assert len({base, key(two, {"n": 2})[0], key(one, {"n": 3})[0]}) == 3


PROGRAM = """
import sys
import torch
from test_fusion_store import Layer, keys

warm = int(sys.argv[1])
for _ in range(warm):  # what came before in a process does not count
    keys(lambda x, n: x[:n] * 2, torch.ones(9), 4, dynamic=True)
print(keys(Layer(), torch.ones(3, 2, 8)), keys(Layer(), torch.ones(3, 2, 8), dynamic=True))
"""


def test_two_processes_give_the_same_keys(tmp_path):
    said = []
    for warm, seed in ((0, "1"), (2, "2")):
        path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(warm)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    assert said[0] == said[1]
    assert said[0] == f"{BASE} {keys(Layer(), torch.ones(3, 2, 8), dynamic=True)}\n"
