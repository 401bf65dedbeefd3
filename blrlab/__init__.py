"""blrlab: block low-rank weights, trained and compressed in Flax, run in Triton.

Importing the package loads nothing else; take what you need from its rooms:

- `blrlab.factors`: the formats as pure functions on dicts of arrays;
- `blrlab.layers`: `FactoredDense`, and factored weights inside existing Flax models;
- `blrlab.models`, `blrlab.data`, `blrlab.train`, `blrlab.compress`: what experiments are made of;
- `blrlab.bridge`: JAX arrays as torch tensors over the same memory;
- `blrlab.bench`, `blrlab.roofline`, `blrlab.report`: measured, bounded, shown.
"""

__version__ = "0.1.0"
