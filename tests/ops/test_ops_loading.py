"""Factored checkpoints as torch models, of text and of images: the dense layers' numbers, little memory, errors."""

import json
import pathlib
import shutil
import subprocess
import sys

import blrlab_ops
import pytest
import torch
from blrlab_ops import generate, graphs, testing
from blrlab_ops.fused import FusedAttention
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

VIT = {
    "image_size": 12, "patch_size": 4, "num_channels": 2, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": 5,
}  # fmt: skip
DIT = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 3,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
IMAGE_LAYERS = {
    "vit": {
        "vit.encoder.layer.0.attention.attention.qkv": ("monarch", 24, 72, (2, 3), 4),
        "vit.encoder.layer.0.attention.output.dense": ("low_rank", 24, 24, (1, 1), 5),
        "vit.encoder.layer.0.intermediate.dense": ("low_rank", 24, 40, (1, 1), 5),
        "vit.encoder.layer.1.attention.attention.qkv": ("blast", 24, 72, (4, 3), 7),
        "vit.encoder.layer.2.attention.attention.key": ("blast", 24, 24, (3, 4), 6),
        "vit.encoder.layer.2.output.dense": ("monarch", 40, 24, (4, 2), 3),
    },
    "dit": {
        "transformer_blocks.0.attn1.qkv": ("monarch", 32, 96, (2, 3), 4),
        "transformer_blocks.0.norm1.linear": ("monarch", 32, 192, (2, 3), 5),
        "transformer_blocks.1.attn1.qkv": ("blast", 32, 96, (4, 3), 7),
        "transformer_blocks.1.ff.net.0.proj": ("low_rank", 32, 128, (1, 1), 5),
        "transformer_blocks.2.attn1.to_v": ("monarch", 32, 32, (2, 4), 3),
    },
}
FIRST = {kind: next(iter(layers)) for kind, layers in IMAGE_LAYERS.items()}
FUSED = {"vit": ("query", "key", "value"), "dit": ("to_q", "to_k", "to_v")}
FILES = {"vit": "model.safetensors", "dit": "diffusion_pytorch_model.safetensors"}
EMBEDDERS = "transformer_blocks.{}.norm1.emb."


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
    path = next(folder.glob("*.safetensors"))
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path)


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


def _class(kind):
    if kind == "vit":
        return transformers.ViTForImageClassification
    return pytest.importorskip("diffusers").DiTTransformer2DModel


def _factor(kind, tensors, dense, name, factors):
    """Put factors in the place of a weight in `tensors`, and their product in its place in `dense`."""
    tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in factors.items()}
    weight = blrlab_ops.to_dense(factors).T
    if not name.endswith(".qkv"):
        del tensors[f"{name}.weight"]
        dense[f"{name}.weight"] = weight.contiguous()
        return
    names = [name.replace("qkv", part) for part in FUSED[kind]]
    dense |= {f"{each}.weight": part.contiguous() for each, part in zip(names, weight.chunk(3), strict=True)}
    tensors[f"{name}.bias"] = torch.cat([tensors.pop(f"{each}.bias") for each in names])
    for each in names:
        del tensors[f"{each}.weight"]


def _write_images(kind, folder, change=None):
    """Write a checkpoint some of whose layers are factored, and return the dense model of the same numbers."""
    torch.manual_seed(0)
    kind_of, file = _class(kind), FILES[kind]
    model = kind_of(transformers.ViTConfig(**VIT)) if kind == "vit" else kind_of(**DIT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "dense")
    dense = safetensors_torch.load_file(folder / "dense" / file)
    if change is not None:
        change(dense)
    tensors = dict(dense)
    for seed, (name, made) in enumerate(IMAGE_LAYERS[kind].items()):
        _factor(kind, tensors, dense, name, testing.random_factors(*made, seed=seed))
    safetensors_torch.save_file(dense, folder / "dense" / file, metadata={"format": "pt"})
    (folder / "small").mkdir()
    safetensors_torch.save_file(tensors, folder / "small" / file, metadata={"format": "pt"})
    shutil.copy(folder / "dense" / "config.json", folder / "small")
    return kind_of.from_pretrained(folder / "dense").eval()


