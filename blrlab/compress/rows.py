"""What a compressed layer is as a record."""

from typing import Any

from blrlab.compress.tree import Loss
from blrlab.factors import Spec

Row = dict[str, Any]


def row(loss: Loss) -> Row:
    """Return the record of a layer's compression; a path's parts have slashes or dots between."""
    return {
        "kind": "compress",
        "path": loss.path,
        "layer": loss.path.replace(".", "/").rsplit("/", 1)[-1],
        **spec_fields(loss.spec),
        "algorithm": loss.algorithm,
        "relative_error": loss.relative_error,
        "output_error": loss.output_error,
        "sweeps": loss.sweeps,
        "params_before": loss.params_before,
        "params_after": loss.params_after,
        "seconds": loss.seconds,
    }


def spec_fields(spec: Spec) -> Row:
    """Return a spec as the fields of a record; `rank` is the papers' r, null where b1 and b2 differ."""
    return {
        "format": spec.format,
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "blocks": list(spec.blocks),
        "rank": spec.total_rank,
        "block_rank": spec.rank if spec.format == "monarch" else None,
    }
