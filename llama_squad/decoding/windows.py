"""Contexts that are longer than what a model reads at once: cut into windows, and put together.

A window is a stretch of the context, sized in tokens, that overlaps with the next. The question is
put to each; the answer is that of the window in which it is the least likely that there is none.
Reads and writes nothing; used by ``llama_squad.predictors``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Tokenizer

from llama_squad.decoding.boundaries import is_word_boundary
from llama_squad.decoding.replies import Reply, Span

SNAP = 40
"""A window's ends move by at most so many characters, so as not to cut a word."""


def cut_windows(
    tokenizer: Tokenizer, context: str, size: int, overlap: int
) -> list[tuple[int, int]]:
    """Return the first and last-plus-one characters of windows that cover a context, in order.

    Args:
        tokenizer: which spells control tokens in the context as plain text (``ChatEncoder.plain``).
        context: the text.
        size: tokens of a window, about: an end moves to the next word.
        overlap: tokens that a window shares with the next, at most half of ``size``; an answer
            that is not longer than this, less a word, is whole in some window.

    Raises:
        ValueError: a window of no tokens.
    """
    if size < 1:
        raise ValueError(f"a window must hold a token at least, not {size}")
    overlap = min(overlap, size // 2)
    offsets = tokenizer.encode(context, add_special_tokens=False).offsets
    windows: list[tuple[int, int]] = []
    first = 0
    while True:
        end = first + size
        start = _snap(context, offsets[first][0]) if first else 0
        if end >= len(offsets):
            return [*windows, (start, len(context))]
        windows.append((start, _snap(context, offsets[end][0])))
        first = end - overlap


def _snap(context: str, at: int) -> int:
    """Return the nearest start of a word at or before a character: after a space if one is near."""
    near = range(at, max(0, at - SNAP), -1)
    spaces = (index for index in near if context[index - 1].isspace())
    edges = (index for index in near if is_word_boundary(context, index))
    return next(spaces, None) or next(edges, at)


def merge_windows(replies: Sequence[tuple[int, Reply]], n_best: int = 1) -> Reply:
    """Return the reply to a question that was put to several windows of a context.

    It is that of the window with the lowest ``na_prob``, so it abstains only where the question has
    no answer in any window. Its spans are the ``n_best`` of all windows, by their odds against no
    answer in their own window, and scored as if they had these odds in the best one: the
    log-probabilities of two prompts do not compare.

    Args:
        replies: of span decoding, each with the character at which its window begins.
        n_best: spans to keep.
    """
    moved = [_move(reply, start) for start, reply in replies]
    best = min(moved, key=_odds)
    spans: dict[str, Span] = {}
    odds = [
        replace(span, score=span.score - reply.no_answer_score + best.no_answer_score)
        for reply in sorted(moved, key=_odds)  # the best one's first where they tie
        if reply.no_answer_score is not None and best.no_answer_score is not None
        for span in reply.spans
    ]
    for span in sorted(odds, key=lambda span: -span.score):
        spans.setdefault(span.text, span)
    certain = all(reply.proven_best for reply in moved)
    return replace(best, spans=tuple(spans.values())[:n_best], proven_best=certain)


def _odds(reply: Reply) -> float:
    """Return the log-odds of no answer (``na_prob`` itself is 0.0 or 1.0 where they are large)."""
    if reply.best is None or reply.no_answer_score is None:
        return math.inf
    return reply.no_answer_score - reply.best.score


def _move(reply: Reply, start: int) -> Reply:
    """Count a reply's spans from the context's beginning instead of its window's."""

    def moved(span: Span) -> Span:
        return replace(span, start=None if span.start is None else span.start + start)

    best = reply.best and moved(reply.best)
    return replace(reply, best=best, spans=tuple(map(moved, reply.spans)))
