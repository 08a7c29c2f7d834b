import json
import shutil

import npu_kernels
import pytest
import torch

from tilewright.errors import ArgumentError, DTypeError, NpuArtifactError, NpuProgramError
from tilewright.npu import artifact, jit
from tilewright.npu import language as tl
from tilewright.npu.artifact import MANIFEST, PROGRAM
from tilewright.npu.kernels import OPERATORS
from tilewright.npu.program import Manifest


@pytest.fixture(scope="module")
def program():
    x = torch.empty(2, 64)
    return npu_kernels.scaled_sum.warmup(x, x, torch.tensor(2.0), x, 2, 64, grid=(1,), host_layout="0:1")


@pytest.fixture
def bundle(program, tmp_path):
    return artifact.save(program, tmp_path)


def arguments():
    return torch.randn(2, 64), torch.randn(2, 64), torch.tensor(2.0), torch.full((2, 64), torch.nan)


def test_a_bundle_is_addressed_by_its_content(program, bundle, tmp_path):
    assert artifact.save(program, tmp_path) == bundle
    assert {each.name for each in bundle.iterdir()} == {MANIFEST, PROGRAM, "kernel_compile.py"}
    x = torch.empty(2, 128)
    other = npu_kernels.scaled_sum.warmup(x, x, torch.tensor(2.0), x, 2, 128, grid=(1,))
    assert other.name == program.name
    assert artifact.save(other, tmp_path) != bundle
    assert len(list(tmp_path.iterdir())) == 2  # and nothing half written


def test_a_loaded_bundle_is_the_program(program, bundle):
    loaded = artifact.load(bundle)
    assert loaded.manifest == program.manifest
    assert loaded.text == program.text
    assert loaded.files == program.files
    x, y, scale, out = arguments()
    loaded.run(x, y, scale, out)
    assert torch.equal(out, x + y * scale)
    assert artifact.save(loaded, bundle.parent) == bundle


def test_manifest(program, bundle):
    data = json.loads((bundle / MANIFEST).read_text())
    assert data["kernel"] == "scaled_sum"
    assert data["constexprs"] == {"ROWS": 2, "COLUMNS": 64}
    assert [each["role"] for each in data["arguments"]] == ["in", "in", "scalar", "out"]
    assert [each["layout"] for each in data["arguments"]] == ["host", "host", "device", "device"]
    assert data["host_layout"] == [0, 1]
    assert data["vector_inputs"] == 2
    assert data["outputs"] == [3]
    assert data["source_file"] == "npu_kernels.py"
    assert data["versions"]["xdsl"]
    line = next(
        number
        for number, text in enumerate(npu_kernels.scaled_sum.module.source.lines, 1)
        if "tl.store(out_block, tl.load(x_block)" in text
    )
    stores = [each for each in data["source_map"] if each["operation"] == "npu.store"]
    assert stores == [{"operation": "npu.store", "file": "npu_kernels.py", "line": line, "column": 5}]


def test_indices_of_flash_attention_are_those_of_the_operator():
    heads, group, head_dim, rows, blocks = 2, 2, 64, 64, 5
    query, row = torch.empty(1, heads, group, 1, head_dim), torch.empty(1, heads, 1, 1, head_dim)
    cache, table = torch.empty(2, blocks, heads, 1, rows, head_dim), torch.empty(1, 4, dtype=torch.int32)
    given = (query, row, row, cache, torch.tensor(1.0), table, table, torch.tensor(1.0))
    operator = OPERATORS["flash_causal_attention_naive_decode"]
    manifest = operator.program(dict(zip(operator.inputs, given, strict=True))).manifest
    assert (manifest.vector_inputs, manifest.host_layout, manifest.indices) == (4, (1, 2, 3), (5, 6))


@pytest.mark.parametrize("name", [MANIFEST, PROGRAM, "kernel_compile.py"])
def test_a_changed_file_is_refused(bundle, name):
    path = bundle / name
    path.write_text(path.read_text() + " ")
    with pytest.raises(NpuArtifactError, match=r"hash|changed"):
        artifact.load(bundle)


