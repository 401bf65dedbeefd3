"""What every test of blrlab shares: a CPU, and JAX at its strictest about shapes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Batched LAPACK calls run many times slower when its threads wait on each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    import jax
except ImportError:  # tests/ops must pass without it
    pass
else:
    jax.config.update("jax_numpy_rank_promotion", "raise")
