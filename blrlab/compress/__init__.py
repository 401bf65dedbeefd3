"""Dense parameters in, factored parameters out, with the error of every layer.

>>> import jax, jax.numpy as jnp
>>> from blrlab import compress
>>> params = {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (8, 12)), "bias": jnp.zeros(12)}}
>>> specs = compress.plan(compress.linears(params), [("mlp", {})], {"format": "low_rank", "rank": 8, "blocks": 0})
>>> small, losses = compress.compress(params, specs)
>>> sorted(small["mlp"]["kernel"]), losses[0].path, round(losses[0].relative_error, 3)
(['U', 'V'], 'mlp', 0.0)
"""

from blrlab.compress.calibration import collect, compress_in_sequence
from blrlab.compress.fit import ALGORITHMS, Fit, algorithm_of, fit
from blrlab.compress.plan import Choice, linears, plan, published, resolve
from blrlab.compress.statistics import Statistics
from blrlab.compress.tree import (
    Loss,
    compress,
    compression_factors,
    expand,
    parameter_count,
    shapes_of,
)

__all__ = [
    "ALGORITHMS", "Choice", "Fit", "Loss", "Statistics", "algorithm_of", "collect", "compress", "compress_in_sequence",
    "compression_factors", "expand", "fit", "linears", "parameter_count", "plan", "published", "resolve", "shapes_of",
]  # fmt: skip