@pytest.mark.parametrize("name", [MANIFEST, PROGRAM])
def test_a_missing_file_is_refused(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(NpuArtifactError, match="cannot be read"):
        artifact.load(bundle)


def test_a_file_too_many_is_refused(bundle):
    (bundle / "more.py").write_text("raise SystemExit\n")
    with pytest.raises(NpuArtifactError, match=r"does not name: more\.py"):
        artifact.load(bundle)


def test_a_renamed_bundle_is_refused(bundle):
    moved = bundle.rename(bundle.parent / "mine")
    with pytest.raises(NpuArtifactError, match="changed or renamed"):
        artifact.load(moved)


def rewritten(bundle, change):
    """The bundle with another manifest, under the name that belongs to it."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))
    return bundle.rename(bundle.parent / artifact._hash((bundle / MANIFEST).read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=99), "format 99"),
        (lambda data: data.pop("arguments"), "arguments"),
        (lambda data: data.update(extra=1), "extra"),
        (lambda data: data["files"].pop(PROGRAM), "names no"),
        (lambda data: data["files"].update({"../x": "0"}), "names no files"),
        (lambda data: data["arguments"].reverse(), "other arguments"),
        (lambda data: data["arguments"][0].update(shape=[9, 9]), "other arguments"),
        (lambda data: data["arguments"][0].update(shape=["a"]), "other arguments"),
        (lambda data: data["arguments"][0].update(dtype="int32"), "other arguments"),
        (lambda data: data["arguments"][0].update(dtype="nonsense"), "other arguments"),
        (lambda data: data["arguments"][0].update(role="inout"), "other arguments"),
        (lambda data: data.update(kernel=None), "of kernel None"),
        (lambda data: data.update(grid=[7]), "none of this program"),
        (lambda data: data.update(outputs=[0]), "none of this program"),
        (lambda data: data.update(profile="zz"), "none of this program"),
        (lambda data: data.update(constexprs=3), "manifest"),
        (lambda data: data["files"].update({"a\0b": "0"}), "names no files"),
    ],
)
def test_another_manifest_is_refused(bundle, change, message):
    with pytest.raises(NpuArtifactError, match=message):
        artifact.load(rewritten(bundle, change))


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100000])
def test_a_manifest_that_is_none(bundle, text):
    (bundle / MANIFEST).write_text(text)
    moved = bundle.rename(bundle.parent / artifact._hash((bundle / MANIFEST).read_bytes()))
    with pytest.raises(NpuArtifactError):
        artifact.load(moved)


def test_bundles_need_a_folder(program, tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NpuArtifactError, match="be written"):
            artifact.save(program, root)


@jit
def größer(  # noqa: PLC2401 - a name as good as any other
    x_1, _2, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    x_block = tl.make_block_ptr(x_1, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    out_block = tl.make_block_ptr(_2, (ROWS, COLUMNS), (COLUMNS, 1), (0, 0), (ROWS, COLUMNS), (1, 0))
    tl.store(out_block, tl.load(x_block) + 1.0)


def test_any_name(tmp_path):
    x = torch.randn(2, 64)
    out = torch.full_like(x, torch.nan)
    loaded = artifact.load(artifact.save(größer.warmup(x, out, 2, 64), tmp_path))
    loaded.run(x, out)
    assert torch.equal(out, x + 1.0)


def test_every_kind_of_constexpr(tmp_path):
    x = torch.empty(2, 64)
    program = npu_kernels.by_mode.warmup(x, x, 2, 64, "exp", (2, 64), None, grid=1)
    loaded = artifact.load(artifact.save(program, tmp_path))
    assert loaded.manifest.constexprs == {"ROWS": 2, "COLUMNS": 64, "MODE": "exp", "SHAPE": (2, 64), "REST": None}
    assert "MODE = 'exp'" in loaded.files["kernel_compile.py"]
    result = torch.full((2, 64), torch.nan)
    data = torch.randn(2, 64)
    loaded.run(data, result, 2, 64, "exp", (2, 64), None)
    assert torch.equal(result, data.exp())
    with pytest.raises(ArgumentError, match="nothing or the constexprs"):
        loaded.run(data, result, 2, 64, "log", (2, 64), None)


def test_a_program_that_is_not_well_formed_is_refused(bundle):
    path = bundle / PROGRAM
    path.write_text(path.read_text().replace("tensor<2x64xf32>", "tensor<2x63xf32>", 1))

    def change(data):
        data["files"][PROGRAM] = artifact._hash(path.read_bytes())

    with pytest.raises(NpuProgramError):
        artifact.load(rewritten(bundle, change))


def test_loading_runs_nothing(bundle, monkeypatch):
    monkeypatch.setattr("builtins.exec", lambda *args: pytest.fail("exec"))
    monkeypatch.setattr("builtins.eval", lambda *args: pytest.fail("eval"))
    artifact.load(bundle)


def test_nothing_is_left_where_writing_fails(program, tmp_path, monkeypatch):
    monkeypatch.setattr("os.rename", lambda *args: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(NpuArtifactError, match="no room"):
        artifact.save(program, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_is_not_taken_for_the_same(program, bundle):
    (bundle / PROGRAM).write_text("")
    with pytest.raises(NpuArtifactError):
        artifact.save(program, bundle.parent)


def test_the_same_kernel_elsewhere_is_the_same_bundle(program, bundle, tmp_path):
    copied = tmp_path / "elsewhere" / "npu_kernels.py"
    copied.parent.mkdir()
    shutil.copy(npu_kernels.__file__, copied)
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("npu_kernels_elsewhere", copied)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.empty(2, 64)
    again = module.scaled_sum.warmup(x, x, torch.tensor(2.0), x, 2, 64, grid=(1,), host_layout="0:1")
    assert artifact.save(again, bundle.parent) == bundle


def test_running_checks_the_tensors(program):
    x, y, scale, out = arguments()
    with pytest.raises(ArgumentError, match="got 2 arguments, expected x, y, scale, out"):
        program.run(x, y)
    with pytest.raises(ArgumentError, match=r"'y'.*\(2, 32\)"):
        program.run(x, y[:, :32], scale, out)
    with pytest.raises(DTypeError, match="'x'"):
        program.run(x.half(), y, scale, out)
    with pytest.raises(ArgumentError, match="contiguous"):
        program.run(torch.randn(64, 2).T, y, scale, out)
    with pytest.raises(ArgumentError, match="'x': got a meta tensor"):
        program.run(x.to("meta"), y, scale, out)
    with pytest.raises(ArgumentError, match="'scale': got float"):
        program.run(x, y, 2.0, out)
    program.run(x, y, scale, out, 2, 64)  # constexprs behind the tensors are allowed
    assert torch.equal(out, x + y * scale)


def test_manifest_is_plain_data(program):
    assert Manifest.from_json(json.loads(json.dumps(program.manifest.to_json()))) == program.manifest
