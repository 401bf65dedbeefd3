"""GPT-2 as users of PyTorch run it: `transformers.GPT2LMHeadModel`, its linear layers dense or factored.

Weights are random. Linear layers and their factors have entries of about 1/sqrt(i), so that what they add outweighs
the embeddings in the logits and a wrong layer shows there; biases and norms are random too. Paths of layers are those
of `blrlab.models.gpt2`, `h_0/mlp/c_fc`. Shapes: B batch, T tokens, N vocabulary size.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from blrlab_ops import testing
from blrlab_ops.nn import replace_linears
from torch import Tensor

from blrlab.bench import kept
from blrlab.bench.problem import Kernel, dense_weight, leaves, map_leaves

if TYPE_CHECKING:
    from blrlab.factors import Spec
    from blrlab.models.gpt2 import Config

Model = Any  # a GPT2LMHeadModel, which is only imported where one is made


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """All numbers of a model.

    Attributes:
      kernels: {path of a linear layer: W [i, o] or its factors}.
      others: {path: tensor} of embeddings, norms and biases, such as `h_0/ln_1/scale`.
    """

    kernels: Mapping[str, Kernel]
    others: Mapping[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Weights":
        """Apply a function to every tensor."""
        kernels = {path: map_leaves(change, kernel) for path, kernel in self.kernels.items()}
        return Weights(kernels, {path: change(tensor) for path, tensor in self.others.items()})

    def dense(self) -> "Weights":
        """Multiply all factors out, in float64."""
        return Weights({path: dense_weight(kernel) for path, kernel in self.kernels.items()}, self.others)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors; the embedding is also the output layer and counts once."""
        tensors = [*self.others.values(), *(leaf for kernel in self.kernels.values() for leaf in leaves(kernel))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def linears(sizes: "Config") -> dict[str, tuple[int, int]]:
    """Return {path: (in_features, out_features)} of every linear layer but the output layer."""
    width = sizes.width
    block = {
        "attn/c_attn": (width, 3 * width),
        "attn/c_proj": (width, width),
        "mlp/c_fc": (width, 4 * width),
        "mlp/c_proj": (4 * width, width),
    }
    return {f"h_{layer}/{name}": size for layer in range(sizes.layers) for name, size in block.items()}


def draw(sizes: "Config", specs: Mapping[str, "Spec"], seed: int) -> Weights:
    """Draw float32 weights on the CPU; layers that `specs` names are factored, the others dense."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    width = sizes.width
    others = {
        "wte/embedding": normal(sizes.vocab_size, width, scale=0.02),
        "wpe/embedding": normal(sizes.context, width, scale=0.02),
    }
    norms = [f"h_{layer}/{name}" for layer in range(sizes.layers) for name in ("ln_1", "ln_2")]
    for norm in (*norms, "ln_f"):
        others[f"{norm}/scale"] = 1 + normal(width, scale=0.1)
        others[f"{norm}/bias"] = normal(width, scale=0.1)
    kernels: dict[str, Kernel] = {}
    for number, (path, (i, o)) in enumerate(linears(sizes).items()):
        others[f"{path}/bias"] = normal(o, scale=0.1)
        dense, spec = normal(i, o, scale=i**-0.5), specs.get(path)
        if spec is None or spec.format == "dense":
            kernels[path] = dense
        else:
            kernels[path] = testing.random_factors(spec.format, i, o, spec.blocks, spec.rank, seed=seed + number)
    return Weights(kernels, others)


def build(sizes: "Config", weights: Weights, impl: str | None = None) -> Model:
    """Make the model in evaluation mode, on the device and in the dtype of its weights; factored layers run `impl`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    fields: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "n_positions": sizes.context,
        "n_embd": sizes.width,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "attn_implementation": "sdpa",
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    table = weights.others["wte/embedding"]
    with torch.device(table.device):
        model: Any = GPT2LMHeadModel(GPT2Config(**fields))
    model = model.to(table.dtype).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    for path, tensor in weights.others.items():
        parameters[torch_name(path)].copy_(tensor)
    factored = {}
    for path, kernel in weights.kernels.items():
        if isinstance(kernel, Tensor):
            parameters[f"{torch_name(path)}.weight"].copy_(kernel)
        else:
            factored[torch_name(path)] = kernel
    return replace_linears(model, factored, impl).requires_grad_(False)


def torch_name(path: str) -> str:
    """Return the name that transformers gives a layer or a parameter.

    >>> torch_name("h_0/mlp/c_fc"), torch_name("h_0/ln_1/scale")
    ('transformer.h.0.mlp.c_fc', 'transformer.h.0.ln_1.weight')
    """
    *parts, last = path.split("/")
    last = {"scale": "weight", "embedding": "weight"}.get(last, last)
    return ".".join(("transformer", *parts, last)).replace(".h_", ".h.")


def call(model: Model, phase: str, ids: Tensor) -> Callable[[], Tensor]:
    """Return a call of one phase, which returns logits.

    Args:
      model: from `build`.
      phase: forward: [B, T, N] of all tokens, no key-value cache. prefill: [B, 1, N] of the last token, keys and
        values written to a cache. decode: [B, 1, N] of the last token, the cache holding all before it; every call
        writes the same place again.
      ids: [B, T].
    """
    length = ids.shape[1]
    if phase == "forward":
        return functools.partial(_logits, model, ids, kept.cache(0, [None] * model.config.n_layer), 0)
    config = model.config
    shape = (ids.shape[0], config.n_head, length, config.n_embd // config.n_head)
    stored = kept.storage(config.n_layer, shape, model.transformer.wte.weight)
    if phase == "prefill":
        return functools.partial(_logits, model, ids, kept.cache(0, stored), 1)
    _logits(model, ids[:, :-1], kept.cache(0, stored), 1)
    return functools.partial(_logits, model, ids[:, -1:].contiguous(), kept.cache(length - 1, stored), 1)


def _logits(model: Model, ids: Tensor, cache: Any, last: int) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=last).logits
