"""Models in Flax, every linear layer a `FactoredDense`, and the import of Hugging Face checkpoints."""
