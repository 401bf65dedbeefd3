"""GPT-2 from dense to BLAST (alternating solves): train, compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/gpt2_blast.py

Scales: `:small` (1.9 million parameters; 4 to 7 minutes on two CPU cores) and `:full` (GPT2-S, a GPU); without one the
command picks. Expect layers 3.02x smaller and, dense -> compressed -> healed, a validation loss near
1.90 -> 1.90 -> 1.82 nats/byte at small.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.gpt2(scale)
    config.factors.format = "blast"
    return config
