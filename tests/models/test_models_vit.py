"""ViT: the logits of transformers, dense and factored, its sizes, and what it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params
from safetensors.numpy import load_file, save_file

from blrlab import compress
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import hf, vit
from blrlab.models.hf import reading
from blrlab.models.hf.vit import FAMILY
from blrlab.models.vit import Config, ViT

SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 5,
}
TINY = Config(12, 4, 2, 5, 2, 4, 24, 40)
SPLIT = dataclasses.replace(TINY, fused=False)
IMAGES = np.random.default_rng(0).normal(size=(3, 12, 12, 2)).astype(np.float32)
MIXED = FrozenDict(
    {
        "layer_0/attention/qkv": Spec("monarch", 24, 72, (2, 3), 4),
        "layer_0/fc1": Spec("blast", 24, 40, (3, 4), 6),
        "layer_1/attention/output": Spec("low_rank", 24, 24, rank=5),
        "layer_1/fc2": Spec("monarch", 40, 24, (4, 2), 3),
    }
)
MIXED_SPLIT = FrozenDict(
    {
        "layer_0/attention/query": Spec("monarch", 24, 24, (2, 3), 4),
        "layer_0/attention/key": Spec("low_rank", 24, 24, rank=5),
        "layer_1/attention/value": Spec("blast", 24, 24, (3, 4), 6),
        "classifier": Spec("low_rank", 24, 5, rank=2),
    }
)
ALIKE = FrozenDict(
    {
        f"layer_{index}/{layer}": spec
        for index in range(2)
        for layer, spec in (
            ("attention/qkv", Spec("blast", 24, 72, (3, 3), 6)),
            ("fc1", Spec("monarch", 24, 40, (2, 4), 3)),
        )
    }
)
KINDS = {"fused": (TINY, MIXED), "split": (SPLIT, MIXED_SPLIT)}


def _numbers(config=TINY, specs=vit.ALL_DENSE):
    """Draw parameters in numpy, which compiles nothing, large enough for every part to matter."""
    random = np.random.default_rng(1)

    def draw(leaf):
        return random.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)

    return jax.tree.map(draw, vit.parameter_shapes(config, specs))


@functools.cache
def _model(config=TINY, specs=vit.ALL_DENSE):
    run = jax.jit(ViT(config, specs).apply)
    return lambda params, images=IMAGES: np.asarray(run({"params": params}, images))


@pytest.fixture(scope="module")
def torch_model():
    """A ViT of random weights, every bias and norm too, in float32 and evaluation mode."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, attn_implementation="eager")
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def checkpoint(torch_model, tmp_path_factory):
    """Save the model as transformers does when it is not asked for anything else."""
    folder = tmp_path_factory.mktemp("checkpoints") / "vit"
    torch_model.save_pretrained(folder)
    return folder


def _described(folder, **changes):
    family, config = reading.config(folder, {"vit": FAMILY}, **changes)
    assert family is FAMILY
    return config


def _load(folder, **changes):
    config = _described(folder, **changes)
    params, specs = hf.load(folder, FAMILY, config)
    return config, params, specs


