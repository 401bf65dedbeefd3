"""What an experiment's config holds, and the models that the configs in `configs/` start from.

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
    config = _language(scale)
    config.model = _model(
        family="gpt2", vocab_size=50257, context=1024, layers=12, heads=12, width=768, dropout=0.1, dtype="bfloat16"
    )
    if scale == "small":
        config.model.update(vocab_size=256, context=128, layers=4, heads=4, width=192, dropout=0.0, dtype="float32")
    return config.lock()  # a config file with a misspelt field is told so


def llama(scale: str) -> Config:
    """Return the config of a Llama experiment.

    Args:
      scale: small (3.3 million parameters, minutes on two CPU cores) or full (Llama-7B, from a checkpoint that
        `--config.init_from` names).

    Raises:
      ValueError: the scale is unknown.
    """
    config = _language(scale)
    config.model = _model(
        family="llama", vocab_size=32000, context=2048, layers=32, heads=32, kv_heads=32, width=4096, inner=11008,
        dtype="bfloat16",
    )  # fmt: skip
    config.model.remat = True
    config.factors.net = "llama7b"
    config.rules = (("*/self_attn/*_proj", {}), ("*/mlp/*_proj", {}))
    config.roofline.nets, config.bench.nets = "llama7b", "own,llama7b"
    if scale == "small":
        config.model.update(vocab_size=256, context=128, layers=4, heads=4, kv_heads=4, width=256, inner=688)
        config.model.update(dtype="float32", remat=False)
    return config.lock()


def llama1b(scale: str) -> Config:
    """Return the config of an experiment on a Llama of grouped queries and a tied output layer.

    Args:
      scale: small (3.9 million parameters, minutes on two CPU cores) or full (Llama-3.2-1B, from a checkpoint that
        `--config.init_from` names, whose rotary frequencies are stretched as it says).

    Raises:
      ValueError: the scale is unknown.
    """
    config: Config = llama(scale).unlock()
    config.model.update(vocab_size=128256, layers=16, heads=32, kv_heads=8, width=2048, inner=8192)
    config.model.update(rope_theta=5e5, tied=True)
    config.factors.net = "llama1b"
    # keys and values have few heads, and stay dense
    config.rules = tuple((f"*/{name}_proj", {}) for name in ("q", "o", "gate", "up", "down"))
    config.roofline.nets, config.bench.nets = "llama1b", "own,llama1b"
    if scale == "small":
        config.model.update(vocab_size=256, layers=4, heads=8, kv_heads=2, width=256, inner=1024)
    return config.lock()


def vit(scale: str) -> Config:
    """Return the config of a ViT experiment.

    Args:
      scale: small (0.5 million parameters on scikit-learn's digits, minutes on two CPU cores) or full (ViT-B/16 on a
        folder of class folders, for a GPU).

    Raises:
      ValueError: the scale is unknown.
    """
    config = _everything(scale)
    config.data = ConfigDict()
    config.data.source = "folder"  # digits, folder or huggingface
    config.data.path = ""  # of class folders, or of train and val that hold them
    config.data.name = ""  # the dataset, for huggingface
    config.data.subset = ""
    config.data.valid_fraction = 0.1  # where the source has no split of its own
    config.data.smallest = 0.08  # share of a picture's area that training cuts out; 1: all of it
    config.data.flip = True  # left and right may change places
    config.data.workers = 8  # threads that read pictures
    config.model = _model(
        family="vit", image_size=224, patch=16, channels=3, classes=1000, layers=12, heads=12, width=768, inner=3072,
        dropout=0.0, fused=True, dtype="bfloat16",
    )  # fmt: skip
    config.train = _training(steps=30000, batch=512, learning_rate=1e-3, warmup=1000)
    config.train.update(smoothing=0.1, mixup=0.2)  # of labels and images; healing's too
    config.heal = _healing(steps=3000, batch=512, learning_rate=1e-4, warmup=100)
    config.factors.net = "vit_b"
    config.rules = (("*/qkv", {}), ("*/fc1", {}), ("*/fc2", {}))
    config.roofline.nets, config.bench.nets = "vit_b", "own,vit_b"
    config.compress.update(windows=1024, batch=64)
    config.eval.update(windows=50000, batch=256)
    if scale == "small":
        config.data.update(source="digits", smallest=0.6, flip=False, workers=2, valid_fraction=0.2)
        config.model.update(image_size=32, patch=4, channels=1, classes=10, layers=4, heads=4, width=96, inner=384)
        config.model.dtype = "float32"
        config.train.update(steps=400, batch=64, warmup=40, log_every=10, checkpoint_every=100, mixup=0.0)
        config.heal.update(steps=120, batch=64, learning_rate=3e-4, warmup=10, log_every=10, checkpoint_every=60)
        config.compress.update(windows=256, batch=64)
        config.eval.update(windows=1000, batch=100)
    return config.lock()


def dit(scale: str) -> Config:
    """Return the config of a DiT experiment.

    Args:
      scale: small (1.2 million parameters on scikit-learn's digits, minutes on two CPU cores) or full (DiT-XL/2 on a
        folder of latents, for a GPU).

    Raises:
      ValueError: the scale is unknown.
    """
    config = _everything(scale)
    config.stages = "all,sample"
    config.data = ConfigDict()
    config.data.source = "latents"  # latents of an autoencoder, or pixels: digits, folder or huggingface
    config.data.path = ""  # of class folders of latents or pictures, or of train and val that hold them
    config.data.name = ""  # the dataset, for huggingface
    config.data.subset = ""
    config.data.valid_fraction = 0.02  # where the source has no split of its own
    config.data.scale = 0.18215  # of latents: what they are multiplied by; this is Stable Diffusion's
    config.data.flip = True  # left and right of pictures may change places
    config.data.workers = 8  # threads that read
    config.noise = ConfigDict()
    config.noise.steps = 1000
    config.noise.first = 1e-4  # beta, on a line from the first to the last step
    config.noise.last = 0.02
    config.noise.dropped = 0.1  # share of labels that training drops, for guidance
    config.model = _model(
        family="dit", size=32, patch=2, channels=4, out_channels=8, classes=1000, layers=28, heads=16, width=1152,
        inner=4608, fused=True, dtype="bfloat16",
    )  # fmt: skip
    config.train = _training(steps=400000, batch=256, learning_rate=1e-4, warmup=0)
    config.train.update(final_fraction=1.0, weight_decay=0.0, ema=0.9999, checkpoint_every=5000, log_every=100)
    config.heal = _healing(steps=10000, batch=256, learning_rate=1e-4, warmup=200)
    config.heal.update(weight_decay=0.0, ema=0.999, log_every=100)
    config.factors.net = "dit_xl"
    config.rules = (("blocks_*/attn/qkv", {}), ("blocks_*/mlp/fc1", {}), ("blocks_*/adaln", {}))
    config.roofline.nets, config.bench.nets = "dit_xl", "own,dit_xl"
    config.compress.update(windows=4096, batch=64)  # of the conditions that adaln sees each example has one
    config.eval.update(windows=10000, batch=128)
    config.sample = ConfigDict()
    config.sample.labels = ""  # numbers of the classes to draw, commas between; empty: up to 10, evenly spread
    config.sample.each = 4  # images of a class by each of the models
    config.sample.batch = 32
    config.sample.seed = 0  # of the noise, the same for all models
    config.sample.sampler = "ddpm"  # or ddim
    config.sample.steps = 250
    config.sample.guidance = 4.0  # towards the label and past it; 1: with the label as it is
    config.sample.vae = ""  # for latents: the autoencoder of diffusers, folder or hub name; empty: they stay latents
    config.sample.fid_guidance = 1.0  # of the images drawn for the FID; 1: unguided
    config.sample.fid = 0  # images to draw for the FID, where torchmetrics and its network are installed; 0: none
    if scale == "small":
        config.data.update(source="digits", flip=False, workers=2, valid_fraction=0.2)
        config.model.update(size=8, channels=1, out_channels=2, classes=10, layers=3, heads=4, width=144, inner=576)
        config.model.dtype = "float32"
        config.train.update(steps=2000, batch=64, learning_rate=1e-3, warmup=50, final_fraction=0.1, ema=0.995)
        config.train.update(log_every=50, checkpoint_every=500)
        config.heal.update(steps=300, batch=64, learning_rate=3e-4, warmup=10, ema=0.98)
        config.heal.update(log_every=25, checkpoint_every=150)
        config.compress.update(windows=1024, batch=64)
        config.eval.update(windows=1000, batch=120)
        config.sample.update(steps=100, guidance=2.0)
        config.bench.nets = "own"  # the published layers at 16,384 tokens take a processor minutes each
    return config.lock()


def _language(scale: str) -> Config:
    """All fields of a language model's experiment but those of the model."""
    config = _everything(scale)
    config.data = ConfigDict()
    config.data.source = "stdlib"  # stdlib, folder or huggingface
    config.data.path = ""  # the folder of text files, for folder
    config.data.name = "wikitext"  # the dataset, for huggingface
    config.data.subset = "wikitext-103-raw-v1"
    config.data.valid_fraction = 0.1
    config.data.tokenizer = "bpe"  # byte, bpe, or checkpoint (that of init_from)
    config.data.vocab_size = 8192  # of a trained BPE; the default text is too small to teach more
    config.train = _training(steps=1000, batch=16, learning_rate=6e-4, warmup=200)
    config.heal = _healing(steps=300, batch=16, learning_rate=3e-4, warmup=50)
    config.factors.net = "gpt2s"  # whose published ranks and blocks a 0 stands for
    config.rules = (("*/attn/c_attn", {}), ("*/mlp/c_fc", {}), ("*/mlp/c_proj", {}))
    config.roofline.nets, config.bench.nets = "gpt2s", "own,gpt2s"
    if scale == "small":
        config.data.tokenizer = "byte"
        config.train.update(steps=400, batch=16, learning_rate=3e-3, warmup=40, log_every=5, checkpoint_every=100)
        config.heal.update(steps=120, batch=16, learning_rate=1.5e-3, warmup=10, log_every=5, checkpoint_every=60)
        config.compress.update(batch=32)
        config.eval.update(windows=256, batch=32)
    return config