@pytest.fixture(scope="module", params=["vit", "dit"])
def images(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder / "small", _write_images(request.param, folder)


@torch.no_grad()
def _seen(kind, model, dtype=torch.float32):
    torch.manual_seed(1)
    if kind == "vit":
        return model(torch.randn(3, 2, 12, 12).to(dtype)).logits
    return model(torch.randn(3, 3, 8, 8).to(dtype), torch.tensor([0, 7, 40]), torch.tensor([4, 0, 5])).sample


def _agree(found, wanted):
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [None, "ref", "torch_bmm"])
def test_outputs_for_images_are_those_of_the_products(images, impl):
    kind, folder, dense = images
    model = load_factored(folder, impl=impl)
    assert type(model) is _class(kind)
    assert [layer.format for layer in factored_layers(model).values()] == [
        made[0] for made in IMAGE_LAYERS[kind].values()
    ]
    assert {layer.impl for layer in factored_layers(model).values()} == {impl}
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    _agree(_seen(kind, model), _seen(kind, dense))


def test_a_fused_layer_is_one_module_and_its_three_are_gone(images):
    kind, folder, _ = images
    model = load_factored(folder)
    names = [path for path, _ in model.named_modules() if "attention" in path or "attn1" in path]
    first = [path for path in names if ".0." in path]
    assert sum(path.endswith("qkv") for path in first) == 1
    assert not any(path.endswith((*FUSED[kind], "q_proj", "k_proj", "v_proj")) for path in first)
    stored = safetensors_torch.load_file(folder / FILES[kind])
    assert weight_bytes(model) == 4 * sum(tensor.numel() for tensor in stored.values())


def test_weights_for_images_come_in_the_dtype_asked_for(images):
    kind, folder, dense = images
    model = load_factored(folder, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    wanted = _seen(kind, dense.double(), torch.float64)
    dense.float()
    torch.testing.assert_close(_seen(kind, model, torch.float64), wanted, rtol=1e-6, atol=1e-6)
    narrow = _seen(kind, load_factored(folder, dtype=torch.bfloat16), torch.bfloat16)
    assert 0 < (narrow - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("impl", [None, "torch_bmm"])
def test_a_compiled_model_computes_the_same(images, impl):
    kind, folder, _ = images
    model = load_factored(folder, impl=impl)
    wanted = _seen(kind, model)
    torch.compiler.reset()
    found = _seen(kind, torch.compile(model, fullgraph=True, backend="eager"))
    torch.compiler.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
def test_a_graph_of_a_model_computes_the_same_on_other_images(images):
    kind, folder, _ = images
    model = load_factored(folder, "cuda")
    shape = (3, 2, 12, 12) if kind == "vit" else (3, 3, 8, 8)
    image, found = torch.randn(shape, device="cuda"), []
    told = () if kind == "vit" else (torch.tensor([0, 7, 40], device="cuda"), torch.tensor([4, 0, 5], device="cuda"))
    graph = graphs.capture([lambda: found.append(model(image, *told, return_dict=False)[0])] * 2)
    image.copy_(torch.randn(shape, device="cuda"))
    graph.replay()
    torch.testing.assert_close(found[-1], model(image, *told, return_dict=False)[0], rtol=1e-5, atol=1e-5)


def test_files_of_the_names_in_memory_are_read(tmp_path):
    """transformers 5 has other names for a ViT in memory than in files, and writes them where it is asked to."""
    model = _write_images("vit", tmp_path)
    (tmp_path / "memory").mkdir()
    shutil.copy(tmp_path / "dense" / "config.json", tmp_path / "memory")
    safetensors_torch.save_file(model.state_dict(), tmp_path / "memory" / "model.safetensors")
    torch.testing.assert_close(_seen("vit", load_factored(tmp_path / "memory")), _seen("vit", model))
    torch.testing.assert_close(_seen("vit", load_factored(tmp_path / "dense")), _seen("vit", model))


def test_a_vit_without_its_classifier_is_read(tmp_path):
    """Files of a bare ViTModel have no `vit.` in front, and a pooler."""
    _write_images("vit", tmp_path)
    _change(tmp_path / "small", _strip)
    config = tmp_path / "small" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["ViTModel"]}))
    body = load_factored(tmp_path / "small")
    whole = transformers.ViTForImageClassification.from_pretrained(tmp_path / "dense").vit.eval()
    image = torch.randn(1, 2, 12, 12)
    with torch.no_grad():
        _agree(body(image).last_hidden_state, whole(image).last_hidden_state)