def _edited(source, folder, change=None, **fields):
    """Copy a checkpoint of one file, with other tensors or fields of its config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | fields))
    tensors = load_file(source / hf.SINGLE)
    save_file(tensors if change is None else change(tensors), folder / hf.SINGLE)
    return folder


def _torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())).logits.numpy()


def _agree(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def _same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("wanted", [TINY, SPLIT], ids=KINDS)
def test_logits_are_those_of_transformers(checkpoint, torch_model, wanted):
    config, params, specs = _load(checkpoint, fused=wanted.fused)
    assert (config, specs) == (wanted, {})
    logits = _torch_logits(torch_model)
    assert logits.std() > 0.1
    _agree(_model(config)(params), logits)


@pytest.mark.parametrize("fused", [True, False], ids=KINDS)
def test_files_of_the_names_that_transformers_5_has_in_memory(checkpoint, torch_model, tmp_path, fused):
    tensors = {name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}
    folder = _edited(checkpoint, tmp_path, lambda _: tensors)
    _same(_load(folder, fused=fused)[1], _load(checkpoint, fused=fused)[1])


def test_the_hubs_names_are_those_that_are_written(checkpoint, tmp_path):
    """As in google/vit-base-patch16-224, which transformers 4 wrote."""
    _, params, _ = _load(checkpoint)
    hf.save(tmp_path / "again", FAMILY, TINY, params)
    found = load_file(tmp_path / "again" / hf.SINGLE)
    start = "vit.encoder.layer.1"
    assert {name: found[name].shape for name in found if not name.startswith("vit.encoder.layer.0.")} == {
        "vit.embeddings.cls_token": (1, 1, 24),
        "vit.embeddings.position_embeddings": (1, 10, 24),
        "vit.embeddings.patch_embeddings.projection.weight": (24, 2, 4, 4),
        "vit.embeddings.patch_embeddings.projection.bias": (24,),
        **{f"{start}.attention.attention.{name}.weight": (24, 24) for name in ("query", "key", "value")},
        **{f"{start}.attention.attention.{name}.bias": (24,) for name in ("query", "key", "value")},
        f"{start}.attention.output.dense.weight": (24, 24),
        f"{start}.attention.output.dense.bias": (24,),
        f"{start}.intermediate.dense.weight": (40, 24),
        f"{start}.intermediate.dense.bias": (40,),
        f"{start}.output.dense.weight": (24, 40),
        f"{start}.output.dense.bias": (24,),
        **{f"{start}.layernorm_{name}.{leaf}": (24,) for name in ("before", "after") for leaf in ("weight", "bias")},
        "vit.layernorm.weight": (24,),
        "vit.layernorm.bias": (24,),
        "classifier.weight": (5, 24),
        "classifier.bias": (5,),
    }
    _same(_load(tmp_path / "again")[1], params)


def test_poolers_and_the_names_of_a_bare_model_are_known(checkpoint, tmp_path):
    """As in google/vit-base-patch16-224-in21k: features, and a pooler that classifiers have no use for."""

    def bare(tensors):
        body = {name.removeprefix("vit."): tensor for name, tensor in tensors.items() if "classifier" not in name}
        pooler = {"pooler.dense.weight": np.eye(24, dtype=np.float32), "pooler.dense.bias": np.ones(24, np.float32)}
        return body | pooler

    folder = _edited(checkpoint, tmp_path, bare, architectures=["ViTModel"])
    config, params, _ = _load(folder)
    assert config == dataclasses.replace(TINY, classes=0)
    _same(params, _load(checkpoint, classes=0)[1])


@pytest.mark.parametrize("fused", [True, False], ids=KINDS)
def test_what_is_exported_is_read_by_transformers(checkpoint, torch_model, tmp_path, fused):
    import transformers

    config, params, _ = _load(checkpoint, fused=fused)
    hf.save(tmp_path / "again", FAMILY, config, params)
    again, told = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "again", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values())
    np.testing.assert_array_equal(_torch_logits(again.eval()), _torch_logits(torch_model))


def test_every_size_survives_a_round_trip(tmp_path):
    config = Config(10, 5, 4, 3, 1, 2, 6, 7, dropout=0.25, epsilon=1e-6)
    hf.save(tmp_path / "odd", FAMILY, config, _numbers(config))
    assert _described(tmp_path / "odd") == config


def test_without_classes_the_feature_before_the_classifier_is_returned(checkpoint, torch_model, tmp_path):
    import transformers

    config, params, _ = _load(checkpoint)
    bare, body, _ = _load(checkpoint, classes=0)
    assert set(params) - set(body) == {"classifier"}
    feature, head = _model(bare)(body), params["classifier"]
    assert (feature.shape, feature.dtype) == ((3, 24), jnp.float32)
    _agree(feature @ head["kernel"] + head["bias"][None], _model(config)(params))
    hf.save(tmp_path / "bare", FAMILY, bare, body)
    assert _described(tmp_path / "bare") == bare
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "bare").eval()
    _agree(_torch_logits(again), feature)


def test_vit_b_has_its_published_size():
    shapes = vit.parameter_shapes(Config())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 86_567_656
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("config", "layers"),
    [(TINY, {"attention/qkv": 72}), (SPLIT, {"attention/query": 24, "attention/key": 24, "attention/value": 24})],
    ids=KINDS,
)
def test_parameters_have_the_paths_and_shapes_of_the_docstring(config, layers):
    found = {path: leaf.shape for path, leaf in flatten_dict(vit.parameter_shapes(config), sep="/").items()}
    sizes = {**{path: (24, features) for path, features in layers.items()}, "attention/output": (24, 24)}
    sizes |= {"fc1": (24, 40), "fc2": (40, 24)}
    wanted = {f"layer_{index}/{path}/kernel": size for index in range(2) for path, size in sizes.items()}
    wanted |= {"classifier/kernel": (24, 5), "patch/kernel": (4, 4, 2, 24)}
    wanted |= {path.replace("kernel", "bias"): size[-1:] for path, size in wanted.items()}
    norms = [f"layer_{index}/layernorm_{name}" for index in range(2) for name in ("before", "after")]
    wanted |= {f"{norm}/{leaf}": (24,) for norm in [*norms, "layernorm"] for leaf in ("scale", "bias")}
    assert found == wanted | {"cls": (1, 1, 24), "positions": (1, 10, 24)}


def test_fused_and_split_layers_compute_the_same():
    params = _numbers(SPLIT)
    fused = {**params}
    for index in range(2):
        parts = [params[f"layer_{index}"]["attention"][name] for name in ("query", "key", "value")]
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *parts)
        attention = {"qkv": together, "output": params[f"layer_{index}"]["attention"]["output"]}
        fused[f"layer_{index}"] = {**params[f"layer_{index}"], "attention": attention}
    _agree(_model(TINY)(fused), _model(SPLIT)(params))


@pytest.mark.parametrize(("config", "specs"), KINDS.values(), ids=KINDS)
def test_factored_layers_compute_what_their_products_do(config, specs):
    params = _numbers(config, specs)
    _agree(_model(config, specs)(params), _model(config)(compress.expand(params)))


@pytest.mark.parametrize(("config", "specs"), KINDS.values(), ids=KINDS)
def test_a_factored_model_is_written_and_read(tmp_path, config, specs):
    params = _numbers(config, specs)
    hf.save(tmp_path / "factored", FAMILY, config, params)
    again, found, read = _load(tmp_path / "factored", fused=config.fused)
    assert (again, read) == (config, dict(specs))
    _same(found, params)
    np.testing.assert_array_equal(_model(config, FrozenDict(read))(found), _model(config, specs)(params))
    layers = json.loads((tmp_path / "factored" / "blrlab.json").read_text())["layers"]
    start = "vit.encoder.layer.0.attention.attention"
    assert ({f"{start}.qkv"} if config.fused else {f"{start}.query", f"{start}.key"}) <= set(layers)
    assert hf.describe(tmp_path / "factored")[1].fused is config.fused
    with pytest.raises(InputError, match=f"take fused={config.fused}"):
        hf.describe(tmp_path / "factored", fused=not config.fused)


@functools.cache
def _slopes(config):
    """Return the logits of a factored model, and the gradient of their sum of squares."""

    def loss(params):
        logits = ViT(config, ALIKE).apply({"params": params}, IMAGES, train=True)
        return (logits**2).sum(), logits

    (_, logits), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(_numbers(config, ALIKE))
    return logits, slopes


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan": True}, {"remat": True, "scan": True}], ids=str)
def test_blocks_recomputed_or_scanned_give_the_same_numbers_and_gradients(changes):
    logits, slopes = _slopes(TINY)
    found, again = _slopes(dataclasses.replace(TINY, **changes))
    _agree(found, logits)
    assert jax.tree.structure(again) == jax.tree.structure(slopes)
    jax.tree.map(_agree, again, slopes)


def test_a_scan_of_blocks_that_differ_is_refused():
    with pytest.raises(InputError, match="layer_1 has other formats or ranks than layer_0"):
        _model(dataclasses.replace(TINY, scan=True), MIXED)(_numbers(TINY, MIXED))


@pytest.mark.parametrize("changes", [{}, {"remat": True, "scan": True}], ids=str)
def test_dropout_acts_in_training_only(changes):
    config, params = dataclasses.replace(TINY, dropout=0.5, **changes), {"params": _numbers()}
    run = jax.jit(lambda key: ViT(config).apply(params, IMAGES, train=True, rngs={"dropout": key}))
    one, again, other = (np.asarray(run(jax.random.key(seed, impl="unsafe_rbg"))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-2)
    _agree(_model(config)(params["params"]), _model()(params["params"]))


def test_images_of_a_batch_do_not_see_each_other():
    params = _numbers()
    _agree(_model()(params, IMAGES[::-1].copy()), _model()(params)[::-1])


@pytest.mark.parametrize("place", [(0, 0, 0), (11, 11, 1), (5, 2, 0)], ids=str)
def test_every_pixel_matters(place):
    params, changed = _numbers(), IMAGES.copy()
    changed[(slice(None), *place)] += 1
    assert np.abs(_model()(params, changed) - _model()(params)).max() > 1e-3


def test_patches_have_places():
    params = _numbers()
    moved = np.roll(IMAGES, 4, axis=2)
    assert np.abs(_model()(params, moved) - _model()(params)).max() > 1e-3


def test_initial_weights():
    draw = jax.jit(lambda key: vit.init(TINY, key, MIXED))
    params = flatten_dict(draw(jax.random.key(0, impl="unsafe_rbg")), sep="/")
    assert {path: leaf.shape for path, leaf in params.items()} == {
        path: leaf.shape for path, leaf in flatten_dict(vit.parameter_shapes(TINY, MIXED), sep="/").items()
    }
    for path, numbers in params.items():
        if path.endswith(("/bias", "/scale")):
            np.testing.assert_array_equal(numbers, float(path.endswith("/scale")))
        elif path.endswith("kernel") or "/" not in path:
            # The standard deviation of a sample strays by 1 / sqrt(2 n) of itself.
            assert abs(numbers.std() - 0.02) < 5 * 0.02 / (2 * numbers.size) ** 0.5, path


def test_bfloat16_is_near_float32():
    # Small weights, as real ones are, so that attention does not saturate.
    params = jax.tree.map(lambda leaf: leaf / 3, _numbers(specs=MIXED))
    narrow = _model(dataclasses.replace(TINY, dtype="bfloat16"), MIXED)(params)
    wide = _model(TINY, MIXED)(params)
    assert narrow.dtype == jnp.float32
    # Each of some ten roundings on the way adds 2^-9 of the size of what it rounds.
    assert 0 < np.linalg.norm(narrow - wide) / np.linalg.norm(wide) < 10 * 2.0**-9


def test_the_model_and_its_gradients_pass_the_strictest_jax():
    config = dataclasses.replace(TINY, dropout=0.5)

    def loss(params, key):
        return ViT(config, MIXED).apply({"params": params}, IMAGES, train=True, rngs={"dropout": key}).mean()

    shapes = vit.parameter_shapes(config, MIXED)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert jax.eval_shape(jax.grad(loss), shapes, jax.random.key(0)) == shapes


def test_products_are_narrow_and_norms_and_softmax_in_float32():
    """JAX's own attention and Flax's own norm mix dtypes, so that strict promotion cannot watch over this."""
    model = ViT(dataclasses.replace(TINY, dtype="bfloat16"), MIXED)
    program = jax.make_jaxpr(lambda params: model.apply({"params": params}, IMAGES))(_numbers(specs=MIXED))
    found = {}
    for equation in _equations(program.jaxpr):
        found.setdefault(equation.primitive.name, set()).add(str(equation.invars[0].aval.dtype))
    assert found["dot_general"] == found["conv_general_dilated"] == {"bfloat16"}
    assert found["rsqrt"] == found["exp"] == {"float32"}


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize("shape", [(12, 16, 2), (16, 16, 2), (12, 12, 3), (2, 12, 12), (12, 12)], ids=str)
def test_images_of_another_size(shape):
    with pytest.raises(InputError) as caught:
        _model()(_numbers(), np.zeros((3, *shape), np.float32))
    assert f"images are {' x '.join(map(str, shape))}, but the model sees 12 x 12 x 2" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": 5}, "patch of 5 does not divide its image_size of 12"),
        ({"patch": 0}, "patch is 0; it must be at least 1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"inner": 0}, "inner is 0"),
        ({"classes": -1}, "classes is -1; it must be at least 0"),
        ({"heads": 5}, "5 heads do not divide its width of 24"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(changes, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(TINY, **changes)


def _given(tmp_path, **fields):
    content = {"model_type": "vit", **SIZES, **fields}
    kept = {name: value for name, value in content.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "vit_mae"}, 'unknown model_type "vit_mae"'),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; this model has 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias is False; this model has True"),
        ({"head_dim": 8}, "head_dim is 8; this model has 6"),
        ({"image_size": [12, 16]}, "image_size is [12, 16]; this model has the same height and width"),
        ({"patch_size": [4, 2]}, "patch_size is [4, 2]; this model has the same height and width"),
        ({"patch_size": [4]}, "patch_size is [4]"),
        ({"patch_size": 5}, "patch of 5 does not divide its image_size of 12"),
        ({"num_attention_heads": 5}, "5 heads do not divide its width of 24"),
        ({"hidden_dropout_prob": 1.0}, "dropout is 1.0"),
        ({"hidden_size": "24"}, "hidden_size is '24', not a whole number"),
        ({"image_size": [12.0, 12.0]}, "image_size is 12.0, not a whole number"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny', not a number"),
        ({"num_labels": 5.0}, "num_labels is 5.0, not a whole number"),
        ({"id2label": 5}, "is damaged"),
        ({"id2label": "many"}, "is damaged"),
        ({"hidden_size": ...}, "is damaged: KeyError: 'hidden_size'"),
        ({"image_size": ...}, "is damaged: KeyError: 'image_size'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_architecture(tmp_path, fields, said):
    with pytest.raises(InputError) as caught:
        _described(_given(tmp_path, **fields))
    assert said in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"image_size": [12, 12], "patch_size": [4, 4]}, {}),
        ({"num_labels": ...}, {"classes": 2}),
        ({"num_labels": ..., "id2label": {"0": "cat", "1": "dog", "2": "cow"}}, {"classes": 3}),
        ({"num_labels": ..., "id2label": {}}, {"classes": 0}),
        ({"architectures": ["ViTModel"]}, {"classes": 0}),
        ({"num_channels": ..., "layer_norm_eps": 1e-6}, {"channels": 3, "epsilon": 1e-6}),
        ({"hidden_dropout_prob": 0.1}, {"dropout": 0.1}),
    ],
    ids=str,
)
def test_configs_that_are_understood(tmp_path, fields, changes):
    assert _described(_given(tmp_path, **fields)) == dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors | {"decoder.0.weight": np.ones((8, 24, 1, 1), np.float32)},
            'the tensor "decoder.0.weight" has no place in this model',
        ),
        (
            lambda tensors: {
                name: tensor for name, tensor in tensors.items() if "0.attention.attention.key" not in name
            },
            "lacks layer_0/attention/qkv/",
        ),
        (
            lambda tensors: tensors | {"vit.embeddings.position_embeddings": np.ones((1, 17, 24), np.float32)},
            'the tensor "vit.embeddings.position_embeddings" is (1, 17, 24), not (1, 10, 24)',
        ),
        (
            lambda tensors: (
                tensors | {"vit.embeddings.patch_embeddings.projection.weight": np.ones((24, 3, 4, 4), np.float32)}
            ),
            "is (24, 3, 4, 4), not (24, 2, 4, 4)",
        ),
    ],
    ids=["extra", "missing", "positions", "patch"],
)
def test_tensors_of_another_model(checkpoint, tmp_path, change, said):
    with pytest.raises(InputError) as caught:
        _load(_edited(checkpoint, tmp_path, change))
    assert said in str(caught.value)
