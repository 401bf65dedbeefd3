"""GPT-2 checkpoints: the same logits as the Hugging Face model that wrote them, and a sentence for every broken one."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blrlab.errors import InputError
from blrlab.models import gpt2, hf

SIZES = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 16))


@pytest.fixture(scope="module")
def torch_model():
    """A GPT-2 of random weights, every bias and norm too, in float32 and evaluation mode."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def checkpoints(torch_model, tmp_path_factory):
    """Save the model as one file, and as shards of a few tensors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch_model.save_pretrained(folder / "single")
    torch_model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of the single-file checkpoint, to be damaged."""
    return _copy(checkpoints / "single", tmp_path)


@pytest.fixture
def broken_shards(checkpoints, tmp_path):
    """A copy of the sharded checkpoint, to be damaged."""
    return _copy(checkpoints / "sharded", tmp_path)


def _copy(source, tmp_path):
    folder = tmp_path / "gpt2"
    shutil.copytree(source, folder)
    return folder


def _load(folder, dtype="float32"):
    found = hf.find(str(folder))
    family, config = hf.describe(found, dtype=dtype, dropout=0.0)
    params, specs = hf.load(found, family, config)
    assert specs == {}
    return config, params


@functools.cache
def _model(config):
    run = jax.jit(gpt2.GPT2(config).apply)
    return lambda params: np.asarray(run({"params": params}, TOKENS))


