"""Dense parameters in, factored parameters out, with the error of every layer.

>>> import jax, jax.numpy as jnp
>>> from blrlab import compress
>>> params = {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (8, 12)), "bias": jnp.zeros(12)}}
>>> specs = compress.plan(compress.linears(params), [("mlp", {})], {"format": "low_rank", "rank": 8, "blocks": 0})
>>> small, losses = compress.compress(params, specs)
>>> sorted(small["mlp"]["kernel"]), losses[0].path, round(losses[0].relative_error, 3)
(['U', 'V'], 'mlp', 0.0)

Within a budget, ranks, blocks and formats are given out:

>>> allowed = compress.Allowed(formats=("low_rank", "dense"), multiple=1)
>>> small, losses = compress.compress(params, target=compress.Target("layer_factor", 1.5), allowed=allowed)
>>> losses[0].spec.format, losses[0].spec.rank
('low_rank', 3)
"""

from blrlab.compress.budget import Allowed, Target, allocate, latencies, sensitivities
from blrlab.compress.calibration import collect, compress_in_sequence
from blrlab.compress.fit import ALGORITHMS, Fit, algorithm_of, fit
from blrlab.compress.model import compress
from blrlab.compress.naming import called
from blrlab.compress.plan import Choice, linears, load, plan, published, resolve, save, to_rules
from blrlab.compress.spending import Allocation, Option, choose, uniform
from blrlab.compress.statistics import Statistics
from blrlab.compress.tree import (
    Loss,
    compression_factors,
    expand,
    parameter_count,
    shapes_of,
)

__all__ = [
    "ALGORITHMS", "Allocation", "Allowed", "Choice", "Fit", "Loss", "Option", "Statistics", "Target", "algorithm_of",
    "allocate", "called", "choose", "collect", "compress", "compress_in_sequence", "compression_factors", "expand",
    "fit", "latencies", "linears", "load", "parameter_count", "plan", "published", "resolve", "save", "sensitivities",
    "shapes_of", "to_rules", "uniform",
]  # fmt: skip
