"""What an experiment's config holds, and the GPT-2 that the configs in `configs/` start from.

A config file's `get_config(scale)` takes a default from here, changes what it is about, and returns it. Nothing
here is derived from another field: what depends on others is filled in after the command line's overrides.
"""

from typing import Any

from ml_collections import ConfigDict

Config = Any  # a ConfigDict, whose fields a type checker cannot see
SCALES = ("small", "full")


def gpt2(scale: str) -> Config:
    """Return the config of a GPT-2 experiment.

    Args:
      scale: small (1.9 million parameters, minutes on two CPU cores) or full (GPT2-S, 124 million, for a GPU).

    Raises:
      ValueError: the scale is unknown.
    """
    if scale not in SCALES:
        raise ValueError(f'unknown scale "{scale}": it is one of {", ".join(SCALES)}.')
    config = _everything()
    if scale == "small":
        _small(config)
    return config.lock()  # a config file with a misspelt field is told so


def _everything() -> Config:
    """All fields, with the values of the full scale."""
    config: Config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a GPT-2 checkpoint, by folder or Hugging Face name; empty: train from scratch
    # Which stages to run, in order: data, dense, compress, heal, continue, eval, bridge, bench, report; or all of them.
    # Only where named: allocate (gives a budget out), roofline (predictions for GPUs that are not here).
    config.stages = "all"

    config.data = ConfigDict()
    config.data.source = "stdlib"  # stdlib, folder or huggingface
    config.data.path = ""  # the folder of text files, for folder
    config.data.name = "wikitext"  # the dataset, for huggingface
    config.data.subset = "wikitext-103-raw-v1"
    config.data.valid_fraction = 0.1
    config.data.tokenizer = "bpe"  # byte, bpe, or checkpoint (that of init_from)
    config.data.vocab_size = 8192  # of a trained BPE; the default text is too small to teach more

    config.model = ConfigDict()  # with init_from, the sizes are the checkpoint's
    config.model.family = "gpt2"
    config.model.vocab_size = 50257
    config.model.context = 1024
    config.model.layers = 12
    config.model.heads = 12
    config.model.width = 768
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.model.remat = False  # compute a block's activations again for the gradient, instead of keeping them
    config.model.scan = False  # one program for all blocks: compiles faster

    config.train = _training(steps=1000, batch=16, learning_rate=6e-4, warmup=200)
    config.heal = _training(steps=300, batch=16, learning_rate=3e-4, warmup=50)
    # What healing learns from the dense model: logits (its predictions), outputs (of its blocks), or empty: nothing.
    config.heal.distil = ""
    config.heal.distil_weight = 0.5  # the share of that in the loss, 0 to 1; the rest is the text's
    config.heal.temperature = 1.0  # of the predictions

    config.factors = ConfigDict()
    config.factors.net = "gpt2s"  # whose published ranks and blocks a 0 stands for
    config.factors.format = "monarch"  # dense, low_rank, monarch or blast
    config.factors.rank = 0  # r as the papers count it; 0: the published one for the format and layer
    config.factors.blocks = 0  # b, on both sides; 0: the published one
    config.factors.block_rank = 0  # r', the rank of one block (monarch only), instead of rank
    # Ordered (path pattern, fields) pairs; the first that matches a layer decides, no match leaves it dense.
    # Fields are format, rank, blocks, block_rank; those left out come from config.factors.
    config.rules = (("*/attn/c_attn", {}), ("*/mlp/c_fc", {}), ("*/mlp/c_proj", {}))

    config.rules_file = ""  # JSON, such as the plan.json of stage allocate, edited or not; in the place of rules

    # Stage allocate: format, blocks and rank for each of the layers that the rules match.
    config.budget = ConfigDict()
    config.budget.target = "layer_factor"  # layer_factor, model_factor, bytes or microseconds
    config.budget.value = 2.0
    config.budget.formats = "dense,low_rank,monarch,blast"
    config.budget.blocks = "4,8,16"  # b, where it divides the layer
    config.budget.multiple = 16  # of which ranks (monarch: of a block) are multiples
    config.budget.sensitivity = True  # weigh layers by what their loss does to the model's, on training text
    config.budget.records = ""  # bench records of layers, on one device in one dtype, for microseconds
    config.budget.tokens = 1  # at which those were taken

    config.compress = ConfigDict()
    # plain: to the weights alone. whitened: to what the layers give on training text. sequential: the same, each layer
    # on what the compressed ones before it hand it.
    config.compress.mode = "whitened"
    config.compress.windows = 128  # of the training text, evenly spread, for whitened and sequential
    config.compress.batch = 8
    config.compress.seed = 0  # of random starts
    config.compress.low_rank = "svd"  # or randomized_svd
    config.compress.monarch = "block_svd"
    config.compress.blast = "alternating"  # or precgd, as published

    config.eval = ConfigDict()
    config.eval.windows = 256  # of the validation text, evenly spread
    config.eval.batch = 8

    config.roofline = ConfigDict()
    config.roofline.devices = "a40,orin_nano_8gb,h100"  # names of the device table, commas between
    config.roofline.nets = "gpt2s"
    config.roofline.tokens = "0"  # rows of the input, commas between; 0: the published number
    config.roofline.dtype = "bfloat16"
    config.roofline.advice = True  # also which formats, blocks and ranks can beat dense at all

    config.bench = ConfigDict()
    config.bench.impls = "all"  # backends, commas between
    config.bench.nets = "own,gpt2s"  # own: the model's own layers with its own factors; all: every net there is
    config.bench.layers = ""  # of those nets, commas between; empty: all of them
    config.bench.ops = ""  # formats, commas between; empty: dense and those of the model's layers
    config.bench.tokens = "0"  # rows of the input, commas between; 0: the published number, own layers the context
    config.bench.dtype = ""  # empty: bfloat16 on a GPU, float32 on a CPU
    config.bench.seconds = 0.2  # of measuring, for each contender
    config.bench.workers = 0  # processes that compile ahead on a GPU
    config.bench.paper = ""  # a clone of the source paper's repository, for its kernels
    return config


def _training(steps: int, batch: int, learning_rate: float, warmup: int) -> Config:
    training: Config = ConfigDict()
    training.steps = steps
    training.batch = batch
    training.learning_rate = learning_rate
    training.warmup = warmup
    training.final_fraction = 0.1  # of the learning rate, at the cosine's end
    training.weight_decay = 0.1
    training.decay = "factors"  # what decays: the factors of a kernel, or the product that they stand for
    training.factor_rates = False  # learning rates of factors by their fan-in, in units of a dense layer's
    training.clip_norm = 1.0
    training.log_every = 10
    training.checkpoint_every = 500
    return training


def _small(config: Config) -> None:
    """A quarter of GPT2-S's width and a third of its depth, on bytes."""
    config.data.tokenizer = "byte"
    config.model.update(vocab_size=256, context=128, layers=4, heads=4, width=192, dropout=0.0, dtype="float32")
    config.train.update(steps=400, batch=16, learning_rate=3e-3, warmup=40, log_every=5, checkpoint_every=100)
    config.heal.update(steps=120, batch=16, learning_rate=1.5e-3, warmup=10, log_every=5, checkpoint_every=60)
    config.budget.update(blocks="4,8", multiple=8)
    config.compress.update(batch=32)
    config.eval.update(windows=256, batch=32)
