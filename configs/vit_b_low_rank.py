"""A Vision Transformer from dense to low rank: train, compress, heal, evaluate, benchmark, report.

    python -m blrlab.experiments.run --config=configs/vit_b_low_rank.py:small
    python -m blrlab.experiments.run --config=configs/vit_b_low_rank.py:full --config.data.path=IMAGENET

Scales: `:small` (0.5 million parameters on scikit-learn's digits; 3 minutes on two CPU cores) and `:full` (ViT-B/16 on
class folders, from scratch or from `--config.init_from=google/vit-base-patch16-224`; a GPU). Expect at small, dense ->
compressed -> healed, 0.36 -> 0.39 -> 0.26 nats/image, 93 -> 90 -> 95 % right.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.vit(scale)
    config.factors.format = "low_rank"
    return config