def _strip(tensors):
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.startswith("vit."):
            tensors[name.removeprefix("vit.")] = tensor
    tensors |= {"pooler.dense.weight": torch.eye(24), "pooler.dense.bias": torch.zeros(24)}


def test_positions_are_computed_and_weights_take_no_memory_before_they_come(images):
    from blrlab_ops.loading import _blank

    kind, folder, dense = images
    blank = _blank(folder)
    held = {name for name, parameter in blank.named_parameters() if parameter.device.type != "meta"}
    assert held == ({"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} if kind == "vit" else set())
    assert [name for name, _ in blank.named_buffers()] == [name for name, _ in dense.named_buffers()]
    for found, wanted in zip(blank.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("also", ["left out", "the same", "the first factored"])
def test_blocks_share_embedders_that_are_left_out_or_the_same(tmp_path, also):
    def tie(tensors):
        for name in [name for name in tensors if name.startswith((EMBEDDERS.format(1), EMBEDDERS.format(2)))]:
            tensors[name] = tensors[EMBEDDERS.format(0) + name.partition(".emb.")[2]].clone()

    dense, small = _write_images("dit", tmp_path, tie), tmp_path / "small"
    if also == "left out":
        _change(small, lambda tensors: _drop(tensors, EMBEDDERS.format(1), EMBEDDERS.format(2)))
    elif also == "the first factored":
        # The layer comes once, the other embedders come again in every block.
        name = f"{EMBEDDERS.format(0)}timestep_embedder.linear_2"
        factors = testing.random_factors("low_rank", 32, 32, (1, 1), 5)
        _change(small, lambda tensors: _factor("dit", tensors, {}, name, factors))
        _change(small, lambda tensors: _drop(tensors, *(name.replace(".0.", f".{at}.") for at in (1, 2))))
        for block in dense.transformer_blocks:
            block.norm1.emb.timestep_embedder.linear_2.weight.data.copy_(blrlab_ops.to_dense(factors).T)
    model = load_factored(small)
    _agree(_seen("dit", model), _seen("dit", dense))
    first, *others = (dict(block.norm1.emb.named_parameters()) for block in model.transformer_blocks)
    assert all(other[name] is parameter for other in others for name, parameter in first.items())
    stored = safetensors_torch.load_file(small / FILES["dit"])
    once = {
        name: tensor for name, tensor in stored.items() if not name.startswith(tuple(map(EMBEDDERS.format, (1, 2))))
    }
    assert weight_bytes(model) == 4 * sum(tensor.numel() for tensor in once.values())


def _drop(tensors, *starts):
    for name in [name for name in tensors if name.startswith(starts)]:
        del tensors[name]


def test_files_have_the_names_of_either_library(images, tmp_path):
    kind, folder, dense = images
    shutil.copytree(folder, tmp_path / "again")
    tensors = safetensors_torch.load_file(tmp_path / "again" / FILES[kind])
    (tmp_path / "again" / FILES[kind]).unlink()
    halves = [{name: tensors[name] for name in sorted(tensors)[start::2]} for start in range(2)]
    for stem in ("model", "diffusion_pytorch_model"):
        weights = {}
        for number, half in enumerate(halves):
            safetensors_torch.save_file(half, tmp_path / "again" / f"{stem}-{number}.safetensors")
            weights |= dict.fromkeys(half, f"{stem}-{number}.safetensors")
        index = tmp_path / "again" / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weights}))
        _agree(_seen(kind, load_factored(tmp_path / "again")), _seen(kind, dense))
        (tmp_path / "again" / f"{stem}-1.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks the shard {stem}-1.safetensors"):
            load_factored(tmp_path / "again")
        index.unlink()
    safetensors_torch.save_file(tensors, tmp_path / "again" / "model.safetensors")
    _agree(_seen(kind, load_factored(tmp_path / "again")), _seen(kind, dense))


