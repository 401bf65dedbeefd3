"""The bridge's contract: memory, values, layout, lifetime, writes, donation, and what is refused."""

import gc
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import factors
from blrlab.bridge import to_torch
from blrlab.errors import InputError
from blrlab.factors import Spec

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

DTYPES = ("float32", "bfloat16", "float16", "int32")


def numbers(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    """Draw numbers whose buffer is JAX's own."""
    drawn = np.random.default_rng(seed).normal(size=shape) * 100
    return jnp.asarray(drawn.astype(jnp.dtype(dtype))) + 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_a_tensor_is_the_array_in_the_same_memory(dtype: str, shape: tuple[int, ...]) -> None:
    array = numbers(*shape, dtype=dtype)
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype), shape)
    assert tensor.device.type == "cpu"
    assert tensor.double().tolist() == np.asarray(array, np.float64).tolist()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_an_empty_array_is_an_empty_tensor(shape: tuple[int, ...]) -> None:
    tensor = to_torch(jnp.zeros(shape, jnp.bfloat16))
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, shape)


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array.T,
        jax.jit(lambda array: array.T),
        lambda array: jnp.moveaxis(array.reshape(2, 3, 5), 0, 2),
        lambda array: array[::2, 1:4],
        lambda array: array[::-1],
        lambda array: jnp.broadcast_to(array[:1], (4, 5)),
    ],
    ids=["transposed", "transposed under jit", "moved axis", "strided", "reversed", "broadcast"],
)
def test_a_view_keeps_its_values(view) -> None:
    array = view(numbers(6, 5))
    tensor = to_torch(array)
    assert tuple(tensor.shape) == array.shape
    assert tensor.tolist() == array.tolist()
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()


def test_strides_may_be_others_but_agree_with_the_memory() -> None:
    array = jax.jit(lambda array: array.T)(numbers(6, 5))
    tensor = to_torch(array)
    copy = tensor.clone(memory_format=torch.contiguous_format)
    assert torch.equal(tensor, copy)
    assert torch.equal(tensor @ torch.eye(6), copy)


def test_a_tensor_outlives_its_array() -> None:
    array = numbers(256, 1024)
    wanted, tensor = np.array(array), to_torch(array)
    del array
    gc.collect()
    others = [numbers(256, 1024, seed=seed) for seed in range(1, 20)]  # take the memory, were it free
    assert tensor.data_ptr() not in {other.unsafe_buffer_pointer() for other in others}
    assert np.array_equal(tensor.numpy(), wanted)


def test_an_array_outlives_its_tensor() -> None:
    array = numbers(64, 64)
    wanted, tensor = np.array(array), to_torch(array)
    del tensor
    gc.collect()
    assert np.array_equal(array, wanted)
    assert np.array_equal(to_torch(array).numpy(), wanted), "and can be bridged again"


def test_a_write_in_place_changes_the_array_and_a_clone_does_not() -> None:
    """The hazard that the contract names."""
    array = numbers(3, 4)
    before, tensor = np.array(array), to_torch(array)
    tensor.clone().add_(1)
    assert np.array_equal(array, before)
    tensor[1, 2] = 7.0
    assert float(np.asarray(array)[1, 2]) == 7.0


def test_an_array_is_finished_before_it_is_handed_over() -> None:
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ x), x))
    x = numbers(128, 128) / 100
    assert np.array_equal(to_torch(slow(x)).numpy(), np.asarray(slow(x)))


def test_a_donated_array_is_copied_while_a_tensor_lives() -> None:
    step = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = numbers(1000)
    before, tensor = np.array(array), to_torch(array)
    after = step(array)
    assert after.unsafe_buffer_pointer() != tensor.data_ptr()
    assert np.array_equal(tensor.numpy(), before)
    assert np.array_equal(after, before + 1)
    del tensor
    gc.collect()
    address = after.unsafe_buffer_pointer()
    assert step(after).unsafe_buffer_pointer() == address, "without a tensor the memory is used again"


def test_a_donated_array_is_gone_and_said_to_be() -> None:
    array = numbers(1000)
    jax.jit(lambda array: array + 1, donate_argnums=0)(array)
    with pytest.raises((InputError, RuntimeError), match="deleted"):
        to_torch({"V": array})


