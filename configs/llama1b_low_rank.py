"""A Llama-3.2-1B from dense to low rank: compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/llama1b_low_rank.py:small
    python -m blrlab.experiments.run --config=configs/llama1b_low_rank.py:full --config.init_from=FOLDER
    python -m blrlab.bench.model --config=configs/llama1b_low_rank.py:full --formats=dense,low_rank,monarch,blast

Scales: `:small` (3.9 million parameters from scratch, on bytes; minutes on two CPU cores) and `:full` (a Llama-3.2-1B
checkpoint of the folder, with its tokenizer; not yet measured; a GPU). Keys and values stay dense.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.llama1b(scale)
    config.factors.format = "low_rank"
    return config
