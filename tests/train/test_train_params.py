"""Finished parameters on disk."""

import errno
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import train
from blrlab.errors import InputError

PARAMS = {
    "wte": {"embedding": np.arange(12, dtype=np.float32).reshape(4, 3) / 7},
    "c_fc": {"kernel": {"V": np.ones((2, 2, 3, 1), np.float32), "U": np.zeros((2, 2, 1, 3), np.float32)}},
    "half": jnp.arange(3, dtype=jnp.bfloat16) / 3,
}


def shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def test_parameters_come_back_to_the_bit_as_jax_arrays(tmp_path: Path) -> None:
    train.save_params(tmp_path / "params", PARAMS)
    found = train.load_params(tmp_path / "params", shapes(PARAMS))
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True):
        assert isinstance(one, jax.Array)
        assert one.devices() == {jax.local_devices()[0]}
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_older_parameters_are_replaced_also_by_others(tmp_path: Path) -> None:
    train.save_params(tmp_path / "params", PARAMS)
    other = {"only": {"kernel": np.full((2, 2), 3.0, np.float32)}}
    train.save_params(tmp_path / "params", other)
    found = train.load_params(tmp_path / "params", shapes(other))
    assert np.array_equal(found["only"]["kernel"], other["only"]["kernel"])
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


def test_missing_parameters_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parameters in") as caught:
        train.load_params(tmp_path / "params", shapes(PARAMS))
    assert str(tmp_path / "params") in str(caught.value)


@pytest.mark.parametrize("text", ["write: No space left on device [os_error_code='28']", "RESOURCE_EXHAUSTED: x"])
def test_a_full_disk_is_said_to_be_full(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise ValueError(text)

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with pytest.raises(OSError, match="no space left on the disk of") as caught:
        train.save_params(tmp_path / "params", PARAMS)
    assert caught.value.errno == errno.ENOSPC


def test_another_failed_write_is_no_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("something else")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", fail)
    with pytest.raises(ValueError, match="something else") as caught:
        train.save_params(tmp_path / "params", PARAMS)
    assert not isinstance(caught.value, InputError)
