"""Checkpoints into parameters: one tensor at a time, dense or factored, checked against what the model wants."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from blrlab import factors
from blrlab.errors import InputError, one_of
from blrlab.factors import Spec
from blrlab.models.hf import folders, stored
from blrlab.models.hf.family import FACTORS, Family, Source
from blrlab.models.hf.stored import DTYPES, Stored

Place = tuple[str, int]  # a parameter's path, and which of its tensors


def config(folder: Path, families: Mapping[str, Family], **changes: Any) -> tuple[Family, Any]:
    """Read which family a checkpoint is of, and its sizes.

    Whether q, k and v are one layer is up to the caller, but for a checkpoint that has factored either.

    Args:
      folder: of the checkpoint.
      families: {model_type: family}.
      **changes: fields of the config that are the caller's, such as dtype; those that a family has not are left out.

    Raises:
      InputError: `config.json` is missing or damaged, or describes another architecture; or q, k and v are factored
        otherwise than `fused` wants.
    """
    given, path = folders.described(folder), folder / folders.CONFIG
    try:
        name = given.get("model_type", given.get("_class_name", "")) or given["model_type"]
        family = families[one_of(str(name), families, "model_type")]
        found = family.read(given)
        known = {field.name for field in dataclasses.fields(found)}
        own = {field: changes[field] for field in changes if field in known}
        found = dataclasses.replace(found, **own)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    fused = _fused(folder) if "fused" in known else None
    if fused is None:
        return family, found
    if own.get("fused", fused) != fused:
        raise InputError(f"{folder}: q, k and v are factored {'as one layer' if fused else 'apart'}, take {fused=}.")
    return family, dataclasses.replace(found, fused=fused)


def _fused(folder: Path) -> bool | None:
    """Say whether queries, keys and values are factored as one layer; None where they are not factored."""
    last = {name.rpartition(".")[2] for name in folders.factored(folder)}
    return True if "qkv" in last else False if last & {"query", "key", "value", "to_q", "to_k", "to_v"} else None


def load(folder: Path, family: Family, config: Any, dtype: Any = jnp.float32) -> tuple[dict[str, Any], dict[str, Spec]]:
    """Read the parameters of a checkpoint, as nested dicts, and the specs of those that are factored.

    Host memory holds one tensor beside the parameters.

    Args:
      folder: of the checkpoint.
      family: of the model.
      config: its sizes.
      dtype: of all parameters; None leaves each as it is stored.

    Raises:
      InputError: a file is missing or damaged, or a tensor is missing, unknown, of another shape, not finite, or not
        what it is a copy of.
    """
    files = [(path, *stored.look(path)) for path in folders.files(folder)]
    tensors = list(_tensors(files))
    specs = _specs(
        {family.known(tensor.name, config): _shape(tensor, order) for tensor, order in tensors}, family, config
    )
    wanted: dict[str, Any] = flatten_dict(family.shapes(config, FrozenDict(specs)), sep="/")
    named = {family.known(tensor.name, config): tensor for tensor, _ in tensors}
    whole = [path for path in specs if f"{factored_name(f'{path}/kernel', family, config)}.bias" in named]
    sources = {path: source_of(path, family, config, whole) for path in wanted}
    places = {name: place for path, source in sources.items() for name, place in _places(path, source)}
    copies = {copy: named.get(source.names[0]) for source in sources.values() for copy in source.copies}
    found: dict[str, jax.Array] = {}
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for tensor, permute in tensors:
        name = family.known(tensor.name, config)
        if name is None:
            continue
        if name in copies:
            _check_copy(folder, tensor, copies[name])
            continue
        if name not in places:
            raise InputError(f'{folder}: the tensor "{tensor.name}" has no place in this model.')
        path, piece = places[name]
        source = sources[path]
        numbers = _numbers(folder, tensor, permute, source.axes)
        pieces.setdefault(path, {})[piece] = numbers
        if len(pieces[path]) == len(source.names):
            together = [pieces[path][at] for at in range(len(source.names))]
            del pieces[path]
            _check_shape(folder, tensor, numbers, together, wanted[path].shape, source)
            joined = together[0] if len(together) == 1 else np.concatenate(together, axis=-1)
            found[path] = jnp.asarray(joined if dtype is None else joined.astype(jnp.dtype(dtype)))
    missing = [path for path in wanted if path not in found]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{folder}: the checkpoint lacks {', '.join(missing[:3])}{more}.")
    return unflatten_dict(found, sep="/"), specs


def _shape(tensor: Stored, permute: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    order = permute or tuple(range(len(tensor.shape)))
    return jax.ShapeDtypeStruct([tensor.shape[axis] for axis in order], jnp.float32)


def _specs(names: Mapping[str | None, jax.ShapeDtypeStruct], family: Family, config: Any) -> dict[str, Spec]:
    """Read off the shapes of their factors which layers of a model are factored."""
    dense: dict[str, Any] = flatten_dict(family.shapes(config), sep="/")
    specs = {}
    for path in dense:
        layer = path.removesuffix("/kernel")
        if layer == path:
            continue
        base = factored_name(path, family, config)
        kernel = {part: names[f"{base}.{part}"] for part in FACTORS if f"{base}.{part}" in names}
        if kernel:
            try:
                specs[layer] = factors.spec_of(kernel)
            except InputError as error:
                raise InputError(f"the factors of {base}: {error}") from None
    return specs


def factored_name(path: str, family: Family, config: Any) -> str:
    """Return what the factors of a kernel are called before `.V`: its layer, of several that are fused `qkv`.

    >>> from blrlab.models import gpt2
    >>> from blrlab.models.hf.gpt2 import FAMILY
    >>> factored_name("h_0/mlp/c_fc/kernel", FAMILY, gpt2.Config())
    'transformer.h.0.mlp.c_fc'
    """
    names = family.source(path, config).names
    layer = names[0].removesuffix(".weight")
    return layer if len(names) == 1 else f"{layer.rpartition('.')[0]}.qkv"


def source_of(path: str, family: Family, config: Any, whole: Collection[str] = ()) -> Source:
    """Return where a parameter lies, a factor too; the bias of a layer of `whole` lies beside its factors."""
    kernel, _, part = path.rpartition("/")
    if part in FACTORS and kernel.endswith("/kernel"):
        return Source((f"{factored_name(kernel, family, config)}.{part}",))
    if part == "bias" and kernel in whole:
        return Source((f"{factored_name(f'{kernel}/kernel', family, config)}.bias",))
    return family.source(path, config)


def _places(path: str, source: Source) -> Iterator[tuple[str, Place]]:
    for piece, name in enumerate(source.names):
        yield name, (path, piece)


def _tensors(files: list[tuple[Path, dict[str, Stored], dict[str, str]]]) -> Iterator[tuple[Stored, tuple[int, ...]]]:
    """Yield every tensor with the order that its dimensions are to be put in, if it is stored in another."""
    for path, found, metadata in files:
        try:
            layers = json.loads(metadata.get(stored.PACKED, "{}")).get("layers", {})
            orders = {
                f"{layer}.{part}": order for layer, entry in layers.items() for part, order in entry["permute"].items()
            }
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: its metadata {stored.PACKED!r} is damaged: {error}") from None
        for name, tensor in found.items():
            yield tensor, tuple(orders.get(name, ()))


def _numbers(folder: Path, tensor: Stored, permute: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    if tensor.dtype not in DTYPES:
        raise InputError(f'{folder}: the tensor "{tensor.name}" is of {tensor.dtype}, not of {", ".join(DTYPES)}.')
    numbers = tensor.read()
    if not bool(np.isfinite(numbers.astype(np.float32, copy=False)).all()):
        raise InputError(f'{folder}: the tensor "{tensor.name}" holds NaN or infinity.')
    if len(permute) == numbers.ndim:
        numbers = numbers.transpose(permute)
    return numbers.transpose(axes) if len(axes) == numbers.ndim else numbers


def _check_copy(folder: Path, copy: Stored, tensor: Stored | None) -> None:
    """Check that a copy is what it is of, to the bit; where that is missing, this is said elsewhere."""
    if tensor is None:
        return
    alike = (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    if not alike or any(one != other for one, other in zip(copy.pieces(), tensor.pieces(), strict=True)):
        raise InputError(f'{folder}: the tensor "{copy.name}" is not the same as "{tensor.name}".')


def _check_shape(
    folder: Path,
    tensor: Stored,
    numbers: np.ndarray,
    together: list[np.ndarray],
    wanted: tuple[int, ...],
    source: Source,
) -> None:
    """Check the shape of a parameter, and say it of the tensor as it is stored."""
    each = (*wanted[:-1], wanted[-1] // len(together)) if wanted else wanted
    if all(piece.shape == each for piece in together):
        return
    as_stored = tuple(each[source.axes.index(axis)] for axis in range(len(each))) if source.axes else each
    raise InputError(f'{folder}: the tensor "{tensor.name}" is {tensor.shape}, not {as_stored}.')
