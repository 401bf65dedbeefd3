"""One set of factors of a model of images on both sides: compressed in Flax, written, read by Flax and by torch."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import FrozenDict

from blrlab import compress
from blrlab.factors import Spec
from blrlab.models import dit, hf, vit

CONFIGS: dict[str, Any] = {
    "vit": vit.Config(12, 4, 2, 5, 2, 4, 24, 40),
    "DiTTransformer2DModel": dit.Config(8, 2, 3, 6, 5, 2, 4, 32, 128, mlp_epsilon=1e-5, frequency_shift=1),
}
SPECS = {
    "vit": {
        "layer_0/attention/qkv": Spec("monarch", 24, 72, (2, 3), 4),
        "layer_0/fc1": Spec("blast", 24, 40, (3, 4), 6),
        "layer_0/fc2": Spec("low_rank", 40, 24, rank=7),
        "layer_1/attention/qkv": Spec("blast", 24, 72, (4, 3), 7),
        "layer_1/fc1": Spec("low_rank", 24, 40, rank=5),
        "layer_1/fc2": Spec("monarch", 40, 24, (4, 2), 3),
    },
    "DiTTransformer2DModel": {
        "blocks_0/attn/qkv": Spec("monarch", 32, 96, (2, 3), 4),
        "blocks_0/adaln": Spec("monarch", 32, 192, (2, 4), 5),
        "blocks_0/mlp/fc1": Spec("blast", 32, 128, (4, 4), 7),
        "blocks_1/attn/qkv": Spec("blast", 32, 96, (4, 3), 7),
        "blocks_1/mlp/fc1": Spec("low_rank", 32, 128, rank=5),
        "blocks_1/mlp/fc2": Spec("monarch", 128, 32, (4, 2), 3),
    },
}
# The layers of torch's names that come first and last.
NAMES = {
    "vit": ("vit.encoder.layer.0.attention.attention.qkv.V", "vit.encoder.layer.1.output.dense.U"),
    "DiTTransformer2DModel": ("transformer_blocks.0.attn1.qkv.V", "transformer_blocks.1.ff.net.2.U"),
}
TIMES, LABELS = np.array([0, 5, 37]), np.array([4, 0, 5])
KINDS = list(CONFIGS)


def _images(config):
    return np.random.default_rng(0).normal(size=(3, *config.shape)).astype(np.float32)


@functools.cache
def _compressed(kind):
    """A model whose dense weights, large enough for every part to matter, were compressed to `SPECS`."""
    random = np.random.default_rng(1)
    shapes = hf.FAMILIES[kind].shapes(CONFIGS[kind])
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.2).astype(leaf.dtype), shapes)
    return compress.compress(params, SPECS[kind])[0]


def _outputs(kind, config, params, specs):
    model = hf.FAMILIES[kind].model(config, FrozenDict(specs))
    inputs = (_images(config),) if kind == "vit" else (_images(config), TIMES, LABELS)
    return np.asarray(model.apply({"params": params}, *inputs))


def _torch_outputs(kind, model):
    import torch

    images = torch.from_numpy(_images(CONFIGS[kind]).transpose(0, 3, 1, 2).copy())  # channels first
    with torch.no_grad():
        if kind == "vit":
            return model(images).logits.numpy()
        return model(images, torch.from_numpy(TIMES), torch.from_numpy(LABELS)).sample.numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    kind, folder = request.param, tmp_path_factory.mktemp("checkpoints") / request.param
    hf.save(folder, hf.FAMILIES[kind], CONFIGS[kind], _compressed(kind))
    return kind, folder


def _load_factored(kind, *arguments, **settings):
    pytest.importorskip("torch")
    pytest.importorskip("transformers" if kind == "vit" else "diffusers")
    from blrlab_ops.nn import load_factored

    return load_factored(*arguments, **settings)


def test_flax_reads_what_it_wrote(written):
    kind, folder = written
    family, config = hf.describe(folder)
    params, specs = hf.load(folder, family, config)
    assert (family.name, config, specs) == (kind, CONFIGS[kind], SPECS[kind])
    jax.tree.map(np.testing.assert_array_equal, params, _compressed(kind))


@pytest.mark.parametrize("impl", ["ref", "torch_bmm", None])
def test_torch_computes_what_flax_does(written, impl):
    kind, folder = written
    family, config = hf.describe(folder)
    wanted = _outputs(kind, config, *hf.load(folder, family, config))
    found = _torch_outputs(kind, _load_factored(kind, folder, impl=impl))
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_torch_has_the_factored_layers_and_each_parameter_once(written):
    kind, folder = written
    model = _load_factored(kind, folder)
    from blrlab_ops.loading import factored_layers, weight_bytes

    layers = list(factored_layers(model).values())
    assert sorted(layer.format for layer in layers) == sorted(spec.format for spec in SPECS[kind].values())
    assert sum("qkv" in path for path in factored_layers(model)) == 2
    assert weight_bytes(model) == 4 * sum(leaf.size for leaf in jax.tree.leaves(_compressed(kind)))


def test_the_fused_layer_has_its_place_in_the_file(written):
    safetensors = pytest.importorskip("safetensors")
    kind, folder = written
    with safetensors.safe_open(next(folder.glob("*.safetensors")), "numpy") as file:
        names = set(file.keys())
    assert set(NAMES[kind]) <= names
    assert not any(name.endswith(("0.attention.attention.query.weight", "0.attn1.to_q.weight")) for name in names)
