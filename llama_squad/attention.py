"""Attention in blocks on a CPU, for masks that leave most of a long row dark.

A row of training holds several paragraphs, and a paragraph's questions do not see each other, but
``sdpa`` computes every query against every key before it applies the mask: half of a training
step of a small model (``benchmarks/RESULTS.md``). Here a row's queries are cut where the mask
allows it, and each block is run against the keys alone that it sees. The result is the same sum
without its zeros. Where gradients are taken, a block is three plain products (``Products``).
Uses torch and transformers only; ``tree.make_masks`` marks the masks.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK_TOKENS = 256
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
    # a bias is of the whole row, and a cap of the scores is what sdpa refuses
    if blocks is None or any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    plain = (
        torch.is_grad_enabled()
        and query.requires_grad
        and query.dtype == key.dtype == value.dtype  # else autocast has a say
        and not kwargs.get("dropout")
    )
    parts = []
    for rows, keys, mask in blocks:
        part = query[:, :, rows], key[:, :, keys], value[:, :, keys], mask
        if plain:
            parts.append(Products.apply(*part, kwargs.get("scaling")).transpose(1, 2))
        else:
            parts.append(sdpa_attention_forward(module, *part, **kwargs)[0])
    return torch.cat(parts, dim=1), None


class Products(torch.autograd.Function):
    """Attention as three products, for gradients: torch's own is slow backward on a CPU.

    Scores and their softmax are in float32 at least, as in torch's own; the probabilities are kept
    for the gradient, in the type of the query.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # torch gives them by position
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Return what is attended to, of shape (rows, heads, queries, width)."""
        rows, heads, queries, width = query.shape
        # the heads that share keys are one product
        together = query.reshape(-1, heads // key.shape[1] * queries, width)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        ctx.scaling = width**-0.5 if scaling is None else scaling
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            scores = torch.bmm(together.to(wide), key.to(wide).mT).mul_(ctx.scaling)
            unseen = torch.zeros(mask.shape, dtype=wide).masked_fill_(~mask, -torch.inf)
            scores.view(rows, heads, queries, -1).add_(unseen)
            shares = scores.softmax(-1).to(query.dtype)
            ctx.save_for_backward(together, key, value, shares)
            return torch.bmm(shares, value).view(rows, heads, queries, -1)

    @staticmethod
    @once_differentiable  # the probabilities are constants to a second gradient
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, shares = ctx.saved_tensors
        (given,) = gradients
        rows, heads, queries, _ = given.shape
        given = given.reshape(*query.shape[:2], -1)
        moved = torch._softmax_backward_data(given @ value.mT, shares, -1, shares.dtype)
        moved.mul_(ctx.scaling)
        found = moved @ key, moved.mT @ query, shares.mT @ given
        first, second, third = (f.view(rows, -1, *f.shape[1:]) for f in found)
        return first.reshape(rows, heads, queries, -1), second, third, None, None


ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
