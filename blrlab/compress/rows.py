"""What a compressed layer is as a record."""

from typing import Any

from blrlab import factors
from blrlab.compress.tree import Loss

Row = dict[str, Any]


def row(loss: Loss) -> Row:
    """Return the record of a layer's compression; a path's parts have slashes or dots between."""
    return {
        "kind": "compress",
        "path": loss.path,
        "layer": loss.path.replace(".", "/").rsplit("/", 1)[-1],
        **factors.described(loss.spec),
        "algorithm": loss.algorithm,
        "relative_error": loss.relative_error,
        "output_error": loss.output_error,
        "sweeps": loss.sweeps,
        "params_before": loss.params_before,
        "params_after": loss.params_after,
        "seconds": loss.seconds,
    }
