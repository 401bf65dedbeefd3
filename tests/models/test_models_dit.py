"""DiT: the outputs of diffusers and of the authors' names, dense and factored, its sizes, and what it refuses."""

import copy
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params
from safetensors.numpy import save_file

from blrlab import compress
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import dit, hf
from blrlab.models.dit import Config, DiT
from blrlab.models.hf.dit import FAMILY, OLDER, ORIGINAL

SIZES = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}
KINDS = {
    "patches of 2": {},
    "patches of 4": {"patch_size": 4, "norm_eps": 1e-2},
    "no variance": {"patch_size": 1, "sample_size": 3, "out_channels": None, "num_layers": 3},
}
TINY = Config(8, 2, 3, 6, 5, 2, 4, 32, 128)
SPECS = FrozenDict(
    {
        "blocks_0/attn/qkv": Spec("monarch", 32, 96, (2, 3), 4),
        "blocks_0/mlp/fc1": Spec("blast", 32, 128, (4, 4), 7),
        "blocks_1/adaln": Spec("blast", 32, 192, (2, 3), 5),
        "blocks_1/mlp/fc2": Spec("low_rank", 128, 32, rank=5),
        "final/modulation": Spec("low_rank", 32, 64, rank=3),
    }
)
# Of late times the angles, rounded to float32, differ between any two programs; they have their own test.
TIMES, LABELS = np.array([0, 5, 37]), np.array([4, 0, 5])  # the last label stands for none
DENSE = FrozenDict()


def _latents(config=TINY):
    return np.random.default_rng(0).normal(size=(3, *config.shape)).astype(np.float32)


def _numbers(config=TINY, specs=DENSE):
    """Draw parameters in numpy, large enough for every part to matter."""
    random = np.random.default_rng(1)

    def draw(leaf):
        return random.normal(size=leaf.shape, scale=0.2).astype(leaf.dtype)

    return jax.tree.map(draw, dit.parameter_shapes(config, specs))


@functools.cache
def _model(config=TINY, specs=DENSE):
    run = jax.jit(DiT(config, specs).apply)
    return lambda params: np.asarray(run({"params": params}, _latents(config), TIMES, LABELS))


def _agree(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@functools.cache
def _torch_model(kind):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**{**SIZES, **KINDS[kind]}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    _tie(model)
    return model


def _tie(model):
    """Give all blocks the first one's embedders, as diffusers does when it converts the authors' checkpoint."""
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())


def _torch_outputs(model, config):
    import torch

    with torch.no_grad():
        inputs = (torch.from_numpy(array) for array in (_latents(config).transpose(0, 3, 1, 2).copy(), TIMES, LABELS))
        return model(*inputs, return_dict=False)[0].numpy().transpose(0, 2, 3, 1)


def _saved(model, folder):
    model.save_pretrained(folder)
    return folder


