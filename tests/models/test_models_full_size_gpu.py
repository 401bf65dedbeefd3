"""Models of full size with published ranks, on a GPU: Flax and torch, on every implementation, give the same numbers.

Run with `JAX_PLATFORMS=cuda pytest -m gpu tests/models`. JAX should not take all of the memory: set
XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from blrlab import compress
from blrlab.experiments import defaults
from blrlab.factors import Spec
from blrlab.models import dit, gpt2, hf, llama, vit
from blrlab.models.generation import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX has no GPU here"),
]

FAMILIES = {"gpt2": "gpt2", "llama1b": "llama", "vit": "vit", "dit": "DiTTransformer2DModel"}
SIZES: dict[str, Any] = {
    "gpt2": gpt2.Config(dropout=0.0),
    "llama1b": llama.LLAMA_1B,
    "vit": vit.Config(),
    "dit": dit.Config(frequency_shift=1),
}
FORMATS = ("low_rank", "monarch", "blast")
NEW = 16  # tokens that are generated
ERROR = 1e-4  # relative Frobenius error that float32 may sum up to in 28 blocks; a wrong layer is off by 1e-2 and more


@pytest.fixture(scope="module", autouse=True)
def plain_float32():
    """Keep TF32 out of both libraries."""
    torch = pytest.importorskip("torch")
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    with jax.default_matmul_precision("highest"):
        yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def planned(net: str, form: str) -> dict[str, Spec]:
    config = getattr(defaults, net)("full")
    layers = compress.linears(hf.FAMILIES[FAMILIES[net]].shapes(SIZES[net]))
    factors = {**config.factors.to_dict(), "format": form}
    names = {path: compress.called(path, factors["net"]) for path in layers}
    return compress.plan(layers, config.rules, factors, factors["net"], names)


def drawn(net: str, specs: dict[str, Spec]) -> dict[str, Any]:
    """Draw weights; what begins as zeros, such as a DiT's modulations, must count too."""
    params = hf.FAMILIES[FAMILIES[net]].init(SIZES[net], jax.random.key(0), specs)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draws = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, draws)


def inputs_of(net: str) -> tuple[np.ndarray, ...]:
    random, sizes = np.random.default_rng(0), SIZES[net]
    if net in ("gpt2", "llama1b"):
        return (random.integers(0, sizes.vocab_size, (2, 128)),)
    images = random.normal(size=(2, *sizes.shape)).astype(np.float32)
    return (images,) if net == "vit" else (images, np.array([7, 900]), np.array([3, 999]))


def of_torch(net: str, model: Any, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    import torch

    first = inputs[0].transpose(0, 3, 1, 2).copy() if inputs[0].ndim == 4 else inputs[0]  # channels first
    device = next(model.parameters()).device
    with torch.no_grad():
        output = model(*(torch.from_numpy(each).to(device) for each in (first, *inputs[1:])))
    found = output.sample.permute(0, 2, 3, 1) if net == "dit" else output.logits
    return found.double().cpu().numpy()


def generated(model: Any, prompt: np.ndarray) -> list[list[int]]:
    """Return what torch continues prompts [B, T] with, greedily."""
    import torch

    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompt).to(next(model.parameters()).device)
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return found[:, prompt.shape[1] :].tolist()


def usable(form: str, device: str) -> list[str | None]:
    """Name the implementations that float32 has here; None is the one that is chosen."""
    from blrlab_ops import dispatch

    return [*(impl for impl in dispatch.impls(form) if not dispatch.why_not(form, impl, device, "float32")), None]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("net", SIZES)
def test_flax_and_torch_compute_the_same(net, form, tmp_path):
    pytest.importorskip("diffusers" if net == "dit" else "transformers")
    from blrlab_ops.loading import factored_layers
    from blrlab_ops.nn import load_factored

    family, specs, inputs = hf.FAMILIES[FAMILIES[net]], planned(net, form), inputs_of(net)
    params, device = drawn(net, specs), jax.default_backend().replace("gpu", "cuda")
    flax = family.model(SIZES[net], FrozenDict(specs))
    wanted = np.asarray(jax.jit(flax.apply)({"params": params}, *map(jnp.asarray, inputs))).astype(np.float64)
    hf.save(tmp_path / net, family, SIZES[net], params)
    model = load_factored(tmp_path / net, device)
    layers = factored_layers(model)
    assert len(layers) == len(specs)
    for impl in usable(form, device):
        for layer in layers.values():
            layer.impl = impl
        error = np.linalg.norm(of_torch(net, model, inputs) - wanted) / np.linalg.norm(wanted)
        assert error < ERROR, impl
    if net in ("gpt2", "llama1b"):  # by the implementation that is chosen, which came last
        told = generate(flax, params, jnp.asarray(inputs[0][:, :32]), NEW)
        assert told.tolist() == generated(model, inputs[0][:, :32])