def test_the_class_of_older_releases_and_their_table_of_positions(tmp_path, caplog):
    dense, small = _write_images("dit", tmp_path), tmp_path / "small"
    config = json.loads((small / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "torch_dtype": "float32"}
    (small / "config.json").write_text(json.dumps(config))
    _change(small, lambda tensors: tensors.update({"pos_embed.pos_embed": torch.ones(1, 16, 32)}))
    caplog.clear()
    model = load_factored(small)
    assert type(model) is _class("dit")
    assert not caplog.records
    _agree(_seen("dit", model), _seen("dit", dense))


def _broken_images(images, tmp_path, change):
    kind, folder, _ = images
    shutil.copytree(folder, tmp_path / "broken")
    _change(tmp_path / "broken", lambda tensors: change(tensors, FIRST[kind]))
    with pytest.raises(ValueError) as caught:
        load_factored(tmp_path / "broken")
    assert str(tmp_path / "broken") in str(caught.value)
    return str(caught.value)


def test_biases_of_a_fused_layer_may_be_apart(images, tmp_path):
    kind, folder, dense = images

    def split(tensors):
        for name in [name for name in tensors if name.endswith(".qkv.bias")]:
            names = [name.replace("qkv", part) for part in FUSED[kind]]
            tensors |= {each: part.clone() for each, part in zip(names, tensors.pop(name).chunk(3), strict=True)}

    shutil.copytree(folder, tmp_path / "apart")
    _change(tmp_path / "apart", split)
    _agree(_seen(kind, load_factored(tmp_path / "apart")), _seen(kind, dense))
    _change(tmp_path / "apart", lambda tensors: tensors.pop(FIRST[kind].replace("qkv", FUSED[kind][1]) + ".bias"))
    with pytest.raises(ValueError, match=rf"lacks {FIRST[kind]}\.bias"):
        load_factored(tmp_path / "apart")


def test_a_fused_layer_that_is_not_whole(images, tmp_path):
    name = FIRST[images[0]]
    said = _broken_images(images, tmp_path, lambda tensors, name: tensors.pop(f"{name}.bias"))
    assert f"lacks {name}.bias" in said


def test_a_fused_layer_that_is_missing(images, tmp_path):
    said = _broken_images(images, tmp_path, lambda tensors, name: _drop(tensors, f"{name}."))
    assert "attn1.to_q.weight" in said or "attention.q_proj.weight" in said or "attention.query.weight" in said


@pytest.mark.parametrize("at", range(3))
def test_dense_layers_beside_the_fused_one(images, tmp_path, at):
    other = FIRST[images[0]].replace("qkv", FUSED[images[0]][at])
    said = _broken_images(images, tmp_path, lambda tensors, name: tensors.update({f"{other}.weight": torch.ones(2)}))
    assert f"the tensor '{other}.weight' has no place" in said


def test_a_fused_layer_of_another_size(images, tmp_path):
    kind = images[0]
    name, width = FIRST[kind], {"vit": 24, "dit": 32}[kind]

    def narrow(tensors, name):
        tensors.update(
            {f"{name}.U": tensors[f"{name}.U"][:, :2].clone(), f"{name}.V": tensors[f"{name}.V"][:, :2].clone()}
        )
        tensors[f"{name}.bias"] = tensors[f"{name}.bias"][: 2 * width].clone()

    said = _broken_images(images, tmp_path, narrow)
    assert f"{name} is {width} x {2 * width}, and the model's {width} x {3 * width}" in said


def test_factors_that_do_not_fit_together(images, tmp_path):
    name = FIRST[images[0]]
    said = _broken_images(
        images, tmp_path, lambda tensors, name: tensors.update({f"{name}.U": tensors[f"{name}.U"][:, :2].clone()})
    )
    assert f"{name}: " in said


def test_other_shapes_and_places_for_images(images, tmp_path):
    kind = images[0]
    norm = {"vit": "vit.encoder.layer.1.layernorm_before.weight", "dit": "proj_out_1.bias"}[kind]
    said = _broken_images(images, tmp_path / "1", lambda tensors, name: tensors.update({norm: torch.ones(7)}))
    assert f"{norm} is [7], and the model's" in said
    said = _broken_images(
        images, tmp_path / "2", lambda tensors, name: tensors.update({"head.qkv.V": torch.ones(4, 2)})
    )
    assert "no layer 'head.qkv'" in said
    inner = {"vit": "vit.encoder.layer.0.qkv", "dit": "transformer_blocks.0.qkv"}[kind]
    said = _broken_images(
        images, tmp_path / "3", lambda tensors, name: tensors.update({f"{inner}.V": torch.ones(4, 2)})
    )
    assert f"no layer '{inner}'" in said


def test_fused_layers_are_of_attention_that_is_known(tmp_path):
    """In a Llama queries, keys and values are not of one size, and are turned before they meet."""
    _write("llama", tmp_path)
    name = "model.layers.0.self_attn.qkv"
    _change(tmp_path, lambda tensors: tensors.update({f"{name}.V": torch.ones(24, 2), f"{name}.U": torch.ones(2, 48)}))
    with pytest.raises(ValueError, match=f"no layer '{name}'"):
        load_factored(tmp_path)


@pytest.mark.parametrize("name", ["DDIMScheduler", "NoModel", None])
def test_configs_that_name_no_model_of_diffusers(tmp_path, name):
    pytest.importorskip("diffusers")
    safetensors_torch.save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"names no model of diffusers: its class is {name!r}"):
        load_factored(tmp_path)


