"""Layers alone, no model: predicted for the GPUs of the device table, and measured over every backend here.

    python -m blrlab.experiments.run --config=configs/layers.py

Scales: `:small` (GPT2-S's layers at one number of tokens; half a minute on two CPU cores, where the Triton kernels are
verified in their interpreter and not timed) and `:full` (every layer of the source paper at 1, 16, its own and 16384
tokens, for a GPU; some ten minutes on one H100). Expect a report whose bars say which backend beats dense, and heat
maps that say what could.
"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.gpt2(scale).unlock()
    config.stages = "roofline,bench,report"
    config.bench.nets = "gpt2s"
    config.bench.ops = "dense,low_rank,monarch,blast"
    if scale == "small":
        config.bench.tokens = "64"
        config.bench.seconds = 0.02
    else:
        papers = "llama7b,llama1b,gpt2s,vit_b,dit_xl"
        config.bench.update(nets=papers, tokens="1,16,0,16384", seconds=0.1, workers=8)
        config.roofline.nets = papers
    return config.lock()
