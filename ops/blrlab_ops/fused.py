"""Attention whose queries, keys and values come from one factored layer, in the models of transformers and diffusers.

The layer's columns are q, then k, then v, in each one head after another. Shapes: B batch, T tokens, D width,
H heads, d a head's width, D = H d.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

# Three dense layers by the class that has them: of transformers 5, of transformers 4, and of diffusers.
PARTS = {
    "ViTAttention": ("q_proj", "k_proj", "v_proj"),
    "ViTSelfAttention": ("query", "key", "value"),
    "Attention": ("to_q", "to_k", "to_v"),
}


class FusedAttention(nn.Module):
    """Self-attention with one layer for q, k and v, in the place of that of a ViT of transformers.

    It attends by PyTorch's `scaled_dot_product_attention`, whatever the model's `attn_implementation` says.

    Attributes:
      qkv: the layer [D, 3 D].
      heads: H.
      dropout: share of attention weights dropped while training.
      o_proj: the output layer; None where another module has it, as in transformers 4.
    """

    def __init__(self, qkv: nn.Module, heads: int, dropout: float = 0.0, o_proj: nn.Module | None = None):
        super().__init__()
        self.qkv, self.heads, self.dropout, self.o_proj = qkv, heads, dropout, o_proj

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        """Attend; arguments and results are those of the attention it stands for.

        Args:
          hidden_states: [B, T, D].
          attention_mask: [B, 1 or H, T, T], added to the products of queries and keys, or where False hiding them.
          **others: what transformers hands on to its own implementations.

        Returns:
          [B, T, D], and None in the place of attention weights, which are not kept.
        """
        heads = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1))
        q, k, v = (each.transpose(1, 2) for each in heads.unbind(-3))  # [B, H, T, d]
        share = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attention_mask, share)
        mixed = mixed.transpose(1, 2).flatten(-2)
        return mixed if self.o_proj is None else self.o_proj(mixed), None


def parts(attention: nn.Module) -> list[nn.Linear]:
    """Return the layers of q, k and v of self-attention that can be fused; of any other module none."""
    found = [getattr(attention, name, None) for name in PARTS.get(type(attention).__name__, ())]
    dense = [layer for layer in found if isinstance(layer, nn.Linear)]
    # In diffusers a module's processor may do more, such as attend to a text too.
    processor: Any = getattr(attention, "processor", None)
    plain = processor is None or type(processor).__name__ == "AttnProcessor2_0"
    return dense if plain and len(dense) == 3 and not getattr(attention, "is_cross_attention", False) else []


def fuse(model: nn.Module, path: str, qkv: nn.Module) -> str:
    """Let the attention at a path have one layer for q, k and v, in place; `parts` of it are to be there.

    Args:
      model: of transformers or diffusers.
      path: of its attention, as in `model.named_modules()`.
      qkv: the layer [D, 3 D], factored or dense.

    Returns:
      The path of the layer.
    """
    attention: Any = model.get_submodule(path)
    if hasattr(attention, "to_q"):
        _fuse_by_diffusers(attention, qkv)
        return f"{path}.to_qkv"
    dropout = attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout_prob
    made = FusedAttention(qkv, attention.num_attention_heads, dropout, getattr(attention, "o_proj", None))
    model.set_submodule(path, made.train(attention.training))
    return f"{path}.qkv"


def _fuse_by_diffusers(attention: Any, qkv: nn.Module) -> None:
    """Do what `Attention.fuse_projections` does, without the dense layers that it starts from."""
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    for name in PARTS["Attention"]:
        delattr(attention, name)
    attention.to_qkv, attention.fused_projections = qkv, True
    attention.set_processor(FusedAttnProcessor2_0())
