"""Checkpoints by orbax: training state and data position in one atomic step, and finished parameters."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from blrlab.errors import InputError
from blrlab.train.step import State


@contextlib.contextmanager
def _explained(folder: Path, doing: str) -> Iterator[None]:
    """Turn what orbax and tensorstore raise over bad files into one sentence; a full disk stays an OSError."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs the traceback of what it raises
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = str(error)
        if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
            raise OSError(28, f"no space left on the disk of {folder}") from None
        if doing == "write" or isinstance(error, PermissionError):
            raise
        first = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
        raise InputError(f"the checkpoint in {folder} is damaged ({first}): delete that folder.") from None


class Checkpoints:
    """The checkpoints of one training run: model, optimiser, random state and data position together.

    A step appears whole or not at all, so a kill while saving leaves the step before it. The last two are kept.
    """

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """Return the newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, state: State, position: Mapping[str, Any]) -> None:
        """Write one step."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(dict(position)))
        with _explained(self._folder, "write"):
            self._manager.save(int(state.step), args=args)

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """Read the newest step: (state, data position), with the shapes and placement of `like`.

        Raises:
          InputError: it is damaged.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        with _explained(self._folder, "read"):
            found = self._manager.restore(self._manager.latest_step(), args=args)
            return State(**found["state"]), found["data"]

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()


def save_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Write parameters to a folder, whole or not at all; an older one is replaced."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)  # orbax would wait for a parent that cannot be
    with _explained(folder, "write"), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), dict(params), force=True)


def load_params(folder: Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Read parameters of known shapes (`jax.ShapeDtypeStruct`) onto the first device.

    Raises:
      InputError: they are missing, damaged, or of other shapes.
    """
    if not folder.is_dir():
        raise InputError(f"no parameters in {folder}.")
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), dict(shapes))
    with _explained(folder, "read"), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), wanted)
