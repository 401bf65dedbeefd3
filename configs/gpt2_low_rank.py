"""GPT-2 from dense to low rank (truncated SVD): train, compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/gpt2_low_rank.py

Scales: `:small` (1.9 million parameters; 4 to 7 minutes on two CPU cores) and `:full` (GPT2-S, a GPU); without one the
command picks. Expect layers 3.14x smaller and, dense -> compressed, a validation loss near 1.90 -> 1.90
nats/byte at small.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.gpt2(scale)
    config.factors.format = "low_rank"
    return config
