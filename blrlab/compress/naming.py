"""What the tensors of a Hugging Face checkpoint are: which are linear layers, how they lie, what a net calls them.

A linear layer is a matrix `<path>.weight` that is no table of embeddings. `torch.nn.Linear` keeps it [out, in]; the
`Conv1D` of GPT-2 and its kin [in, out], as the weights W [i, o] here are.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from blrlab_ops import shapes

from blrlab.compress.plan import natural
from blrlab.errors import InputError
from blrlab.models.hf.stored import DTYPES, Stored

WEIGHT, BIAS = ".weight", ".bias"
# By model_type of config.json: the modules that are Conv1D. All other modules, of any model, are torch.nn.Linear.
_OF_GPT2 = ("c_attn", "q_attn", "c_fc", "c_proj")
CONV1D = {"gpt2": _OF_GPT2, "openai-gpt": _OF_GPT2, "imagegpt": _OF_GPT2, "decision_transformer": _OF_GPT2}
EMBEDDINGS = (
    "embed_tokens", "embed_positions", "wte", "wpe", "tokens_embed", "positions_embed", "word_embeddings",
    "position_embeddings", "token_type_embeddings", "shared", "embed_in", "embedding_table",
)  # fmt: skip
# By how a path ends: what nets of `blrlab_ops.shapes` may call it. Others go by the last part of their own names.
ALIASES = {
    "q_proj": ("qkvo", "qo"),
    "k_proj": ("qkvo",),
    "v_proj": ("qkvo",),
    "o_proj": ("qkvo", "qo"),
    "gate_proj": ("gate_up", "gate"),
    "up_proj": ("gate_up", "up"),
    "down_proj": ("down",),
    # ViT in transformers; DiT in diffusers, and by its authors.
    "attention.output.dense": (),
    "intermediate.dense": ("fc1",),
    "output.dense": ("fc2",),
    "ff.net.0.proj": ("fc1",),
    "ff.net.2": ("fc2",),
    "norm1.linear": ("adaln",),
    "adaLN_modulation.1": ("adaln",),
}


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer of a checkpoint: its tensor, the sizes of W [i, o], and whether the tensor is W transposed."""

    stored: Stored
    in_features: int
    out_features: int
    transposed: bool


def model_type(folder: Path) -> str:
    """Return the model_type of a checkpoint's config.json.

    Raises:
      InputError: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no config.json.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        found = given["model_type"] if "model_type" in given else given["_class_name"]  # which diffusers has
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not tell its model_type: {type(error).__name__}: {error}") from None
    return str(found)


def linears(tensors: Mapping[str, Stored], kind: str) -> dict[str, Linear]:
    """Return {path: linear layer} of a checkpoint's tensors, in a reader's order.

    Args:
      tensors: {name: tensor}.
      kind: the model_type.
    """
    found = {}
    for name in sorted(tensors, key=natural):
        stored, path = tensors[name], name.removesuffix(WEIGHT)
        last = path.rsplit(".", 1)[-1]
        if path == name or len(stored.shape) != 2 or last in EMBEDDINGS or stored.dtype not in DTYPES:
            continue
        transposed = last not in CONV1D.get(kind, ())
        rows, columns = stored.shape
        sizes = (columns, rows) if transposed else (rows, columns)
        found[path] = Linear(stored, *sizes, transposed)
    return found


def called(path: str, net: str) -> str:
    """Return what a net of `blrlab_ops.shapes` calls a layer; the last part of its path where it has no such layer.

    >>> called("model.layers.0.self_attn.q_proj", "llama7b"), called("transformer.h.0.mlp.c_fc", "gpt2s")
    ('qkvo', 'c_fc')
    >>> called("transformer_blocks.0.norm1.linear", "dit_xl"), called("vit.encoder.layer.0.output.dense", "vit_b")
    ('adaln', 'fc2')
    """
    path = path.replace("/", ".")
    last = path.rsplit(".", 1)[-1]
    known = [layer.name for layer in shapes.LAYERS if layer.net == net]
    own = next((names for ending, names in ALIASES.items() if f".{path}".endswith(f".{ending}")), ())
    return next((name for name in (last, *own) if name in known), last)


def has_published(path: str, layer: Linear, net: str) -> bool:
    """Tell whether a net has a layer of this name and these proportions."""
    return any(
        known.name == called(path, net)
        and layer.in_features * known.out_features == layer.out_features * known.in_features
        for known in shapes.LAYERS
        if known.net == net
    )
