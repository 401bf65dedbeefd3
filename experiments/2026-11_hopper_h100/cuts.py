"""The layers of the study, and the cuts of their products that are measured."""

from typing import NamedTuple


class Layer(NamedTuple):
    """A Monarch layer: net and layer as in the paper, i, o, b, r' and tokens."""

    net: str
    layer: str
    inputs: int
    outputs: int
    blocks: int
    rank: int
    tokens: int


class Stage(NamedTuple):
    """How one product is cut: see product.py; `tiles` 0 is all columns, `store` 1 by TMA, 2 by threads."""

    ctas: int
    blocks: int
    ranks: int
    depth: int
    tiles: int
    stays: bool
    slots: int
    weight_slots: int
    store: int = 1
    policies: tuple[int, int, int] = (0, 0, 0)
    products: bool = True
    loads: bool = True


class Chain(NamedTuple):
    """How a whole layer is cut: see chained.py."""

    depth: int
    ranks: int
    columns: int
    slots: int
    U_slots: int


LAYERS = {
    "qkvo": Layer("llama7b", "qkvo", 4096, 4096, 16, 64, 1024),
    "gate_up": Layer("llama7b", "gate_up", 4096, 11008, 16, 96, 1024),
    "down": Layer("llama7b", "down", 11008, 4096, 16, 96, 1024),
    "qo": Layer("llama1b", "qo", 2048, 2048, 16, 16, 1024),
    "up": Layer("llama1b", "up", 2048, 8192, 16, 48, 1024),
    "down1b": Layer("llama1b", "down", 8192, 2048, 16, 48, 1024),
    "c_attn": Layer("gpt2s", "c_attn", 768, 2304, 4, 48, 384),
    "c_fc": Layer("gpt2s", "c_fc", 768, 3072, 4, 48, 384),
    "c_proj": Layer("gpt2s", "c_proj", 3072, 768, 4, 48, 384),
    "qkv": Layer("dit_xl", "qkv", 1152, 3456, 8, 48, 16384),
    "fc1": Layer("dit_xl", "fc1", 1152, 4608, 8, 32, 16384),
}
LAST, LOW = (1, 1, 2), (1, 1, 0)  # x and V first to go, Z last or as usual; Z, U and y first to go
WIDE, HALF_WIDE = Stage(1, 1, 256, 64, 1, False, 3, 3), Stage(1, 1, 128, 64, 1, False, 6, 6)
FIRST = {
    "qkvo": [Stage(1, 4, 64, 64, 4, True, 4, 3), Stage(1, 4, 64, 64, 1, False, 3, 3)],
    "gate_up": [Stage(1, 8, 32, 64, 6, True, 4, 3), Stage(1, 8, 32, 64, 1, False, 3, 3)],
    "down": [Stage(1, 8, 32, 64, 1, False, 3, 3)],
    "qo": [Stage(1, 16, 16, 64, 1, True, 4, 3)],
    "up": [Stage(1, 16, 16, 64, 3, True, 4, 3)],
    "down1b": [Stage(1, 16, 16, 64, 1, False, 3, 3)],
    "qkv": [Stage(1, 16, 16, 32, 3, True, 5, 5)],
    "fc1": [Stage(1, 8, 32, 32, 1, True, 5, 5)],
}
CHAINS = {
    "qkvo": [Chain(64, 64, 256, 6, 2), Chain(64, 64, 256, 5, 3), Chain(64, 64, 128, 6, 3), Chain(128, 64, 256, 3, 2)],
    "down": [Chain(64, 128, 256, 4, 1)],
    "qo": [Chain(64, 16, 128, 6, 3), Chain(128, 16, 128, 4, 3), Chain(64, 16, 64, 8, 4)],
    "up": [Chain(64, 64, 256, 6, 2)],
    "down1b": [Chain(64, 64, 128, 6, 3)],
    "gate_up": [Chain(64, 128, 256, 4, 1)],
    "c_attn": [Chain(64, 64, 64, 6, 3), Chain(64, 64, 128, 6, 3)],
    "c_fc": [Chain(64, 64, 64, 6, 3), Chain(64, 64, 128, 6, 3)],
    "c_proj": [Chain(64, 64, 64, 6, 3), Chain(64, 64, 256, 6, 2)],
    "qkv": [Chain(32, 64, 256, 8, 2), Chain(16, 64, 256, 10, 2)],
    "fc1": [Chain(32, 32, 256, 8, 2), Chain(32, 32, 128, 8, 4), Chain(16, 32, 256, 10, 2)],
}
