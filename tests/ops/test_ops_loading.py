"""Factored checkpoints as torch models: the same numbers as the dense layers they stand for, little memory, errors."""

import json
import pathlib
import shutil
import subprocess
import sys

import blrlab_ops
import pytest
import torch
from blrlab_ops import generate, testing
from blrlab_ops.loading import factored_layers, load_factored, weight_bytes
from blrlab_ops.nn import load_factored as from_nn

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
LAYERS = {
    "gpt2": {
        "transformer.h.0.attn.c_attn": ("monarch", 24, 72, (2, 3), 4),
        "transformer.h.1.mlp.c_proj": ("blast", 96, 24, (4, 3), 7),
    },
    "llama": {
        "model.layers.0.self_attn.k_proj": ("low_rank", 24, 12, (1, 1), 5),
        "model.layers.1.mlp.down_proj": ("monarch", 40, 24, (4, 2), 3),
        "model.layers.1.mlp.up_proj": ("blast", 24, 40, (3, 4), 6),
    },
}
IDS = torch.arange(18).reshape(2, 9) % 61


def _dense(kind, **fields):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | fields))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _write(kind, folder, shards=False, **fields):
    """Write a checkpoint some of whose layers are factored, and return the dense model of the same numbers."""
    model = _dense(kind, **fields)
    factors = {name: testing.random_factors(*made, seed=at) for at, (name, made) in enumerate(LAYERS[kind].items())}
    with torch.no_grad():
        for name, each in factors.items():
            module = model.get_submodule(name)
            weight = blrlab_ops.to_dense(each)
            module.weight.copy_(weight if kind == "gpt2" else weight.T)
    model.save_pretrained(folder, max_shard_size="9KB" if shards else "5GB")
    files = sorted(folder.glob("*.safetensors"))
    index = {}
    for number, file in enumerate(files):
        tensors = safetensors_torch.load_file(file)
        for name, each in factors.items():
            if tensors.pop(f"{name}.weight", None) is not None:
                tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in each.items()}
        safetensors_torch.save_file(tensors, file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
        assert number < len(files)
    if shards:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return model


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, _write(request.param, folder)


@torch.no_grad()
def _logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("impl", [None, "ref", "torch_bmm"])
def test_logits_are_those_of_the_products(written, impl):
    kind, folder, dense = written
    model = load_factored(folder, impl=impl)
    assert {path: layer.format for path, layer in factored_layers(model).items()} == {
        name: made[0] for name, made in LAYERS[kind].items()
    }
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(_logits(model), _logits(dense), rtol=1e-5, atol=1e-5)


def test_shards_are_read(tmp_path):
    dense = _write("llama", tmp_path, shards=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(_logits(from_nn(tmp_path)), _logits(dense), rtol=1e-5, atol=1e-5)


def test_a_tied_output_layer_is_the_embedding(tmp_path):
    dense = _write("llama", tmp_path, tie_word_embeddings=True)
    model = load_factored(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(_logits(model), _logits(dense), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_the_body_alone_is_read(written, tmp_path):
    """OpenAI's files have no `transformer.` in front."""
    kind, folder, dense = written
    if kind != "gpt2":
        pytest.skip("only GPT-2 is kept so")
    shutil.copytree(folder, tmp_path / "body")
    path = tmp_path / "body" / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    safetensors_torch.save_file(bare, path)
    torch.testing.assert_close(_logits(load_factored(path.parent)), _logits(dense), rtol=1e-5, atol=1e-5)


def test_weights_come_in_the_dtype_asked_for(written):
    _, folder, dense = written
    model = load_factored(folder, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    torch.testing.assert_close(_logits(model), _logits(dense.double()), rtol=1e-6, atol=1e-6)
    dense.float()


def test_text_goes_on_as_from_the_dense_model(written):
    _, folder, dense = written
    model = load_factored(folder)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for each in (model, dense):
        each.generation_config.eos_token_id = None
    assert model.generate(IDS, **settings).tolist() == dense.generate(IDS, **settings).tolist()


def test_packed_factors_keep_their_order(written, tmp_path):
    """A file may hold factors as an implementation reads them, its metadata their order."""
    kind, folder, dense = written
    shutil.copytree(folder, tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    tensors, layers = safetensors_torch.load_file(path), {}
    for name in LAYERS[kind]:
        turned = {part: tensors[f"{name}.{part}"] for part in "VSU" if f"{name}.{part}" in tensors}
        tensors |= {f"{name}.{part}": tensor.transpose(0, -1).contiguous() for part, tensor in turned.items()}
        orders = {part: [tensor.ndim - 1, *range(1, tensor.ndim - 1), 0] for part, tensor in turned.items()}
        layers[name] = {"format": LAYERS[kind][name][0], "impl": None, "permute": orders}
    metadata = {"format": "pt", "blrlab_ops": json.dumps({"version": 1, "layers": layers})}
    safetensors_torch.save_file(tensors, path, metadata=metadata)
    torch.testing.assert_close(_logits(load_factored(path.parent)), _logits(dense), rtol=1e-5, atol=1e-5)


PEAK = """
import resource, sys, torch
from blrlab_ops.loading import load_factored, weight_bytes
import transformers
transformers.LlamaForCausalLM  # what importing takes is no part of it

def held():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

small = load_factored(sys.argv[1])  # what a first model takes besides
open("/proc/self/clear_refs", "w").write("5")
before = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
model = load_factored(sys.argv[2])
print(held() - before, weight_bytes(model))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_factored_size_and_one_tensor(tmp_path):
    """160 MB of factors and tables that stand for a dense model of more than twice that."""
    _write("llama", tmp_path / "small")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 8000}
    config = transformers.LlamaConfig(**LLAMA | sizes)
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {
            name: list(tensor.shape) for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()
        }
    tensors = {}
    for name, shape in shapes.items():
        if "mlp" in name:
            o, i = shape
            tensors |= {
                name.replace("weight", "V"): torch.zeros(i, 64),
                name.replace("weight", "U"): torch.zeros(64, o),
            }
        else:
            tensors[name] = torch.zeros(shape)
    large = tmp_path / "large"
    large.mkdir()
    safetensors_torch.save_file(tensors, large / "model.safetensors")
    (large / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, weights = map(int, done.stdout.split())
    dense = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    largest = 4 * max(tensor.numel() for tensor in tensors.values())
    assert weights == 4 * sum(tensor.numel() for tensor in tensors.values())
    assert weights < dense / 2
    assert peak < weights + largest + (24 << 20)


def _copy(written, tmp_path):
    shutil.copytree(written[1], tmp_path / "broken")
    return tmp_path / "broken"


def _change(folder, change):
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors_torch.save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(written, tmp_path):
    folder = _copy(written, tmp_path)
    name = "model.norm.weight" if written[0] == "llama" else "transformer.ln_f.weight"
    _change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"lacks {name}"):
        load_factored(folder)


def test_a_missing_bias_of_a_factored_layer_is_named(tmp_path):
    _write("gpt2", tmp_path)
    _change(tmp_path, lambda tensors: tensors.pop("transformer.h.1.mlp.c_proj.bias"))
    with pytest.raises(ValueError, match=r"lacks transformer.h.1.mlp.c_proj.bias"):
        load_factored(tmp_path)


def test_a_tensor_without_a_place_is_named(written, tmp_path):
    folder = _copy(written, tmp_path)
    _change(folder, lambda tensors: tensors.update({"score.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"the tensor 'score.weight' has no place"):
        load_factored(folder)


def test_factors_without_a_layer_are_named(written, tmp_path):
    folder = _copy(written, tmp_path)
    _change(folder, lambda tensors: tensors.update({"head.V": torch.ones(4, 2), "head.U": torch.ones(2, 4)}))
    with pytest.raises(ValueError, match="no layer 'head'"):
        load_factored(folder)


def test_shapes_are_checked(written, tmp_path):
    folder = _copy(written, tmp_path)
    name = next(iter(LAYERS[written[0]]))
    _change(folder, lambda tensors: tensors.update({f"{name}.U": torch.ones(2, 3, 4, 7)}))
    with pytest.raises(ValueError):
        load_factored(folder)
    shutil.rmtree(folder)
    folder = _copy(written, tmp_path)
    norm = "model.norm.weight" if written[0] == "llama" else "transformer.ln_f.weight"
    _change(folder, lambda tensors: tensors.update({norm: torch.ones(25)}))
    with pytest.raises(ValueError, match=r"is \[25\], and the model's \[24\]"):
        load_factored(folder)


def test_what_is_no_checkpoint(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither"):
        load_factored(tmp_path)
    folder = _copy(written, tmp_path)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no model of transformers"):
        load_factored(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config"):
        load_factored(folder)
    (folder / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_factored(folder)


def test_an_unknown_implementation_is_refused(written):
    with pytest.raises(ValueError, match="did you mean 'torch_bmm'"):
        load_factored(written[1], impl="torch_bnm")


@pytest.fixture
def with_tokenizer(written, tmp_path):
    """The checkpoint with a tokenizer of 61 letters."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = _copy(written, tmp_path)
    words = {chr(ord("A") + at): at for at in range(61)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="A"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="A").save_pretrained(folder)
    return folder


def test_the_command_continues_a_text(with_tokenizer, capsys):
    assert generate.main([str(with_tokenizer), "--prompt=BCD", "--tokens=5", "--device=cpu"]) == 0
    text, told = capsys.readouterr()
    assert text.strip().replace(" ", "").startswith("BCD")
    assert "tokens/s" in told
    assert f"{len(LAYERS['llama' if 'llama' in str(with_tokenizer) else 'gpt2'])}" in told or "factored layers" in told
    drawn = [str(with_tokenizer), "--prompt=BCD", "--tokens=5", "--device=cpu", "--temperature=2", "--top-p=0.9"]
    assert generate.main(drawn) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokens=0"], "--tokens is 0"),
        (["--tokens=40"], "longer than the model's context of 32"),
        (["--temperature=-1"], "--temperature must be at least 0"),
        (["--impl=torch_bnm"], "torch_bnm"),
        (["--prompt="], "the prompt is empty"),
    ],
)
def test_the_command_says_what_is_wrong(with_tokenizer, flags, said, capsys):
    assert generate.main([str(with_tokenizer), "--prompt=BCD", "--device=cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_the_command_needs_a_folder_and_a_tokenizer(written, tmp_path, capsys):
    assert generate.main([str(tmp_path / "none"), "--prompt=A"]) == 2
    assert "it is not a folder" in capsys.readouterr().err
    assert generate.main([str(written[1]), "--prompt=A"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_the_bytes_of_shared_weights_count_once(tmp_path):
    _write("gpt2", tmp_path)
    model = load_factored(tmp_path)
    stored = safetensors_torch.load_file(pathlib.Path(tmp_path) / "model.safetensors")
    assert weight_bytes(model) == sum(4 * tensor.numel() for name, tensor in stored.items() if name != "lm_head.weight")
