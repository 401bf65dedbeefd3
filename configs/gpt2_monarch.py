"""GPT-2 from dense to Monarch (block SVD): train, compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/gpt2_monarch.py

Scales: `:small` (a CPU, TIME) and `:full` (GPT2-S, a GPU); without one the command picks.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.gpt2(scale)
    config.factors.format = "monarch"
    return config
