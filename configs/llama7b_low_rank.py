"""A Llama from dense to low rank: compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/llama7b_low_rank.py:small
    python -m blrlab.experiments.run --config=configs/llama7b_low_rank.py:full --config.init_from=FOLDER

Scales: `:small` (3.4 million parameters from scratch on bytes; TIME) and `:full` (a Llama-7B
checkpoint, its own tokenizer; memory for its training is yours to find: a GPU of 80 GB compresses and evaluates it,
with `--config.stages=data,dense,compress,eval`). EXPECT
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.llama(scale)
    config.factors.format = "low_rank"
    return config
