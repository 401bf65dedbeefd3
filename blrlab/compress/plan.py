"""Which layer gets which spec: an ordered list of rules, laid over a model's dense layers.

A rule is a (pattern, fields) pair. The pattern is matched against a layer's whole path with `*` and `?` wildcards
(`*/mlp/c_fc`); the first rule that matches a layer decides it, and a layer that none matches stays dense. Fields
are `format`, `rank`, `blocks` and `block_rank`; those left out come from the defaults. A rank or a block count of 0
means the published one for this format and layer, scaled with the layer's smaller side where its size is another.
"""

import dataclasses
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blrlab_ops import shapes
from flax.traverse_util import flatten_dict

from blrlab import factors
from blrlab.errors import InputError, did_you_mean, one_of
from blrlab.factors import BLOCKED, FORMATS, Spec

FIELDS = ("format", "rank", "blocks", "block_rank")
Rule = tuple[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a rule and the defaults ask of one layer; 0 stands for the published value."""

    format: str
    rank: int = 0
    blocks: int | tuple[int, int] = 0
    block_rank: int = 0


def linears(params: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return {path: (in_features, out_features)} of every dense kernel in a parameter tree.

    The leaves may be arrays or `jax.ShapeDtypeStruct`. Paths are sorted as a reader counts: h_2 before h_10.
    """
    leaves: Any = flatten_dict(dict(params), sep="/").items()
    found = {
        path.removesuffix("/kernel"): tuple(leaf.shape)
        for path, leaf in leaves
        if path.endswith("/kernel") and leaf.ndim == 2
    }
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def natural(path: str) -> list[tuple[str, int]]:
    """Return what sorts paths as a reader counts."""
    return [(word, int(part or 0)) for word, part in re.findall(r"(\D*)(\d*)", path)]


def plan(
    layers: Mapping[str, tuple[int, int]],
    rules: Sequence[Rule],
    defaults: Mapping[str, Any],
    net: str = "",
    names: Mapping[str, str] | None = None,
) -> dict[str, Spec]:
    """Resolve rules into {path: spec} for every layer that one of them matches, in the model's order.

    Args:
      layers: {path: (in_features, out_features)}, as `linears` gives.
      rules: ordered (pattern, fields) pairs.
      defaults: the fields a rule leaves out.
      net: whose published ranks a 0 stands for, such as gpt2s.
      names: {path: what the layer is called there}; a path that is not named goes by its last part.

    Raises:
      InputError: a pattern decides no layer, a field is unknown, or a layer cannot have what is asked; the
        sentence names the layer and the allowed values.
    """
    chosen: dict[str, Choice] = {}
    for rule in rules:
        pattern, choice = _read(rule, defaults)
        matched = [path for path in layers if fnmatch.fnmatchcase(path, pattern)]
        if not matched:
            raise InputError(f'the rule "{pattern}" matches no layer.{did_you_mean(pattern, layers)}')
        fresh = [path for path in matched if path not in chosen]
        if not fresh:
            raise InputError(f'the rule "{pattern}" decides nothing: earlier rules match all of its layers.')
        chosen |= dict.fromkeys(fresh, choice)
    return {
        path: resolve(path, *size, chosen[path], net, (names or {}).get(path))
        for path, size in layers.items()
        if path in chosen
    }


def _read(rule: Any, defaults: Mapping[str, Any]) -> tuple[str, Choice]:
    """Check a rule and fill it up from the defaults."""
    pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
    if not pair or not isinstance(rule[0], str) or not isinstance(rule[1], Mapping):
        raise InputError(f'a rule is a pair such as ("*/mlp/c_fc", {{"rank": 64}}), not {rule!r}.')
    pattern: str = rule[0]
    fields: Any = rule[1]
    for field, value in fields.items():
        if field not in FIELDS:
            raise InputError(
                f'the rule "{pattern}" has the unknown field "{field}"; the fields are {", ".join(FIELDS)}.'
                f"{did_you_mean(field, FIELDS)}"
            )
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        pair = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(part, int) for part in value)
        if field != "format" and not (whole or (field == "blocks" and pair)):
            raise InputError(f'the rule "{pattern}" has {field} {value!r}, which is not a whole number from 0 up.')
    filled = {"format": "", "rank": 0, "blocks": 0, "block_rank": 0, **defaults, **fields}
    merged = {field: filled[field] for field in FIELDS}
    one_of(merged["format"], FORMATS, "format")
    if "rank" in fields and "block_rank" not in fields:
        merged["block_rank"] = 0
    if "block_rank" in fields and "rank" not in fields:
        merged["rank"] = 0
    blocks = merged["blocks"]
    if not isinstance(blocks, int):
        merged["blocks"] = tuple(blocks)
    return pattern, Choice(**merged)


