"""What may be said in reply: free speech, a span of the context, or a constraint of your own.

A constraint says how every reply opens, and makes a ``Grammar`` for each context: where a reply
begins, which tokens may follow, and how the complete ones are read. The search and its batches know
nothing else of it. A new one is a class with these attributes, which is given to
``Generator(decoding=...)`` or named in ``CONSTRAINTS``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from llama_squad.answers import NO_ANSWER, answer_is_closed, format_answer
from llama_squad.calibration import Abstention
from llama_squad.decoding.boundaries import Boundaries, find_span
from llama_squad.decoding.replies import Reply, Span
from llama_squad.decoding.search import Closing, Hypothesis, State, Successors
from llama_squad.decoding.spans import SpanGrammar, SpanVocabulary, span_vocabulary
from llama_squad.encoding import ChatEncoder


class Grammar(Protocol):
    """The replies to the questions of one context."""

    start: State
    """Of an empty reply (after the constraint's header)."""

    def successors(self, state: State) -> Successors:
        """Return the tokens that may follow."""

    def step(self, ids: Sequence[int], target: Any) -> State | Closing | None:
        """Return where a reply stands after its tokens, of which ``target`` came with the last.

        A ``Closing`` where that token ends what is searched for; None where those tokens are no
        reply.
        """

    def read(
        self, found: Sequence[Hypothesis], alternative: float, pruned_log_prob: float
    ) -> Reply:
        """Return the reply, given the complete hypotheses, the best first.

        Args:
            found: they may be none, where the search gave all up.
            alternative: log P of the constraint's ``alternative``.
            pruned_log_prob: that of the likeliest hypothesis that the search gave up.
        """


class Constraint(Protocol):
    """What replies may be, for one tokenizer."""

    header: Sequence[int]
    """Tokens that open every reply: they are made part of the prompt and cost no step."""

    reserve: int
    """Tokens of a reply beside those that are searched for, at most: its header and its end."""

    alternative: Sequence[int]
    """A whole reply, after the header, whose log-probability is wanted beside; it may be empty."""

    opening: Sequence[int]
    """A token with which most replies begin, run along with the question; it may be empty."""

    ranked: bool
    """A complete reply must be among the ``num_beams`` best of its length, as in ``generate``; and
    one reply is looked for, however large ``n_best`` is."""

    truncates: bool
    """A reply that reaches its longest is complete as it is; else it is given up."""

    windowed: bool
    """A long context may be read in windows: its replies tell a best span to compare."""

    def width(self, num_beams: int) -> int:
        """Return how many continuations of a hypothesis to keep."""

    def grammar(self, context: str) -> Grammar:
        """Return the grammar of one context's replies."""


class FreeSpeech:
    """Any tokens, up to one that ends a turn. It is its own grammar, whatever the context.

    Args:
        tokenizer: reads them.
        stop_ids: tokens that end a turn.
        stop_after_answer: a reply also ends with the fence of its answer.
    """

    header: Sequence[int] = ()
    reserve = 0
    alternative: Sequence[int] = ()
    opening: Sequence[int] = ()
    ranked = True
    truncates = True
    windowed = False
    start: State = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        stop_after_answer: bool = False,
    ) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._stop_after_answer = stop_after_answer

    def width(self, num_beams: int) -> int:
        """Room for each beam's own continuation, however many ends of turn are likelier."""
        return num_beams + len(self._stop_ids)

    def grammar(self, context: str) -> Grammar:
        """Return this; see ``Constraint``."""
        return self

    def successors(self, state: State) -> Successors:
        """Return any token; see ``Grammar``."""
        return Successors(None)

    def step(self, ids: Sequence[int], target: Any) -> State | Closing | None:
        """End where a turn ends, or the answer's fence; see ``Grammar``."""
        ends = ids[-1] in self._stop_ids or (self._stop_after_answer and self._closes(ids))
        return Closing() if ends else self.start

    def _closes(self, ids: Sequence[int]) -> bool:
        """Tell whether the last token closes the answer's fence, however that is tokenized."""
        # Only a token with a backtick can; the whole is decoded for those alone.
        return "`" in self._text(ids[-1:]) and answer_is_closed(self._text(ids))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def read(
        self, found: Sequence[Hypothesis], alternative: float, pruned_log_prob: float
    ) -> Reply:
        """Return the reply as it is; see ``Grammar``."""
        ids = list(found[0].ids)
        said = ids[:-1] if ids[-1] in self._stop_ids else ids
        return Reply(self._text(said), ids, found[0].log_prob)