@pytest.mark.parametrize("damaged", ["{", "[1, 2]", "7"])
def test_configs_that_are_damaged(tmp_path, damaged):
    safetensors_torch.save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        load_factored(tmp_path)


@pytest.mark.parametrize("absent", ["transformers", "diffusers", "safetensors"])
def test_what_is_not_installed_is_named(images, monkeypatch, absent):
    if absent == {"vit": "diffusers", "dit": "transformers"}[images[0]]:
        pytest.skip("not needed")
    monkeypatch.setitem(sys.modules, absent, None)
    extra = "diffusers" if absent == "diffusers" else "models"
    with pytest.raises(ImportError, match=rf"{absent} cannot be imported \(.*\): pip install 'blrlab-ops\[{extra}\]'"):
        load_factored(images[1])


@torch.no_grad()
def test_fused_attention_by_hand():
    """Heads, a mask of either kind, and dropout in training only."""
    torch.manual_seed(0)
    qkv, out, x = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12), torch.randn(2, 5, 12)
    made = FusedAttention(qkv, heads=3, dropout=0.5, o_proj=out).eval()
    q, k, v = (part.reshape(2, 5, 3, 4).transpose(1, 2) for part in qkv(x).chunk(3, -1))
    seen = torch.rand(2, 1, 5, 5) < 0.7
    seen |= torch.eye(5, dtype=torch.bool)
    hidden = torch.zeros(2, 1, 5, 5).masked_fill(~seen, -torch.inf)
    for mask in (None, seen, hidden):
        products = q @ k.mT / 2 + (0 if mask is None else hidden)
        mixed = (products.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 12)
        found, kept = made(x, mask, output_attentions=False)
        torch.testing.assert_close(found, out(mixed))
        assert kept is None
        torch.testing.assert_close(FusedAttention(qkv, 3)(x, mask)[0], mixed)
    assert not torch.allclose(made.train()(x)[0], made.eval()(x)[0])
