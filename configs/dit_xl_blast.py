"""A diffusion transformer from dense to BLAST: train, compress, heal, evaluate, draw, benchmark, report.

    python -m blrlab.experiments.run --config=configs/dit_xl_blast.py:small
    python -m blrlab.experiments.run --config=configs/dit_xl_blast.py:full --config.data.path=LATENTS

Scales: `:small` (1.2 million parameters on the pixels of scikit-learn's digits; 9 minutes on two busy CPU cores) and
`:full` (DiT-XL/2 on class folders of an autoencoder's latents, from scratch or from `--config.init_from=FOLDER` of a
checkpoint; a GPU). Layers and ranks are those of arXiv 2512.20861: fc2 and attention's output stay dense. Expect at
small, dense -> compressed -> healed, 0.0906 -> 0.0918 -> 0.0896 mse + T/1000 vb, a model 1.76 times smaller, and
in sample/samples.png digits that can be read.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.dit(scale)
    config.factors.format = "blast"
    return config
