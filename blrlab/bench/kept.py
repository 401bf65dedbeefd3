"""Kept keys and values of `transformers`' models, at the same place in every call.

A `DynamicCache` would copy all it holds for every token, and a `StaticCache` moves on with every call, so that no call
could be repeated as a CUDA graph. Shapes: B batch, K heads of keys and values, T tokens, d a head's width.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Place = tuple[Tensor, Tensor]


def storage(layers: int, shape: tuple[int, int, int, int], like: Tensor) -> list[Place]:
    """Make room for keys and values [B, K, T, d] of every layer, in the dtype and on the device of a tensor."""
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]


def cache(start: int, stored: Sequence[Place | None]) -> Any:
    """Make a cache that holds `start` tokens before every call; a layer without a place only passes them through."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Fixed(DynamicLayer):
        def __init__(self, place: Place | None):
            super().__init__()
            self.place, self.is_initialized = place, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.place is None:
                return key_states, value_states
            end = start + key_states.shape[2]
            keys, values = self.place
            keys[:, :, start:end].copy_(key_states)
            values[:, :, start:end].copy_(value_states)
            return keys[:, :, :end], values[:, :, :end]

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return start

        def get_mask_sizes(self, query_length: Any, *args: Any) -> tuple[int, int]:
            # transformers 4 gives the positions, 5 their number
            return start + (query_length if isinstance(query_length, int) else len(query_length)), 0

    made: Any = DynamicCache()
    made.layers = [Fixed(place) for place in stored]
    return made