def _by_the_authors(model):
    """Name the tensors of a model of diffusers as the authors' code does."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def linear(new, *old):
        for ending in ("weight", "bias"):
            named[f"{new}.{ending}"] = np.concatenate([state[f"{name}.{ending}"] for name in old])

    named = {}
    linear("x_embedder.proj", "pos_embed.proj")
    embedders = "transformer_blocks.0.norm1.emb"
    linear("t_embedder.mlp.0", f"{embedders}.timestep_embedder.linear_1")
    linear("t_embedder.mlp.2", f"{embedders}.timestep_embedder.linear_2")
    named["y_embedder.embedding_table.weight"] = state[f"{embedders}.class_embedder.embedding_table.weight"]
    for index in range(len(model.transformer_blocks)):
        old, new = f"transformer_blocks.{index}", f"blocks.{index}"
        linear(f"{new}.attn.qkv", *(f"{old}.attn1.to_{part}" for part in "qkv"))
        linear(f"{new}.attn.proj", f"{old}.attn1.to_out.0")
        linear(f"{new}.mlp.fc1", f"{old}.ff.net.0.proj")
        linear(f"{new}.mlp.fc2", f"{old}.ff.net.2")
        linear(f"{new}.adaLN_modulation.1", f"{old}.norm1.linear")
    linear("final_layer.adaLN_modulation.1", "proj_out_1")
    linear("final_layer.linear", "proj_out_2")
    named["pos_embed"] = model.pos_embed.pos_embed.numpy()
    return named


@pytest.mark.parametrize("fused", [True, False], ids=["qkv", "q, k, v"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_diffusers(tmp_path, kind, fused):
    model = _torch_model(kind)
    folder = _saved(model, tmp_path / "dit")
    family, config = hf.describe(folder, fused=fused)
    params, specs = hf.load(folder, family, config)
    assert (family, specs) == (FAMILY, {})
    wanted = _torch_outputs(model, config)
    assert wanted.std() > 0.1
    _agree(_model(config)(params), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_by_the_authors_names_hold_the_same_parameters(tmp_path, kind):
    model = copy.deepcopy(_torch_model(kind))
    params, _ = hf.load(*_described(_saved(model, tmp_path / "dit")))
    (tmp_path / "original").mkdir()
    save_file(_by_the_authors(model), tmp_path / "original" / hf.SINGLE)
    fields = ORIGINAL.written(FAMILY.read({**SIZES, **KINDS[kind]}))
    del fields["norm_eps"], fields["frequency_shift"]  # as they are in the authors' code
    (tmp_path / "original" / "config.json").write_text(json.dumps(fields))
    folder, family, config = _described(tmp_path / "original")
    found, _ = hf.load(folder, family, config)
    assert family == ORIGINAL
    jax.tree.map(np.testing.assert_array_equal, found, params)
    # In these two places diffusers strays from the authors' code.
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    _agree(_model(config)(found), _torch_outputs(model, config))


def _described(folder):
    return folder, *hf.describe(folder)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 16], ids=["one file", "shards"])
def test_what_is_exported_is_read_by_diffusers(tmp_path, shard_bytes):
    model = _torch_model("no variance")
    folder, family, config = _described(_saved(model, tmp_path / "dit"))
    params, _ = hf.load(folder, family, config)
    hf.save(tmp_path / "again", family, config, params, shard_bytes=shard_bytes)
    again, found = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(found.values())
    np.testing.assert_array_equal(_torch_outputs(again.eval(), config), _torch_outputs(model, config))
    other, _ = hf.load(tmp_path / "again", family, config)
    jax.tree.map(np.testing.assert_array_equal, other, params)


@pytest.mark.parametrize("family", [FAMILY, ORIGINAL], ids=lambda family: family.name)
@pytest.mark.parametrize("specs", [DENSE, SPECS], ids=["dense", "factored"])
def test_what_is_exported_is_read_again(tmp_path, family, specs):
    config = dataclasses.replace(TINY, mlp_epsilon=1e-3, frequency_shift=1)
    params = _numbers(config, specs)
    hf.save(tmp_path / "dit", family, config, params)
    assert _described(tmp_path / "dit")[1:] == (family, config)
    found, found_specs = hf.load(tmp_path / "dit", family, config)
    assert found_specs == specs
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_dit_xl_2_has_the_size_of_its_released_checkpoint_without_its_table_of_positions():
    """The authors' state dict, and so this sum by hand of their layers, has 675,129,632 numbers."""
    width, inner = 1152, 4608
    block = width * 3 * width + 3 * width + width * width + width  # attention
    block += width * inner + inner + inner * width + width + width * 6 * width + 6 * width  # MLP and modulation
    ends = 2 * 2 * 4 * width + width + 256 * width + width + width * width + width + 1001 * width
    ends += width * 2 * width + 2 * width + width * 32 + 32
    assert 28 * block + ends + 256 * width == 675_129_632
    shapes = dit.parameter_shapes(Config())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 675_129_632 - 256 * width
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_parameters_have_the_paths_and_shapes_of_the_docstring():
    flat: dict[str, Any] = flatten_dict(dit.parameter_shapes(TINY), sep="/")
    found = {path: leaf.shape for path, leaf in flat.items()}
    linear = {"attn/qkv": (32, 96), "attn/proj": (32, 32), "mlp/fc1": (32, 128), "mlp/fc2": (128, 32)}
    layers = {f"blocks_{index}/{path}": shape for index in range(2) for path, shape in linear.items()}
    layers |= {f"blocks_{index}/adaln": (32, 192) for index in range(2)}
    layers |= {"times/linear_1": (256, 32), "times/linear_2": (32, 32), "patch": (2, 2, 3, 32)}
    layers |= {"final/modulation": (32, 64), "final/linear": (32, 24)}
    kernels = {f"{path}/kernel": shape for path, shape in layers.items()}
    biases = {f"{path}/bias": shape[-1:] for path, shape in layers.items()}
    assert found == kernels | biases | {"labels/embedding": (6, 32)}