def test_a_tree_keeps_its_structure() -> None:
    kernel = factors.init(jax.random.key(0), Spec("blast", 6, 4, (2, 2), 3))
    tree = {
        "h_0": {"c_fc": {"kernel": kernel, "bias": numbers(4)}},
        "list": [numbers(2), (numbers(3),)],
        "none": None,
    }
    bridged = to_torch(tree)
    assert jax.tree.structure(bridged) == jax.tree.structure(tree)
    for array, tensor in zip(jax.tree.leaves(tree), jax.tree.leaves(bridged), strict=True):
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
        assert np.array_equal(tensor.numpy(), array)


def test_a_bridged_kernel_computes_in_torch_what_it_computes_in_jax() -> None:
    import blrlab_ops

    x = numbers(7, 6)
    for spec in (
        Spec("low_rank", 6, 8, rank=3),
        Spec("monarch", 6, 8, (3, 2), 2),
        Spec("blast", 6, 8, (2, 4), 3),
    ):
        kernel = factors.init(jax.random.key(1), spec)
        found = blrlab_ops.linear(to_torch(x), to_torch(kernel), impl="torch_bmm").numpy()
        np.testing.assert_allclose(found, factors.apply(kernel, x), rtol=1e-5, atol=1e-3)


KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (np.ones(3), "the array is a ndarray, not a JAX array with values."),
        (1.5, "the array is a float, not a JAX array with values."),
        ({"h_0": {"kernel": {"V": np.ones(3)}}}, "h_0/kernel/V is a ndarray, not a JAX array with values."),
        ({"a": [jnp.ones(2), "text"]}, "a/1 is a str, not a JAX array with values."),
        (
            jax.ShapeDtypeStruct((2,), "float32"),
            "the array is a ShapeDtypeStruct, not a JAX array with values.",
        ),
        (jax.random.key(0), "the array holds random keys, which torch does not have."),
        ({"state": {"rng": KEYS}}, "state/rng holds random keys, which torch does not have."),
    ],
    ids=["numpy", "float", "numpy in a tree", "text in a list", "shape", "key", "keys in a tree"],
)
def test_what_is_no_array_of_numbers_is_refused_by_its_path(tree: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        to_torch(tree)
    assert str(caught.value) == sentence


def test_raw_key_data_are_numbers() -> None:
    data = jax.random.key_data(jax.random.key(5))
    assert to_torch(data).tolist() == data.tolist()


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_a_tracer_is_refused(transform) -> None:
    def inside(array: jax.Array) -> jax.Array:
        to_torch({"V": array})
        return array.sum()

    with pytest.raises(InputError, match=r"^V is a \w*Tracer, not a JAX array with values\.(\n|$)"):
        transform(inside)(jnp.ones(3))


def test_a_dtype_that_torch_lacks_is_refused_by_its_path() -> None:
    with pytest.raises(InputError, match=r"V.*int4"):
        to_torch({"V": jnp.ones((2, 2), jnp.int4)})


def test_without_torch_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="the bridge needs PyTorch: pip install torch"):
        to_torch(jnp.ones(2))


SHARDED = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from blrlab.bridge import to_torch
from blrlab.errors import InputError

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
array = jnp.arange(16.0).reshape(8, 2)
found = {"devices": len(jax.devices())}
for name, spec in (("cut", PartitionSpec("data")), ("replicated", PartitionSpec())):
    try:
        to_torch({"c_fc": {"V": jax.device_put(array, NamedSharding(mesh, spec))}})
    except InputError as error:
        found[name] = str(error)
gathered = jax.device_put(jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))), jax.devices()[0])
found["gathered"] = to_torch(gathered).tolist() == array.tolist()
last = jax.device_put(array, jax.devices()[-1])
found["last device"] = to_torch(last).data_ptr() == last.unsafe_buffer_pointer()
print(json.dumps(found))
"""


def test_sharded_arrays_are_refused_and_gathered_ones_are_not() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    refusal = "c_fc/V is sharded over 8 devices: gather it on one with jax.device_put."
    assert json.loads(done.stdout) == {
        "devices": 8,
        "cut": refusal,
        "replicated": refusal,
        "gathered": True,
        "last device": True,
    }