def _model(**sizes: Any) -> Config:
    """Return a model's fields: its family, its sizes, and how it is computed."""
    model: Config = ConfigDict(sizes)  # with init_from, the sizes are the checkpoint's
    model.remat = False  # compute a block's activations again for the gradient, instead of keeping them
    model.scan = False  # one program for all blocks: compiles faster
    return model


def _everything(scale: str) -> Config:
    """All fields that experiments of any model have, with the values of the full scale.

    Raises:
      ValueError: the scale is unknown.
    """
    if scale not in SCALES:
        raise ValueError(f'unknown scale "{scale}": it is one of {", ".join(SCALES)}.')
    config: Config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a checkpoint of the model's family, by folder or Hugging Face name; empty: from scratch
    # Which stages to run, in order: data, dense, compress, heal, continue, eval, bridge, bench, report; or all of them.
    # Only where named: allocate (gives a budget out by the curves it has measured first), sample (draws images),
    # roofline (predictions for GPUs that are not here); "all,roofline" is possible, too.
    config.stages = "all"

    config.factors = ConfigDict()
    config.factors.net = ""  # whose published ranks and blocks a 0 stands for
    config.factors.format = "monarch"  # dense, low_rank, monarch or blast
    config.factors.rank = 0  # r as the papers count it; 0: the published one for the format and layer
    config.factors.blocks = 0  # b, on both sides; 0: the published one
    config.factors.block_rank = 0  # r', the rank of one block (monarch only), instead of rank
    # Ordered (path pattern, fields) pairs; the first that matches a layer decides, no match leaves it dense.
    # Fields are format, rank, blocks, block_rank; those left out come from config.factors.
    config.rules = ()
    config.rules_file = ""  # JSON, such as the plan.json of stage allocate, edited or not; in the place of rules

    # Stage allocate: format, blocks and rank for each of the layers that the rules match. Another target, value,
    # records or tokens measure nothing anew.
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
    # plain: to the weights alone. whitened: to what the layers give on training data. sequential: the same, each layer
    # on what the compressed ones before it hand it.
    config.compress.mode = "whitened"
    config.compress.windows = 128  # of the training data, evenly spread, for whitened and sequential
    config.compress.batch = 8
    config.compress.seed = 0  # of random starts
    config.compress.low_rank = "svd"  # or randomized_svd
    config.compress.monarch = "block_svd"
    config.compress.blast = "alternating"  # or precgd, as published

    config.eval = ConfigDict()
    config.eval.windows = 256  # of what is held out, evenly spread
    config.eval.batch = 8

    config.roofline = ConfigDict()
    config.roofline.devices = "a40,orin_nano_8gb,h100"  # names of the device table, commas between
    config.roofline.nets = ""
    config.roofline.tokens = "0"  # rows of the input, commas between; 0: the published number
    config.roofline.dtype = "bfloat16"
    config.roofline.advice = True  # also which formats, blocks and ranks can beat dense at all

    config.bench = ConfigDict()
    config.bench.impls = "all"  # backends, commas between
    config.bench.nets = ""  # own: the model's own layers with its own factors; all: every net there is
    config.bench.layers = ""  # of those nets, commas between; empty: all of them
    config.bench.ops = ""  # formats, commas between; empty: dense and those of the model's layers
    config.bench.tokens = "0"  # rows of the input, commas between; 0: the published number, own layers the context
    config.bench.dtype = ""  # empty: bfloat16 on a GPU, float32 on a CPU
    config.bench.seconds = 0.2  # of measuring, for each contender
    config.bench.workers = 0  # processes that compile ahead on a GPU
    config.bench.paper = ""  # a clone of the source paper's repository, for its kernels
    if scale == "small":
        config.budget.update(blocks="4,8", multiple=8)
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
    training.ema = 0.0  # what a step keeps of the average of the parameters, which is the result; 0: no average
    training.log_every = 10
    training.checkpoint_every = 500
    return training


def _healing(steps: int, batch: int, learning_rate: float, warmup: int) -> Config:
    """Return the fields of a training that starts from a compressed model, whose teacher is the dense one."""
    healing = _training(steps, batch, learning_rate, warmup)
    # What healing learns from the dense model: logits (its predictions), outputs (of its blocks), or empty: nothing.
    healing.distil = ""
    healing.distil_weight = 0.5  # the share of that in the loss, 0 to 1; the rest is the data's
    healing.temperature = 1.0  # of the predictions
    return healing


FAMILIES = {"gpt2": gpt2, "llama": llama, "vit": vit, "dit": dit}