@functools.cache
def _initial(specs):
    return jax.jit(lambda: dit.init(TINY, jax.random.key(0, impl="unsafe_rbg"), specs))()


@pytest.mark.parametrize("specs", [DENSE, SPECS], ids=["dense", "factored"])
def test_a_fresh_model_tells_no_noise_at_all(specs):
    outputs = _model(specs=specs)(_initial(specs))
    np.testing.assert_array_equal(outputs, np.zeros((3, 8, 8, 6), np.float32))


def test_fresh_layers_are_zeros_or_have_the_published_deviations():
    zeros = ("adaln", "final/modulation", "final/linear")
    others = {"times/linear_1": 0.02, "times/linear_2": 0.02, "labels": 0.02, "blocks_0/attn/qkv": (2 / 128) ** 0.5}
    others |= {"blocks_1/attn/proj": (2 / 64) ** 0.5, "patch": (2 / 44) ** 0.5, "blocks_1/mlp/fc1": (2 / 160) ** 0.5}
    found: dict[str, Any] = flatten_dict(_initial(DENSE), sep="/")
    for path, numbers in found.items():
        layer, _, leaf = path.rpartition("/")
        if leaf == "bias" or layer.endswith(zeros):
            np.testing.assert_array_equal(numbers, 0)
        elif layer in others:
            # The standard deviation of a sample strays by 1 / sqrt(2 n) of itself.
            assert abs(numbers.std() / others.pop(layer) - 1) < 5 / (2 * numbers.size) ** 0.5, path
    assert not others


def test_factored_layers_compute_what_their_products_do():
    params = _numbers(specs=SPECS)
    wide = compress.expand(params)
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(lambda leaf: leaf.shape, dit.parameter_shapes(TINY))
    _agree(_model(specs=SPECS)(params), _model()(wide))


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan": True}, {"remat": True, "scan": True}], ids=str)
def test_memory_and_compile_time_are_saved_without_another_result(changes):
    specs = FrozenDict({f"blocks_{index}/mlp/fc1": Spec("monarch", 32, 128, (2, 4), 3) for index in range(2)})
    found, wanted = (_slopes(config, specs) for config in (dataclasses.replace(TINY, **changes), TINY))
    jax.tree.map(_agree, found, wanted)


@functools.cache
def _slopes(config, specs):
    """Return the outputs, and the gradients of a loss of them."""
    model: Any = DiT(config, specs)

    def loss(params):
        outputs = model.apply({"params": params}, _latents(), TIMES, LABELS, train=True)
        return (outputs**2).mean(), outputs

    slopes, outputs = jax.jit(jax.grad(loss, has_aux=True))(_numbers(TINY, specs))
    return outputs, slopes


def test_bfloat16_stays_near_float32():
    params = jax.tree.map(lambda leaf: leaf / 2, _numbers())
    found, wanted = (_model(config)(params) for config in (dataclasses.replace(TINY, dtype="bfloat16"), TINY))
    assert found.dtype == jnp.float32
    # Each of some ten roundings on the way adds 2^-9 of the size of what it rounds.
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 10 * 2.0**-9


@pytest.mark.parametrize("specs", [DENSE, SPECS], ids=["dense", "factored"])
def test_the_model_and_its_gradients_pass_the_strictest_jax(specs):
    model: Any = DiT(TINY, specs)

    def loss(params):
        return model.apply({"params": params}, _latents(), TIMES, LABELS).mean()

    params = dit.parameter_shapes(TINY, specs)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert jax.eval_shape(jax.grad(loss), params) == params


