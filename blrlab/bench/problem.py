"""What is benchmarked: one layer of a net, its kernel in a format, and an input."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blrlab_ops import shapes
from jaxtyping import Array, Float

from blrlab import factors
from blrlab.factors import Kernel, Spec


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer in one format: y [n, o] = x [n, i] W.

    Attributes:
      net: own, or a net of the literature.
      layer: the layer's name in it.
      spec: format and sizes.
      kernel: W, dense or as factors, in the dtype it is run in.
      x: [n, i], of unit variance, in the same dtype.
    """

    net: str
    layer: str
    spec: Spec
    kernel: Kernel
    x: Float[Array, "n i"]

    @property
    def tokens(self) -> int:
        """n."""
        return self.x.shape[0]

    @property
    def dtype(self) -> str:
        """The dtype of kernel, input and output."""
        return str(self.x.dtype)

    @functools.cached_property
    def reference(self) -> Float[np.ndarray, "n o"]:
        """y in float64, through the dense weight, from the very numbers of kernel and x."""
        wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), self.kernel)
        return np.asarray(self.x).astype(np.float64) @ _dense_weight(self.spec, wide)

    def dense(self) -> "Problem":
        """Return the same layer with its weight multiplied out."""
        spec = Spec("dense", self.spec.in_features, self.spec.out_features)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.kernel)
        return dataclasses.replace(self, spec=spec, kernel=factors.to_dense(wide).astype(self.x.dtype))


def _dense_weight(spec: Spec, kernel: Any) -> np.ndarray:
    """Multiply NumPy factors out, independently of `factors`: W [i, o]."""
    if spec.format == "dense":
        return kernel
    products = {"low_rank": "pr,rq->pq", "monarch": "lkpr,lkrq->lpkq", "blast": "lpr,lkr,krq->lpkq"}
    parts = [kernel[name] for name in ("V", "S", "U") if name in kernel]
    blocks = np.einsum(products[spec.format], *parts, optimize=True)
    return blocks.reshape(spec.in_features, spec.out_features)


def _problem(net: str, layer: str, kernel: Kernel, tokens: int, dtype: str, key: Array) -> Problem:
    kernel = jax.tree.map(lambda leaf: leaf.astype(dtype), kernel)
    spec = factors.spec_of(kernel)
    return Problem(net, layer, spec, kernel, jax.random.normal(key, (tokens, spec.in_features), dtype))


def own_problems(
    params: Mapping[str, Any], specs: Mapping[str, Spec], tokens: int, dtype: str, key: Array
) -> Iterator[Problem]:
    """Yield a model's own factored layers with its own factors: the first layer of every name and spec."""
    seen: set[tuple[str, Spec]] = set()
    for path, spec in specs.items():
        name = path.rsplit("/", 1)[-1]
        if spec.format == "dense" or (name, spec) in seen:
            continue
        seen.add((name, spec))
        kernel = functools.reduce(lambda node, part: node[part], [*path.split("/"), "kernel"], params)
        yield _problem("own", name, kernel, tokens, dtype, jax.random.fold_in(key, len(seen)))


def published_problems(net: str, format: str, tokens: int, dtype: str, key: Array) -> Iterator[Problem]:
    """Yield a net's layers with the published ranks and blocks, at `tokens` rows (0: the published number).

    The factors are random, with weights of variance 1 / i.
    """
    for index, layer in enumerate(shapes.layers(net)):
        rank, blocks = layer.choice(format)
        spec = factors.from_total_rank(format, layer.in_features, layer.out_features, (blocks, blocks), rank)
        drawn, rows = jax.random.split(jax.random.fold_in(key, index))
        yield _problem(net, layer.name, factors.init(drawn, spec), tokens or layer.tokens, dtype, rows)
