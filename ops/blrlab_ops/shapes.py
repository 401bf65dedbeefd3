"""The layers the literature measures: sizes, token counts, and the ranks and blocks published for them.

Source: arXiv 2512.20861. Its DiT has no Monarch; 8 blocks are this project's choice, since 9 does not divide the
ranks. Ranks here are total ranks r; a Monarch block has rank r' = r / b.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer of a net: y [tokens, out_features] = x [tokens, in_features] W.

    Attributes:
      net: llama7b, llama1b, gpt2s, vit_b or dit_xl.
      name: as in the net's own code; layers of one shape and rank share a row, such as qkvo.
      in_features: i.
      out_features: o.
      tokens: n, at which the literature times the layer (batch 1).
      rank: r of low rank and BLAST.
      blast_blocks: b of BLAST, on both sides.
      monarch_rank: r of Monarch.
      monarch_blocks: b of Monarch, on both sides.
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

    def choice(self, format: str) -> tuple[int, int]:
        """Return the published (rank r, blocks b) of a format; (0, 1) for dense.

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
)
NETS = tuple(dict.fromkeys(layer.net for layer in LAYERS))


def layers(net: str) -> tuple[Layer, ...]:
    """Return a net's layers.

    Raises:
      ValueError: the net is unknown.
    """
    if net not in NETS:
        raise ValueError(f'unknown net "{net}": it is one of {", ".join(NETS)}.')
    return tuple(layer for layer in LAYERS if layer.net == net)
