"""A Llama from dense to Monarch: compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/llama7b_monarch.py:small
    python -m blrlab.experiments.run --config=configs/llama7b_monarch.py:full --config.init_from=FOLDER

Scales: `:small` (3.3 million parameters from scratch, on bytes; 8 minutes on two CPU cores) and `:full` (a Llama-7B
checkpoint of the folder, with its tokenizer; not yet measured, and for large GPUs: `python -m blrlab.compress` fits to
weights one matrix at a time). Expect at small, dense -> compressed -> healed, 1.77 -> 1.77 -> 1.69 nats/byte.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.llama(scale)
    config.factors.format = "monarch"
    return config
