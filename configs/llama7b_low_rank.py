"""A Llama from dense to low rank: compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/llama7b_low_rank.py:small
    python -m blrlab.experiments.run --config=configs/llama7b_low_rank.py:full --config.init_from=FOLDER

Scales: `:small` (3.3 million parameters from scratch, on bytes; 8 minutes on two CPU cores) and `:full` (a Llama-7B
checkpoint of the folder, with its tokenizer; not yet measured, and for large GPUs: `python -m blrlab.compress` fits to
weights one matrix at a time). Expect at small a dense loss of 1.77 nats/byte.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.llama(scale)
    config.factors.format = "low_rank"
    return config
