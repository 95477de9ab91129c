"""Attention of a packed row, computed record by record.

Everything but attention works token by token and takes a packed row as it is. Attention over the whole row, with a
mask that hides the other records, would spend most of its time on pairs that the mask then throws away. Here the row's
queries, keys and values are laid out as a batch of records for attention alone, and laid back afterwards.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "allmend_packed"


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    slots: torch.Tensor,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` over records.

    Args:
        module: the attention layer.
        query: [1, heads, T, size].
        key: [1, key heads, T, size].
        value: the same.
        attention_mask: additive, [records, 1, longest, longest].
        slots: int64 [T]: where each of the row's tokens lies in records × longest.
        settings: `sdpa`'s own.

    Returns:
        [1, T, heads, size], and None for the weights.
    """
    records, longest = attention_mask.shape[0], attention_mask.shape[-1]

    def laid_out(packed: torch.Tensor) -> torch.Tensor:
        tokens = packed[0].transpose(0, 1)
        empty = tokens.new_zeros(records * longest, *tokens.shape[1:])
        places = empty.index_copy(0, slots, tokens).view(records, longest, *tokens.shape[1:])
        return places.transpose(1, 2)

    found, _ = sdpa_attention_forward(
        module, laid_out(query), laid_out(key), laid_out(value), attention_mask, **settings
    )
    return found.flatten(0, 1).index_select(0, slots)[None], None


AttentionInterface.register(_NAME, _packed_attention)


def packs(model: Any) -> bool:
    """Whether a model takes its attention from transformers' interface, so that ours can stand in."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(base, "_supports_attention_backend", False)) and base.config._attn_implementation == "sdpa"


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Calls of `model` in this context take `slots=` and a mask of records (see `_packed_attention`)."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
