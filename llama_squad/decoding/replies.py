"""What decoding takes and gives: a paragraph's prompts, a reply, a span."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A span and its score: log P(reply that holds it), from after the forced header to the end.

    Of an extractive model the score is a sum of logits.
    ``start`` is the character of the context at which it first stands as a span may.
    """

    text: str
    score: float
    start: int | None = None


@dataclass(frozen=True)
class Reply:
    """What the model says to one question.

    Attributes:
        completion: the whole reply, without the token that ends the turn.
        token_ids: its tokens, with the token that ends the turn.
        score: its log-probability: in span decoding given the forced header (the tokens of
            ``ANSWER_HEADER`` up to the colon), through the end of the turn; in free decoding of
            all its tokens. None where nobody tells (servers).
        best: the span that the search found first (span decoding; None where the context holds
            none). Its score is that of its likeliest tokens; other ways to spell it are
            not added.
        spans: the ``n_best`` likeliest spans, best first. Of more than one, the first may beat
            ``best``, where ``num_beams`` was too few to find it.
        no_answer_score: log P of the reply that abstains, scored over the same stretch.
        na_prob: sigmoid(no_answer_score - best.score): the chance of "no answer" if it is
            that or the best span. None in free decoding.
        proven_best: no reply that ``num_beams`` cut off could have been better.
    """

    completion: str
    token_ids: list[int]
    score: float | None
    best: Span | None = None
    spans: tuple[Span, ...] = ()
    no_answer_score: float | None = None
    na_prob: float | None = None
    proven_best: bool = False


@dataclass(frozen=True)
class Paragraph:
    """The questions of one context: the ids of each one's prompt, ready for the reply."""

    context: str
    prompts: Sequence[list[int]]
    adapter_from: Sequence[int] = ()
    """The first token of each prompt that an activated adapter acts on; empty where that acts on
    none of them."""
    hidden: Sequence[range] = ()
    """Which tokens of each prompt are filler; empty where there is none."""
    prefix: int = 0
    """So many tokens other paragraphs' prompts begin with, too: run once for all of them, but for
    those with long contexts."""
    stem: int = 0
    """So many tokens stand before the questions, and are kept for the next ones about this context;
    0: nothing is kept."""
