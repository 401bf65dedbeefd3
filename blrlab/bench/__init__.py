"""Layer benchmarks: every contender verified against float64 before it is timed, and none timed that fails."""

from blrlab.bench.backends import BACKENDS
from blrlab.bench.layer import Settings, bench_layers
from blrlab.bench.peaks import measure_peaks
from blrlab.bench.problem import Problem, own_problems, published_problems

__all__ = ["BACKENDS", "Problem", "Settings", "bench_layers", "measure_peaks", "own_problems", "published_problems"]