class Spans:
    """A span of the context, or the abstention where that is likelier."""

    ranked = False
    truncates = False
    windowed = True

    def __init__(
        self, vocabulary: SpanVocabulary, boundaries: Boundaries, abstention: Abstention
    ) -> None:
        self.vocabulary = vocabulary
        self._boundaries, self._abstention = boundaries, abstention
        self.header: Sequence[int] = vocabulary.header
        tail = max(len(vocabulary.no_answer), *map(len, vocabulary.tails.values()))
        self.reserve = len(vocabulary.header) + tail
        self.alternative: Sequence[int] = vocabulary.no_answer
        self.opening: Sequence[int] = vocabulary.lead if len(vocabulary.lead) == 1 else ()

    def width(self, num_beams: int) -> int:
        """Four continuations per beam; see ``Constraint``."""
        return 4 * num_beams

    def grammar(self, context: str) -> Grammar:
        """Return the grammar of the context's spans; see ``Constraint``."""
        return _SpansOf(self.vocabulary, context, self._boundaries, self._abstention)


class _SpansOf(SpanGrammar):
    """The spans of one context, and how a reply that holds one is read."""

    def __init__(
        self,
        vocabulary: SpanVocabulary,
        context: str,
        boundaries: Boundaries,
        abstention: Abstention,
    ) -> None:
        super().__init__(vocabulary, context, boundaries)
        self._boundaries, self._abstention = boundaries, abstention

    def step(self, ids: Sequence[int], target: Any) -> State | Closing | None:
        """Go on in the span, or close it; see ``Grammar``."""
        if not isinstance(target, int):
            return tuple(target)
        text = self.read_span(ids, target)
        return Closing(self._vocabulary.tails[target], text) if text != NO_ANSWER else None

    def read(
        self, found: Sequence[Hypothesis], alternative: float, pruned_log_prob: float
    ) -> Reply:
        """Weigh the best span against the abstention; see ``Grammar``."""
        spans = [
            Span(h.text, h.log_prob, find_span(self._context, h.text, self._boundaries))
            for h in found
        ]
        best = spans[0] if spans else None
        na_prob = self._abstention.calibration(alternative - best.score) if best else 1.0
        text, ids, score = NO_ANSWER, list(self._vocabulary.no_answer), alternative
        if best and na_prob <= self._abstention.threshold:
            text, ids, score = best.text, list(found[0].ids), best.score
        proven = best is not None and pruned_log_prob <= best.score
        ranked = sorted(spans, key=lambda span: -span.score)
        return Reply(
            format_answer(text), self._vocabulary.header + ids, score,
            best, tuple(ranked), alternative, na_prob, proven,
        )  # fmt: skip


def _free(
    encoder: ChatEncoder, stop_ids: frozenset[int], *, stop_after_answer: bool, **_: Any
) -> Constraint:
    return FreeSpeech(encoder.tokenizer, stop_ids, stop_after_answer)


def _span(
    encoder: ChatEncoder,
    stop_ids: frozenset[int],
    *,
    span_boundaries: Boundaries,
    abstention: Abstention,
    **_: Any,
) -> Constraint:
    return Spans(span_vocabulary(encoder), span_boundaries, abstention)


CONSTRAINTS: Mapping[str, Callable[..., Constraint]] = {"free": _free, "span": _span}
"""The values of ``--decoding`` → what makes the constraint of an encoder, given the tokens that end
a reply, ``span_boundaries``, ``abstention`` and ``stop_after_answer``."""
