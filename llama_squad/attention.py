"""Attention in blocks on a CPU, for masks that leave most of a long row dark.

A row of training holds several paragraphs, and a paragraph's questions do not see each other, but
``sdpa`` computes every query against every key before it applies the mask: half of a training
step of a small model (``benchmarks/RESULTS.md``). Here a row's queries are cut where the mask
allows it, and each block is run against the keys alone that it sees. The result is the same sum
without its zeros. Uses torch and transformers only; ``tree.make_masks`` marks the masks.
"""

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK_TOKENS = 384
"""Queries of a block, at most: a paragraph with its questions has 285 tokens on average."""

_BLOCKS = "llama_squad_blocks"

Block = tuple[slice, torch.Tensor | slice, torch.Tensor]
"""Queries, keys, and the mask of both."""


def mark_blocks(visible: torch.Tensor, block_tokens: int | None = None) -> torch.Tensor:
    """Return a mask which ``sdpa`` attention takes in blocks, where it is on a CPU and long.

    Args:
        visible: bool, of shape (rows, 1, queries, keys).
        block_tokens: queries of a block, at most; ``BLOCK_TOKENS`` where None.
    """
    limit = block_tokens or BLOCK_TOKENS
    if visible.device.type == "cpu" and visible.shape[2] > limit:
        setattr(visible, _BLOCKS, _blocks(visible, limit))
    return visible


def blocks_of(mask: torch.Tensor | None) -> list[Block] | None:
    """Return the blocks that a mask was marked with; None where it was not."""
    return getattr(mask, _BLOCKS, None)


def _blocks(visible: torch.Tensor, block_tokens: int) -> list[Block]:
    blocks = []
    for begin, end in _spans(visible.any(0)[0], block_tokens):
        mask = visible[:, :, begin:end]
        index = mask.any(2).any(0)[0].nonzero()[:, 0]
        first, stop = int(index[0]), int(index[-1]) + 1
        # a slice is a view, an index is a copy
        keys = slice(first, stop) if stop - first == len(index) else index
        blocks.append((slice(begin, end), keys, mask[..., keys].contiguous()))
    return blocks


def _spans(seen: torch.Tensor, block_tokens: int) -> list[tuple[int, int]]:
    """Cut a row's queries into spans, best where no later query sees the keys before the cut.

    Args:
        seen: bool, of shape (queries, keys).
        block_tokens: the length of a span, at most.
    """
    queries, keys = seen.shape
    order = torch.arange(1, queries + 1)
    until = (seen * order[:, None]).amax(0)[keys - queries :]  # the last query that sees a key
    until[: int((until == queries).long().cumprod(0).sum())] = 0  # what all share is no obstacle
    apart = (until.cummax(0).values <= order).nonzero()[:, 0] + 1
    spans, begin = [], 0
    while begin < queries:
        near = apart[(apart > begin) & (apart <= begin + block_tokens)]
        end = int(near[-1]) if len(near) else min(begin + block_tokens, queries)
        spans.append((begin, end))
        begin = end
    return spans


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run transformers' ``sdpa`` attention, in blocks where the mask is marked.

    Args:
        module: the layer's attention.
        query: of shape (rows, heads, queries, width).
        key: of shape (rows, key heads, keys, width).
        value: like ``key``.
        attention_mask: of shape (rows, 1, queries, keys).
        kwargs: what ``sdpa_attention_forward`` takes.
    """
    blocks = blocks_of(attention_mask)
    if blocks is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = [
        sdpa_attention_forward(
            module, query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, **kwargs
        )[0]
        for rows, keys, mask in blocks
    ]
    return torch.cat(parts, dim=1), None


ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
