"""What every test of blrlab shares: a CPU, and JAX at its strictest about shapes."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Batched LAPACK calls run many times slower when its threads wait on each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What one test has compiled, the others and their child processes read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="blrlab-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

try:
    import jax
except ImportError:  # tests/ops must pass without it
    pass
else:
    jax.config.update("jax_numpy_rank_promotion", "raise")