def resolve(path: str, in_features: int, out_features: int, choice: Choice, net: str, name: str | None = None) -> Spec:
    """Turn a choice into the spec of one layer; `name` is what its net calls it, if not the last part of its path.

    Raises:
      InputError: naming the layer and the allowed values.
    """
    try:
        return _resolve(name or path.rsplit("/", 1)[-1], in_features, out_features, choice, net)
    except InputError as error:
        raise InputError(f"{path} ({in_features} x {out_features}): {error}") from None


def _resolve(name: str, in_features: int, out_features: int, choice: Choice, net: str) -> Spec:
    if choice.format == "dense":
        return Spec("dense", in_features, out_features)
    blocks, rank = choice.blocks, choice.rank
    if choice.rank and choice.block_rank:
        raise InputError(f"rank {choice.rank} and block_rank {choice.block_rank} exclude each other.")
    if choice.block_rank and choice.format != "monarch":
        raise InputError(f"{choice.format} has no block_rank; give rank.")
    blocked = choice.format in factors.BLOCKED
    if (blocked and not blocks) or not (rank or choice.block_rank):
        published_rank, published_blocks = published(net, name, choice.format, in_features, out_features)
        blocks = blocks or published_blocks
        rank = rank or (0 if choice.block_rank else published_rank)
    if not blocked:
        blocks = 1
    pair = (blocks, blocks) if isinstance(blocks, int) else blocks
    if len(pair) != 2:
        raise InputError(f"blocks are one number or a pair, not {pair}.")
    if choice.block_rank:
        return Spec("monarch", in_features, out_features, pair, choice.block_rank)
    return factors.from_total_rank(choice.format, in_features, out_features, pair, rank)


def published(net: str, name: str, format: str, in_features: int, out_features: int) -> tuple[int, int]:
    """Return the published (rank r, blocks b) for a layer; r is scaled with the layer's smaller side.

    Raises:
      InputError: nothing is published for such a layer.
    """
    known = {layer.name: layer for layer in shapes.LAYERS if layer.net == net}
    if name not in known:
        raise InputError(f'nothing is published for "{name}" of net "{net}": set rank and blocks.')
    layer = known[name]
    if in_features * layer.out_features != out_features * layer.in_features:
        raise InputError(
            f'what is published for "{name}" of net "{net}" is for a layer of {layer.in_features} x '
            f"{layer.out_features}, of other proportions: set rank and blocks."
        )
    rank, blocks = layer.choice(format)
    scaled = rank * min(in_features, out_features) / min(layer.in_features, layer.out_features)
    unit = blocks if format == "monarch" else 1  # every Monarch block gets the same share
    return max(round(scaled / unit), 1) * unit, blocks


def to_rules(specs: Mapping[str, Spec]) -> list[list[Any]]:
    """Return specs as plain rules, [[path, fields], ...], which `plan` and `config.rules` take.

    >>> to_rules({"h_0/mlp/c_fc": Spec("monarch", 8, 8, (2, 2), 3)})
    [['h_0/mlp/c_fc', {'format': 'monarch', 'blocks': [2, 2], 'block_rank': 3}]]
    """
    rules = []
    for path, spec in specs.items():
        fields: dict[str, Any] = {"format": spec.format}
        if spec.format in BLOCKED:
            fields["blocks"] = list(spec.blocks)
        if spec.format != "dense":
            fields["block_rank" if spec.format == "monarch" else "rank"] = spec.rank
        rules.append([path.replace("[", "[[]"), fields])  # a bracket is a wildcard in a pattern
    return rules


def save(specs: Mapping[str, Spec], file: Path) -> None:
    """Write specs as a JSON list of rules, one a line, to be read and edited."""
    lines = ",\n".join(f" {json.dumps(rule)}" for rule in to_rules(specs))
    file.write_text(f"[\n{lines}\n]\n")


def load(file: Path) -> list[Rule]:
    """Read rules that `save` wrote.

    Raises:
      InputError: there is no such file, or it is no JSON list of [path, fields].
    """
    if not file.is_file():
        raise InputError(f"no rules at {file}: it is not a file.")
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}.") from None
    pairs = isinstance(rules, list) and all(isinstance(rule, list) and len(rule) == 2 for rule in rules)
    if not pairs or not rules:
        raise InputError(f'{file} is no list of rules such as ["h_0/mlp/c_fc", {{"format": "low_rank", "rank": 64}}].')
    return [(path, fields) for path, fields in rules]