def test_products_are_narrow_and_norms_and_softmax_in_float32():
    """JAX's own attention and Flax's own norm mix dtypes, so that strict promotion cannot watch over this."""
    model = DiT(dataclasses.replace(TINY, dtype="bfloat16"), SPECS)
    program = jax.make_jaxpr(lambda params: model.apply({"params": params}, _latents(), TIMES, LABELS))
    found = {}
    for equation in _equations(program(_numbers(specs=SPECS)).jaxpr):
        found.setdefault(equation.primitive.name, set()).add(str(equation.invars[0].aval.dtype))
    assert found["dot_general"] == found["conv_general_dilated"] == found["tanh"] == {"bfloat16"}
    assert found["rsqrt"] == found["exp"] == found["cos"] == {"float32"}


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_images_of_a_batch_do_not_see_each_other_and_all_inputs_matter():
    params, run = {"params": _numbers()}, jax.jit(DiT(TINY).apply)
    latents = _latents()
    wanted = run(params, latents, TIMES, LABELS)
    _agree(run(params, latents[::-1], TIMES[::-1], LABELS[::-1])[::-1], wanted)
    for changed in ((latents + 1, TIMES, LABELS), (latents, TIMES + 1, LABELS), (latents, TIMES, LABELS[::-1])):
        assert np.abs(run(params, *changed)[0] - wanted[0]).max() > 1e-3


@pytest.mark.parametrize("shift", [0, 1])
def test_times_are_told_by_cosines_and_sines(shift):
    """By those of the paper's code with 0, of diffusers with 1."""
    times = np.array([0, 1, 12.5, 999])
    angles = times[:, None] * 10000 ** -(np.arange(128) / (128 - shift))[None]
    wanted = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # Angles up to 999, and the frequencies they are made with, are rounded to 24 bits.
    np.testing.assert_allclose(dit.waves(jnp.asarray(times, jnp.float32), shift), wanted, atol=2 * 999 * 2.0**-24)


def test_positions_are_those_of_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    wanted = embeddings.get_2d_sincos_pos_embed(1152, 16, base_size=16).numpy()
    np.testing.assert_allclose(dit.positions(Config()), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'; this model has 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine is True"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm is None, not a whole number"),
        ({"patch_size": 3}, "patch of 3 does not divide its size of 8"),
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5', not a number"),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ({"_class_name": "Transformer2DModel"}, "norm_type is 'layer_norm'; this model has 'ada_norm_zero'"),
    ],
    ids=str,
)
def test_another_architecture(tmp_path, fields, said):
    given = {"_class_name": "DiTTransformer2DModel", **SIZES, **fields}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(InputError) as caught:
        _described(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_the_older_class_of_diffusers_is_the_same_model(tmp_path):
    """diffusers itself reads a config.json of that class, with these norms, as DiTTransformer2DModel."""
    config = FAMILY.read(SIZES)
    older = {**FAMILY.written(config), "_class_name": "Transformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert _described(tmp_path)[1:] == (OLDER, config)


def test_blocks_that_embed_times_or_labels_in_another_way(tmp_path):
    model = copy.deepcopy(_torch_model("patches of 2"))
    model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias.data[3] += 1
    with pytest.raises(InputError) as caught:
        hf.load(*_described(_saved(model, tmp_path / "dit")))
    name = "norm1.emb.timestep_embedder.linear_2.bias"
    assert f'"transformer_blocks.1.{name}" is not the same as "transformer_blocks.0.{name}".' in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 7}, "patch of 2 does not divide its size of 7"),
        ({"heads": 5}, "5 heads do not divide its width of 32"),
        ({"width": 30, "heads": 3}, "positions need a multiple of 4"),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"classes": 0}, "classes is 0; it must be at least 1"),
        ({"inner": -1}, "inner is -1; it must be at least 1"),
        ({"frequency_shift": 2}, "frequency_shift is 2; it must be 0 or 1"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(changes, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("shape", [(2, 8, 16, 3), (2, 3, 8, 8), (2, 8, 8, 4), (8, 8, 3)], ids=str)
def test_latents_of_another_size(shape):
    with pytest.raises(InputError, match=r"but the model sees 8 x 8 x 3 \(height, width, channels\)\."):
        jax.eval_shape(DiT(TINY).apply, {"params": _numbers()}, np.zeros(shape), np.zeros(2), np.zeros(2, int))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        (FAMILY, {"frequency_shift": 0}, "frequency_shift is 0; in diffusers it is always 1"),
        (FAMILY, {"frequency_shift": 1, "inner": 64}, "inner is 64; in diffusers it is always 128"),
        (ORIGINAL, {"fused": False}, "keeps q, k and v in one tensor"),
    ],
    ids=["frequencies", "inner", "q, k, v"],
)
def test_models_that_a_layout_cannot_hold(tmp_path, family, changes, said):
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(InputError, match=said):
        hf.save(tmp_path / "dit", family, config, _numbers(config))
    assert not (tmp_path / "dit").exists()
