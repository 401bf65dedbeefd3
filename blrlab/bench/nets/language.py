"""What GPT-2 and Llama have in common: products of a phase, and the context that it must fit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blrlab_ops import shapes

from blrlab.bench.nets.family import Product

if TYPE_CHECKING:
    from blrlab.bench.model_rows import Group


def products(linears: Mapping[str, tuple[int, int]], sizes: Any, group: "Group") -> list[Product]:
    """Return the linear layers of one call; the output layer sees the tokens that are scored, and writes logits."""
    blocks = [Product(path, *size, group.rows) for path, size in linears.items() if path != "lm_head"]
    return [*blocks, Product("lm_head", sizes.width, sizes.vocab_size, group.scored, group.scored * sizes.vocab_size)]


def tokens(sizes: Any, net: str) -> int:
    """Return the published number of tokens, at most half a context."""
    return max(1, min(shapes.layers(net)[0].tokens, sizes.context // 2))


def why_not(sizes: Any, group: "Group") -> str | None:
    """Say in one sentence why a phase is longer than the context; None where it is not."""
    needed = group.tokens + (group.phase == "decode")
    if needed > sizes.context:
        return f"the phase needs {needed} tokens and the model's context is {sizes.context}: give fewer --tokens"
    return None
