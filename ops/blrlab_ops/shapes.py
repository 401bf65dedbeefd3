"""Named shapes: layers the literature measures, with its ranks and blocks, and layers of models of today.

Published: arXiv 2512.20861. Its DiT has no Monarch; 8 blocks are this project's choice, since 9 does not divide the
ranks. Ranks here are total ranks r; a Monarch block has rank r' = r / b.

Not published (`published` is False): the MLPs of Qwen2.5-7B, Mistral-7B, Llama-3-8B and Gemma-2-9B, sizes as in the
config.json of each. Their ranks are this project's choice, by the recipe that llama7b's follow: 16 blocks and half
the parameters, r = i o / 2 (i + o), down to a multiple of 16; for Monarch the nearest r' that is a multiple of 16.
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer of a net: y [tokens, out_features] = x [tokens, in_features] W.

    Attributes:
      net: one of `NETS`.
      name: as in the net's own code; layers of one shape and rank share a row, such as qkvo.
      in_features: i.
      out_features: o.
      tokens: n, at which the literature times the layer (batch 1); 1024 where nothing is published.
      rank: r of low rank and BLAST.
      blast_blocks: b of BLAST, on both sides.
      monarch_rank: r of Monarch.
      monarch_blocks: b of Monarch, on both sides.
      published: the ranks and blocks are the literature's, not this project's.
    """

    net: str
    name: str
    in_features: int
    out_features: int
    tokens: int
    rank: int
    blast_blocks: int
    monarch_rank: int
    monarch_blocks: int
    published: bool = True

    def choice(self, format: str) -> tuple[int, int]:
        """Return the (rank r, blocks b) of a format; (0, 1) for dense.

        Raises:
          KeyError: the format is unknown.
        """
        return {
            "dense": (0, 1),
            "low_rank": (self.rank, 1),
            "blast": (self.rank, self.blast_blocks),
            "monarch": (self.monarch_rank, self.monarch_blocks),
        }[format]


LAYERS = (
    Layer("llama7b", "qkvo", 4096, 4096, 1024, 1024, 16, 1024, 16),
    Layer("llama7b", "gate_up", 4096, 11008, 1024, 1488, 16, 1536, 16),
    Layer("llama7b", "down", 11008, 4096, 1024, 1488, 16, 1536, 16),
    Layer("llama1b", "qo", 2048, 2048, 1024, 256, 16, 256, 16),
    Layer("llama1b", "gate", 2048, 8192, 1024, 512, 16, 512, 16),
    Layer("llama1b", "up", 2048, 8192, 1024, 768, 16, 768, 16),
    Layer("llama1b", "down", 8192, 2048, 1024, 768, 16, 768, 16),
    Layer("gpt2s", "c_attn", 768, 2304, 384, 192, 6, 192, 4),
    Layer("gpt2s", "c_fc", 768, 3072, 384, 192, 6, 192, 4),
    Layer("gpt2s", "c_proj", 3072, 768, 384, 192, 6, 192, 4),
    Layer("vit_b", "qkv", 768, 2304, 197, 128, 3, 128, 4),
    Layer("vit_b", "fc1", 768, 3072, 197, 128, 3, 128, 4),
    Layer("vit_b", "fc2", 3072, 768, 197, 128, 3, 128, 4),
    Layer("dit_xl", "qkv", 1152, 3456, 16384, 384, 9, 384, 8),
    Layer("dit_xl", "fc1", 1152, 4608, 16384, 256, 9, 256, 8),
    Layer("dit_xl", "adaln", 1152, 6912, 1, 256, 9, 256, 8),
    Layer("qwen25_7b", "gate_up", 3584, 18944, 1024, 1504, 16, 1536, 16, published=False),
    Layer("qwen25_7b", "down", 18944, 3584, 1024, 1504, 16, 1536, 16, published=False),
    Layer("mistral_7b", "gate_up", 4096, 14336, 1024, 1584, 16, 1536, 16, published=False),
    Layer("mistral_7b", "down", 14336, 4096, 1024, 1584, 16, 1536, 16, published=False),
    Layer("llama3_8b", "gate_up", 4096, 14336, 1024, 1584, 16, 1536, 16, published=False),
    Layer("llama3_8b", "down", 14336, 4096, 1024, 1584, 16, 1536, 16, published=False),
    Layer("gemma2_9b", "gate_up", 3584, 14336, 1024, 1424, 16, 1536, 16, published=False),
    Layer("gemma2_9b", "down", 14336, 3584, 1024, 1424, 16, 1536, 16, published=False),
)
NETS = tuple(dict.fromkeys(layer.net for layer in LAYERS))


def layers(net: str) -> tuple[Layer, ...]:
    """Return a net's layers.

    >>> [layer.name for layer in layers("qwen25_7b")]
    ['gate_up', 'down']

    Raises:
      ValueError: the net is unknown, with the known ones and the nearest.
    """
    if net not in NETS:
        near = difflib.get_close_matches(net, NETS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'unknown net "{net}": it is one of {", ".join(NETS)}.{hint}')
    return tuple(layer for layer in LAYERS if layer.net == net)
