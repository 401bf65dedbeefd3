"""GPT-2 from dense to Monarch (block SVD): train, compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/gpt2_monarch.py

Scales: `:small` (1.9 million parameters; 4 to 7 minutes on two CPU cores) and `:full` (GPT2-S; 7 minutes on one H100);
without one the command picks. Expect layers 3.14x smaller and, dense -> compressed -> healed, a validation loss near
1.90 -> 1.91 -> 1.81 nats/byte at small; with `--config.compress.mode=plain` 1.90 -> 2.06 -> 1.86, and at full
4.5 -> 4.8 -> 4.4 nats/token.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.gpt2(scale)
    config.factors.format = "monarch"
    return config
