"""Attention in blocks on a CPU, for masks that leave most of a long row dark.

A row of training holds several paragraphs, and a paragraph's questions do not see each other, but
``sdpa`` computes every query against every key before it applies the mask: half of a training
step of a small model (``benchmarks/RESULTS.md``). Here a row's queries are cut where the mask
allows it, and each block is run against the keys alone that it sees. The result is the same sum
without its zeros. Where gradients are taken (``Products``), and in bfloat16, where torch's own
took twice as long (on an AMD EPYC), a block is two matrix products and a softmax.
``tree.make_masks`` marks the masks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_squad.products import sums_in_float32

BLOCK_TOKENS = 256
"""Queries of a block, at most: a paragraph with its questions has 285 tokens on average."""

SMALL_BLOCK = 64
"""The same where no gradient is taken in bfloat16: the scores of a block stay in a core's cache."""

_BLOCKS = "llama_squad_blocks"
_NUMBERS = "llama_squad_numbers"

Block = tuple[slice, torch.Tensor | slice, torch.Tensor]
"""Queries, keys, and the mask of both."""


def mark_blocks(
    visible: torch.Tensor, block_tokens: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return a mask which ``sdpa`` attention takes in blocks, where it is on a CPU and long.

    Args:
        visible: bool, of shape (rows, 1, queries, keys).
        block_tokens: queries of a block, at most; where None, what is best here.
        dtype: of the queries and keys.
    """
    small = not torch.is_grad_enabled() and _by_products(dtype)
    limit = block_tokens or (SMALL_BLOCK if small else BLOCK_TOKENS)
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
        # a copy: a view would keep the row's whole mask, which holds these blocks
        seen = mask[..., keys].clone(memory_format=torch.contiguous_format)
        blocks.append((slice(begin, end), keys, seen))
    return blocks


def _spans(seen: torch.Tensor, block_tokens: int) -> list[tuple[int, int]]:
    """Cut a row's queries into spans, best where no later query sees the keys before the cut.

    Args:
        seen: bool, of shape (queries, keys).
        block_tokens: the length of a span, at most.
    """
    queries, keys = seen.shape
    order = torch.arange(1, queries + 1)
    # the last query that sees a key: each sees its own
    until = queries - seen[:, keys - queries :].flip(0).view(torch.uint8).argmax(0)
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
        return _sdpa(module, query, key, value, attention_mask, **kwargs), None
    plain = (
        torch.is_grad_enabled()
        and query.requires_grad
        and query.dtype == key.dtype == value.dtype  # else autocast has a say
        and not kwargs.get("dropout")
    )
    if plain:
        return Products.apply(query, key, value, blocks, kwargs.get("scaling")), None
    parts = [
        _sdpa(module, query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, **kwargs)
        for rows, keys, mask in blocks
    ]
    return torch.cat(parts, dim=1), None


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Run ``sdpa`` attention; without gradients on a CPU, heads that share keys as one.

    There, transformers copies the keys for each head, and torch turns the mask to numbers in each
    layer: as much work as a short pass over a long cache is in all.

    Returns:
        what is attended to, of shape (rows, queries, heads, width).
    """
    more = ("position_bias", "softcap", "cache")
    if (
        mask is None
        or mask.dtype != torch.bool
        or mask.device.type != "cpu"
        or mask.shape[1:3] != (1, query.shape[2])
        or torch.is_grad_enabled()
        or any(kwargs.get(name) is not None for name in more)
        or kwargs.get("dropout")
    ):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    rows, heads, queries, width = query.shape
    together = _heads_together(query, key.shape[1])
    alike = query.dtype == key.dtype == value.dtype
    # of more queries the scores are large, which torch's own never holds as a whole
    if alike and queries <= SMALL_BLOCK and _by_products(query.dtype):
        scaling = _scaling(width, kwargs.get("scaling"))
        with torch.autocast("cpu", enabled=False):  # which would round the scores
            shares = _shares(together, key.flatten(0, 1), mask, scaling)
            found = torch.bmm(shares, value.flatten(0, 1)).unflatten(0, (rows, -1))
    else:
        found = F.scaled_dot_product_attention(
            together.unflatten(0, (rows, -1)),
            key,
            value,
            attn_mask=_added(mask, heads // key.shape[1], query.dtype),
            scale=kwargs.get("scaling"),
        )
    # some models take a view of it
    return found.view(len(found), heads, queries, -1).transpose(1, 2).contiguous()


def _added(mask: torch.Tensor, times: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask as numbers to add to the scores of several heads at once.

    It is made for the first layer, and kept with the mask for the others.
    """
    kept: torch.Tensor | None = getattr(mask, _NUMBERS, None)
    if kept is None or kept.dtype != dtype or kept.shape[2] != times * mask.shape[2]:
        kept = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        kept = kept.repeat(1, 1, times, 1)
        setattr(mask, _NUMBERS, kept)
    return kept


class Products(torch.autograd.Function):
    """Attention as three products a block, for gradients: torch's own is slow backward on a CPU.

    Scores and their softmax are in float32 at least, as in torch's own; the probabilities are kept
    for the gradient, in the type of the query.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # torch gives them by position
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: list[Block],
        scaling: float | None,
    ) -> torch.Tensor:
        """Return what is attended to, of shape (rows, queries, heads, width)."""
        rows, heads, queries, width = query.shape
        ctx.scaling = _scaling(width, scaling)
        ctx.blocks = blocks
        found = query.new_empty(rows, queries, heads, value.shape[-1])
        kept = []
        with torch.autocast("cpu", enabled=False):
            for places, keys, mask in blocks:
                part = _heads_together(query[:, :, places], key.shape[1])
                shares = _shares(part, key[:, :, keys].flatten(0, 1), mask, ctx.scaling)
                kept.append(shares)
                seen = torch.bmm(shares, value[:, :, keys].flatten(0, 1))
                found[:, places] = seen.view(rows, heads, -1, seen.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, *kept)
        return found

    @staticmethod
    @once_differentiable  # the probabilities are constants to a second gradient
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, *kept = ctx.saved_tensors
        given = gradients[0].transpose(1, 2)
        of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
        for (places, keys, _), shares in zip(ctx.blocks, kept, strict=True):
            asked = _heads_together(query[:, :, places], key.shape[1])
            part = _heads_together(given[:, :, places], key.shape[1])
            told, held = (x[:, :, keys].flatten(0, 1) for x in (key, value))
            moved = torch._softmax_backward_data(part @ held.mT, shares, -1, shares.dtype)
            # scaled where that is the least to do
            of_query[:, :, places] = (moved @ told).view_as(of_query[:, :, places]) * ctx.scaling
            _add(of_key, keys, moved.mT @ asked * ctx.scaling)
            _add(of_value, keys, shares.mT @ part)
        return of_query, of_key, of_value, None, None


def _add(total: torch.Tensor, keys: torch.Tensor | slice, part: torch.Tensor) -> None:
    """Add what is of a block's keys, of shape (rows * key heads, keys, width)."""
    part = part.view(*total.shape[:2], *part.shape[1:])
    if isinstance(keys, slice):
        total[:, :, keys] += part
    else:
        total.index_add_(2, keys, part)


def _heads_together(x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Let the heads that share keys be one product, of shape (rows * key heads, tokens, width)."""
    rows, heads, tokens, width = x.shape
    return x.reshape(rows * key_heads, heads // key_heads * tokens, width)


def _by_products(dtype: torch.dtype) -> bool:
    """Tell whether products are faster than torch's own attention, on a CPU and without gradients.

    With AMX, which torch's own uses, they are not: answers take 4 to 15 % longer.
    """
    units = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and units


def _scaling(width: int, scaling: float | None) -> float:
    return width**-0.5 if scaling is None else scaling


def _shares(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return how much of each key a query takes, in the type of the query."""
    wide = torch.promote_types(query.dtype, torch.float32)
    with sums_in_float32(query.dtype):
        scores = torch.bmm(query.to(wide), key.to(wide).mT)
    scores.mul_(scaling).view(mask.shape[0], -1, *mask.shape[2:]).add_(_added(mask, 1, wide))
    return torch.softmax(scores, -1, out=scores).to(query.dtype)  # in place: memory is slow


ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
