"""Packed factors in safetensors files: what comes back is what was saved, strides too, and damage is named."""

import json
import sys

import blrlab_ops
import pytest
import torch
from blrlab_ops import files, nn, testing
from blrlab_ops.testing import Case

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

CASES = (
    Case("low_rank", 7, 24, 36, (1, 1), 5),
    Case("monarch", 7, 24, 36, (3, 2), 4),
    Case("blast", 7, 24, 36, (2, 3), 5),
    Case("monarch", 7, 24, 36, (1, 2), 1),
    Case("monarch", 7, 24, 3, (4, 1), 5),
    Case("blast", 7, 24, 36, (1, 3), 1),
)
ids = [f"{case.format} {case.blocks} {case.rank}" for case in CASES]


def described(path):
    """Return what the file's metadata says about factors."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["blrlab_ops"])


def rewrite(path, change):
    """Save a file of a layer "a" with a Monarch layer, its tensors and metadata changed by a function."""
    files.save(path, {"a": nn.MonarchLinear(24, 36, (3, 2), 4)})
    tensors, texts = safetensors.load_file(path), {"format": "pt", "blrlab_ops": described(path)}
    change(tensors, texts["blrlab_ops"])
    texts["blrlab_ops"] = json.dumps(texts["blrlab_ops"])
    safetensors.save_file(tensors, path, metadata=texts)


def assert_same(loaded, factors):
    assert list(loaded) == [name for name in ("V", "S", "U") if name in factors]
    for name, factor in factors.items():
        assert loaded[name].dtype == factor.dtype
        assert loaded[name].stride() == factor.stride()
        assert torch.equal(loaded[name], factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch_bmm", "ref"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_packed_factors_come_back_with_their_strides_and_compute_the_same(tmp_path, case, impl, dtype):
    x, factors, bias = testing.random_operands(case, dtype=dtype)
    packed = blrlab_ops.pack(factors, impl=impl)
    files.save(tmp_path / "one", {"h.0.fc": (packed, bias), "plain": (packed, None)})
    layers = files.load(tmp_path / "one")
    assert list(layers) == ["h.0.fc", "plain"]
    loaded, loaded_bias = layers["h.0.fc"]
    assert_same(loaded, packed)
    assert torch.equal(loaded_bias, bias)
    assert layers["plain"][1] is None
    # to the last bit but one: a product on a CPU depends on where in memory its operands begin
    torch.testing.assert_close(
        blrlab_ops.linear(x, loaded, loaded_bias, impl=impl), blrlab_ops.linear(x, packed, bias, impl=impl)
    )


@pytest.mark.parametrize("impl", [None, "torch_bmm", "ref"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_modules_are_saved_with_the_implementation_they_are_packed_for(tmp_path, case, impl):
    layer = nn.layer(*testing.random_operands(case)[1:], impl=impl)
    files.save(tmp_path / "one", {"a": layer})
    (factors, bias) = files.load(tmp_path / "one", impl=impl)["a"]
    assert_same(factors, layer.factors)
    assert described(tmp_path / "one")["layers"]["a"]["impl"] == impl
    x = torch.randn(7, 24)
    torch.testing.assert_close(nn.layer(factors, bias, impl)(x), layer(x))
    assert not any(tensor.requires_grad for tensor in (*factors.values(), bias))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_another_implementation_is_packed_for_when_loaded(tmp_path, case):
    factors = testing.random_factors(*case[:1], *case[2:])
    files.save(tmp_path / "one", {"a": (factors, None)})
    assert_same(files.load(tmp_path / "one")["a"][0], factors)
    assert_same(files.load(tmp_path / "one", impl="torch_bmm")["a"][0], blrlab_ops.pack(factors, impl="torch_bmm"))
    with pytest.raises(ValueError, match="did you mean 'torch_bmm'"):
        files.load(tmp_path / "one", impl="torch_bm")
    with pytest.raises(blrlab_ops.CannotRun, match="triton_two_stage"):
        files.load(tmp_path / "one", impl="triton_two_stage")


def test_the_recorded_implementation_is_one_that_reads_the_factors_as_they_lie(tmp_path):
    factors = testing.random_factors(*CASES[1][:1], *CASES[1][2:])
    layer = nn.MonarchLinear.from_factors(factors, impl="torch_bmm")
    layer.load_state_dict({name: factor.clone() for name, factor in factors.items()}, assign=True)
    files.save(tmp_path / "one", {"a": layer})
    assert described(tmp_path / "one")["layers"]["a"]["impl"] == "ref"
    assert_same(files.load(tmp_path / "one", impl="torch_bmm")["a"][0], blrlab_ops.pack(factors))


def test_factors_in_any_layout_and_order_are_kept_without_gaps(tmp_path):
    wide = torch.randn(36, 4, 3, 3)
    factors = {"U": wide.permute(3, 2, 1, 0)[:, :2], "V": torch.randn(3, 2, 16, 4)[:, :, ::2]}
    shared = torch.nn.Parameter(torch.randn(72))
    files.save(tmp_path / "one", {"a": (factors, shared), "b": (factors, shared)})
    for loaded, bias in files.load(tmp_path / "one").values():
        assert all(torch.equal(loaded[name], factor) for name, factor in factors.items())
        assert torch.equal(bias, shared)
        assert loaded["U"].stride() == (1, 3, 6, 24)
    assert (tmp_path / "one").stat().st_size < 2 * 4 * (3 * 2 * 4 * (36 + 8) + 72) + 2000


def test_others_read_the_file_by_its_metadata(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    factors = blrlab_ops.pack(testing.random_factors(*CASES[1][:1], *CASES[1][2:]))
    files.save(tmp_path / "one", {"a": (factors, torch.zeros(36))}, metadata={"of": "a test", "format": "mine"})
    stored, said = numpy.load_file(tmp_path / "one"), described(tmp_path / "one")
    assert said == {
        "version": 1,
        "layers": {
            "a": {
                "format": "monarch",
                "impl": None,
                "permute": {"V": [0, 2, 3, 1], "U": [2, 0, 3, 1], "bias": [0]},
            }
        },
    }
    assert set(stored) == {"a.V", "a.U", "a.bias"}
    for name, factor in factors.items():
        transposed = stored[f"a.{name}"].transpose(said["layers"]["a"]["permute"][name])
        assert torch.equal(torch.from_numpy(transposed.copy()), factor)
    with safetensors.safe_open(tmp_path / "one", "pt") as file:
        assert (file.metadata()["of"], file.metadata()["format"]) == ("a test", "mine")


def test_a_file_may_be_saved_over_while_its_tensors_are_in_use(tmp_path):
    first = nn.MonarchLinear(24, 36, (3, 2), 4)
    files.save(tmp_path / "one", {"a": first})
    loaded = files.load(tmp_path / "one")
    files.save(tmp_path / "one", {"a": nn.MonarchLinear(24, 36, (3, 2), 4)})
    assert_same(loaded["a"][0], first.factors)
    files.save(str(tmp_path / "one"), loaded)
    assert_same(files.load(str(tmp_path / "one"))["a"][0], first.factors)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "one"
    files.save(path, {"a": nn.LowRankLinear(8, 4, 2)})
    before = path.read_bytes()

    def fail(tensors, place, metadata):
        place.write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="disk is full"):
        files.save(path, {"a": nn.LowRankLinear(8, 4, 3)})
    assert [each.name for each in tmp_path.iterdir()] == ["one"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"": nn.LowRankLinear(8, 4, 2)}, "layer '': its name must be a string and not empty"),
        ({3: nn.LowRankLinear(8, 4, 2)}, "layer 3: its name must be a string"),
        ({"a": {"V": torch.zeros(8, 2), "U": torch.zeros(2, 4)}}, r"layer 'a': it must be .* not a dict"),
        ({"a": ({"V": torch.zeros(8, 2), "W": torch.zeros(2, 4)}, None)}, "layer 'a': .* no known format"),
        ({"a": ({"V": torch.zeros(8, 2), "U": torch.zeros(3, 4)}, None)}, "layer 'a': .*V must be"),
        ({"a": ({"V": torch.zeros(8, 2), "U": torch.zeros(2, 4)}, torch.zeros(5))}, r"layer 'a': .*bias must be \[4\]"),
        ({"a": nn.LowRankLinear(8, 4, 2, device="meta")}, "layer 'a': V is on the meta device"),
    ],
    ids=["no name", "number", "no pair", "format", "shapes", "bias", "meta"],
)
def test_what_is_no_layer_is_not_saved(tmp_path, layers, said):
    with pytest.raises(ValueError, match=said):
        files.save(tmp_path / "one", layers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metadata", [{"steps": 3}, {"blrlab_ops": "mine"}, {3: "steps"}])
def test_metadata_must_be_strings_and_leave_ours_alone(tmp_path, metadata):
    with pytest.raises(ValueError, match="metadata must be strings"):
        files.save(tmp_path / "one", {}, metadata=metadata)


def _set(key, value):
    return lambda tensors, said: said["layers"]["a"].update({key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, said: tensors.pop("a.U"), "lacks the tensor 'a.U'"),
        (lambda tensors, said: tensors.update({"b.V": tensors.pop("a.V")}), "lacks the tensor 'a.V'"),
        (lambda tensors, said: tensors.update({"a.U": torch.zeros(2, 3, 5, 18)}), "a.V, a.U, a.bias are no layer: .*U"),
        (
            lambda tensors, said: tensors.update({"a.bias": torch.zeros(35)}),
            r"a.bias are no layer: .*bias must be \[36",
        ),
        (lambda tensors, said: tensors.update({"a.U": torch.zeros(2, 12, 18)}), r"'a.U' \[2, 12, 18\] cannot be perm"),
        (lambda tensors, said: tensors.update({"a.V": tensors["a.V"].double()}), "a.V, a.U, a.bias .*float64"),
        (lambda tensors, said: tensors.update({k: v.int() for k, v in tensors.items()}), "a.V, a.U, a.bias .*int32"),
        (_set("format", "low_rank"), "they are monarch, and the metadata says low_rank"),
        (_set("permute", {}), "are no layer: .*no known format"),
        (_set("permute", {"V": ["x"]}), r"'a.V' .* cannot be permuted by \['x'\]"),
        (_set("permute", {"V": None}), "'a.V' .* cannot be permuted by None"),
        (_set("permute", 3), "its metadata 'blrlab_ops' is damaged"),
        (lambda tensors, said: said["layers"]["a"].pop("impl"), "is damaged .*impl"),
        (lambda tensors, said: said.pop("layers"), "is damaged .*layers"),
        (lambda tensors, said: said.update(layers=[1]), "is damaged"),
        (lambda tensors, said: said.update(version=2), "has layout version 2, and this blrlab_ops reads 1"),
    ],
)
def test_damage_is_named_with_file_and_tensor(tmp_path, change, said):
    rewrite(tmp_path / "one.safetensors", change)
    with pytest.raises(ValueError, match=said) as caught:
        files.load(tmp_path / "one.safetensors")
    assert str(tmp_path / "one.safetensors") in str(caught.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "one"
    with pytest.raises(FileNotFoundError, match="one"):
        files.load(path)
    for metadata in (None, {"format": "pt"}):
        safetensors.save_file({"a.V": torch.zeros(3)}, path, metadata=metadata)
        with pytest.raises(ValueError, match="one was not saved by blrlab_ops"):
            files.load(path)
    safetensors.save_file({"a.V": torch.zeros(3)}, path, metadata={"blrlab_ops": "{"})
    with pytest.raises(ValueError, match="one: its metadata 'blrlab_ops' is damaged"):
        files.load(path)
    files.save(path, {"a": nn.LowRankLinear(8, 4, 2)})
    for content in (path.read_bytes()[:-8], path.read_bytes()[:20], b"not at all", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="one is no safetensors file"):
            files.load(path)


@pytest.mark.parametrize("call", [lambda: files.save("x", {}), lambda: files.load("x")], ids=["save", "load"])
def test_without_safetensors_the_error_says_what_to_install(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'blrlab-ops\[files\]'"):
        call()


def test_the_module_loads_safetensors_only_when_used(run_child):
    run_child("-c", "import sys, blrlab_ops; blrlab_ops.files; sys.exit('safetensors' in sys.modules)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("impl", [None, "torch_bmm", "triton_two_stage"])
@pytest.mark.parametrize("case", CASES[:3], ids=ids[:3])
def test_on_a_gpu_layers_come_back_packed(tmp_path, case, impl):
    x, factors, bias = testing.random_operands(case, dtype=torch.bfloat16, device="cuda")
    layer = nn.layer(factors, bias, impl)
    files.save(tmp_path / "one", {"a": layer})
    loaded, loaded_bias = files.load(tmp_path / "one", "cuda", impl)["a"]
    assert_same(loaded, layer.factors)
    assert torch.equal(nn.layer(loaded, loaded_bias, impl)(x), layer(x))
