"""What every test of blrlab shares: a CPU, and JAX at its strictest about shapes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

try:
    import jax
except ImportError:  # tests/ops must pass without it
    pass
else:
    jax.config.update("jax_numpy_rank_promotion", "raise")