def _torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def _agree(logits, wanted):
    """Check logits to 1e-5 of their own size."""
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@contextlib.contextmanager
def _one_sentence(*said):
    """Expect an InputError of one line that holds all that is given."""
    with pytest.raises(InputError) as caught:
        yield
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(str(part) in sentence for part in said), sentence


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_logits_are_those_of_transformers(checkpoints, torch_model, name):
    shards = len(list((checkpoints / name).glob("*.safetensors")))
    assert shards == 1 if name == "single" else shards > 2
    config, params = _load(checkpoints / name)
    assert config == gpt2.Config(61, 16, 2, 3, 24, dropout=0.0, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, gpt2.parameter_shapes(config))
    wanted = _torch_logits(torch_model)
    assert wanted.std() > 0.1
    _agree(_model(config)(params), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_checkpoints_are_computed_in_float32(checkpoints, tmp_path, dtype):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    narrow = transformers.GPT2LMHeadModel.from_pretrained(checkpoints / "single", dtype=getattr(torch, dtype))
    narrow.save_pretrained(tmp_path)
    wide = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    config, params = _load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    _agree(_model(config)(params), _torch_logits(wide.eval()))


def test_the_names_and_buffers_of_the_released_files_are_known(checkpoints, broken):
    """OpenAI's files have no `transformer.` in front, and hold the causal masks."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(broken / hf.SINGLE).items()}
    masks = {f"h.{index}.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.float32)) for index in range(2)}
    masked = {f"h.{index}.attn.masked_bias": np.array(-1e4, np.float32) for index in range(2)}
    save_file(tensors | masks | masked | {"lm_head.weight": tensors["wte.weight"]}, broken / hf.SINGLE)
    found, wanted = _load(broken), _load(checkpoints / "single")
    assert found[0] == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], wanted[1])


def test_dtype_and_dropout_are_the_callers(checkpoints):
    _, config = hf.describe(checkpoints / "single", dtype="bfloat16", dropout=0.25)
    assert (config.dtype, config.dropout) == ("bfloat16", 0.25)


def test_a_folder_is_found_by_path_and_under_home(checkpoints, monkeypatch):
    assert hf.find(str(checkpoints / "single")) == checkpoints / "single"
    monkeypatch.setenv("HOME", str(checkpoints))
    assert hf.find("~/single") == checkpoints / "single"


def _edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_missing_config(broken):
    (broken / "config.json").unlink()
    with _one_sentence(broken, "is not a checkpoint: it has no config.json."):
        _load(broken)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"model_type": "gpt2", ', b"[]", b"null", b"\xff\xfe", b'{"model_type": "gpt2"}'],
    ids=["empty", "cut", "list", "null", "not text", "no sizes"],
)
def test_a_damaged_config(broken, content):
    (broken / "config.json").write_bytes(content)
    with _one_sentence(broken / "config.json", "is damaged"):
        _load(broken)


@pytest.mark.parametrize("fields", [{"n_embd": "24"}, {"n_layer": None}, {"n_head": [3]}, {"n_embd": 24.0}], ids=str)
def test_sizes_that_are_no_whole_numbers(broken, fields):
    _edit(broken, **fields)
    with _one_sentence(broken / "config.json"):
        _load(broken)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "gpt3"}, 'unknown model_type "gpt3"'),
        ({"activation_function": "relu"}, "activation_function is 'relu'; this model has 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; this model has 1e-05"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_inner": 48}, "n_inner is 48; this model has 4 n_embd = 96"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_architecture(broken, fields, said):
    _edit(broken, **fields)
    with _one_sentence(broken / "config.json", said):
        _load(broken)


def test_heads_that_do_not_divide_the_width(broken):
    _edit(broken, n_head=5)
    with _one_sentence("5 heads do not divide its width of 24"):
        _load(broken)


def test_an_inner_width_of_four_times_the_width_is_the_same(broken, checkpoints):
    _edit(broken, n_inner=96)
    assert hf.describe(broken) == hf.describe(checkpoints / "single")


def _retensor(folder, change):
    tensors = load_file(folder / hf.SINGLE)
    change(tensors)
    save_file(tensors, folder / hf.SINGLE)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["h.1.mlp.c_fc.weight"], ["lacks h_1/mlp/c_fc/kernel."]),
        (["ln_f.bias", "wpe.weight", "h.0.ln_1.weight"], ["ln_f/bias", "wpe/embedding", "h_0/ln_1/scale"]),
        ([f"h.1.{name}.{leaf}" for name in ("ln_1", "ln_2") for leaf in ("weight", "bias")], ["and 1 more"]),
    ],
    ids=["one", "three", "more"],
)
def test_missing_tensors(broken, names, said):
    _retensor(broken, lambda tensors: [tensors.pop(f"transformer.{name}") for name in names])
    with _one_sentence(broken, "lacks", *said):
        _load(broken)


@pytest.mark.parametrize(
    "name", ["transformer.h.2.ln_1.weight", "score.weight", "transformer.h.0.attn.q_attn.weight", "odd", "h.0"]
)
def test_an_extra_tensor(broken, name):
    _retensor(broken, lambda tensors: tensors.update({name: np.ones(24, np.float32)}))
    with _one_sentence(broken, f'the tensor "{name}" has no place in this model.'):
        _load(broken)


def test_a_tensor_of_another_shape(broken):
    name = "transformer.h.0.mlp.c_fc.weight"
    _retensor(broken, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    with _one_sentence(broken, f'the tensor "{name}" is (96, 24), not (24, 96).'):
        _load(broken)


@pytest.mark.parametrize("number", [np.nan, np.inf], ids=str)
def test_a_tensor_that_is_not_finite(broken, number):
    def spoil(tensors):
        tensors["transformer.wte.weight"][60, 23] = number

    _retensor(broken, spoil)
    with _one_sentence(broken, 'the tensor "transformer.wte.weight" holds NaN or infinity.'):
        _load(broken)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "length", "header", "last byte"])
def test_a_truncated_file(broken, kept):
    path = broken / hf.SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    with _one_sentence(path, "is damaged"):
        _load(broken)


def test_a_missing_shard(broken_shards):
    shard = sorted(broken_shards.glob("*.safetensors"))[1]
    shard.unlink()
    with _one_sentence(broken_shards, f"lacks the shard {shard.name}."):
        _load(broken_shards)


def test_a_truncated_shard(broken_shards):
    shard = sorted(broken_shards.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with _one_sentence(shard, "is damaged"):
        _load(broken_shards)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": null}', b'{"weight_map": {"wte.weight": 1}}', b"\xff\xfe"],
    ids=["empty", "cut", "list", "no map", "null", "numbers", "not text"],
)
def test_a_damaged_index(broken_shards, content):
    (broken_shards / hf.INDEX).write_bytes(content)
    with _one_sentence(broken_shards / hf.INDEX, "is damaged"):
        _load(broken_shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(broken, name):
    (broken / hf.SINGLE).unlink()
    (broken / name).write_bytes(b"cos\nabort\n(tR.")
    with _one_sentence(broken / name, "is a pickle, which can run code: convert it to safetensors."):
        _load(broken)


def test_a_pickle_beside_safetensors_does_not_matter(broken):
    (broken / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    _load(broken)


def test_no_weights_at_all(broken):
    (broken / hf.SINGLE).unlink()
    with _one_sentence(broken, "has neither model.safetensors nor model.safetensors.index.json."):
        _load(broken)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/gpt2", "~/nowhere", "a/b/c"])
def test_an_unknown_folder(name):
    with _one_sentence(f'no checkpoint at "{name}"'):
        hf.find(name)


def test_an_unknown_home():
    with _one_sentence('"~nobody-of-this-name/gpt2"'):
        hf.find("~nobody-of-this-name/gpt2")


def test_a_file_is_no_folder(broken):
    with _one_sentence(str(broken / "config.json"), "it is not a folder."):
        hf.find(str(broken / "config.json"))


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "not a name", "no--body/gpt2"])
def test_a_hub_name_without_the_hub(name, monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with _one_sentence(f'no folder "{name}", and the hub did not give it: '):
        hf.find(name)


def test_without_the_hub_client_the_sentence_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with _one_sentence('no folder "gpt2"', "pip install huggingface-hub"):
        hf.find("gpt2")


def test_a_hub_name_is_downloaded_without_pickles(monkeypatch, tmp_path, checkpoints):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, allow_patterns, ignore_patterns):
        asked[name] = allow_patterns
        assert "vae/*" in ignore_patterns
        return str(checkpoints / "single")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert hf.find("openai-community/gpt2") == checkpoints / "single"
    ((name, patterns),) = asked.items()
    assert name == "openai-community/gpt2"
    assert {"config.json", "*.safetensors", "*.safetensors.index.json"} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in patterns)


def test_of_a_pipeline_the_denoiser_is_found(tmp_path, monkeypatch):
    (tmp_path / "pipeline/transformer").mkdir(parents=True)
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    assert hf.find(str(tmp_path / "pipeline")) == tmp_path / "pipeline/transformer"
    (tmp_path / "pipeline/config.json").write_text("{}")  # a model of its own
    assert hf.find(str(tmp_path / "pipeline")) == tmp_path / "pipeline"


def test_a_folder_of_a_hub_name_comes_first(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert hf.find("gpt2").resolve() == tmp_path / "gpt2"
