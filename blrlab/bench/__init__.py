"""Benchmarks of layers and models: every contender verified against float64 before it is timed.

Commands: `python -m blrlab.bench.layer`, `python -m blrlab.bench.model`, `python -m blrlab.bench.compare`. PyTorch is
needed; JAX is loaded only where the backend `xla` is asked for.
"""
