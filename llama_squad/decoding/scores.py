"""From logits to what a search is told: the likeliest tokens, and log-probabilities."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from llama_squad.decoding.search import Hypothesis, Successors
from llama_squad.tree import NO_NUMBERS


def complete(
    nodes: Sequence[tuple[Hypothesis, int]], logits: torch.Tensor, norms: torch.Tensor
) -> None:
    """Complete closing hypotheses, given each one's first row of the logits.

    The log-probabilities of their tails are added.
    """
    if not nodes:
        return
    # one transfer for all of them
    rows = [first + i for node, first in nodes for i in range(len(node.forced_suffix))]
    ids = torch.tensor([[i] for node, _ in nodes for i in node.forced_suffix])
    scores = (logits[rows].gather(1, ids.to(logits.device)) - norms[rows]).flatten().tolist()
    offset = 0
    for node, _ in nodes:
        tail = node.forced_suffix
        total = math.fsum(scores[offset : offset + len(tail)])
        node.children = [
            replace(node, log_prob=node.log_prob + total, ids=(*node.ids, *tail),
                    kind="complete", forced_suffix=())
        ]  # fmt: skip
        offset += len(tail)


def likeliest(
    following: Sequence[Successors],
    logits: torch.Tensor,
    norms: torch.Tensor,
    most: int | None,
) -> list[list[tuple[float, int, Any]]]:
    """Return the likeliest of the tokens that may follow: log P, token and target, best first.

    Args:
        following: of each hypothesis; either all of them admit any token, or none does.
        logits: of shape (hypotheses, vocabulary), and
        norms: their log-sums of exponentials, of shape (hypotheses, 1).
        most: how many of each; None: all.
    """
    if following[0].ids is None:
        top = logits.topk(min(most or logits.shape[-1], logits.shape[-1]))
        rows = zip((top.values - norms).tolist(), top.indices.tolist(), strict=True)
        return [[(value, i, None) for value, i in zip(*row, strict=True)] for row in rows]
    listed = [found.ids or [] for found in following]
    width = max(map(len, listed))
    padded = torch.tensor([ids + [-1] * (width - len(ids)) for ids in listed])
    padded = padded.to(logits.device)
    allowed = logits.gather(1, padded.clamp(min=0)) - norms
    allowed.masked_fill_(padded < 0, -math.inf)
    top = allowed.topk(min(most or width, width))
    return [
        [
            (value, ids[i], found.targets[i])
            for value, i in zip(values, indices, strict=True)
            if value > -math.inf
        ]
        for found, ids, values, indices in zip(
            following, listed, top.values.tolist(), top.indices.tolist(), strict=True
        )
    ]


def log_norms(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-sum of exponentials of each row of logits, of shape (rows, 1).

    Raises:
        ValueError: they are no numbers, which no search can be made by.
    """
    norms = logits.logsumexp(-1, keepdim=True)
    if not norms.isfinite().all():
        raise ValueError(NO_NUMBERS)
    return norms


def token_scores(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probability of each token, given logits of shape (..., tokens, vocabulary)."""
    index = torch.tensor(ids, device=logits.device).expand(logits.shape[:-1])
    return logits.gather(-1, index[..., None]).squeeze(-1) - logits.logsumexp(-1)
