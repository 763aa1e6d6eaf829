"""The grammar of span decoding: which tokens may follow in a reply that holds a span.

A reply is ``ANSWER_HEADER + escape_answer(span) + ANSWER_FOOTER``. The tokens of the header up to
the colon are always the same and are forced; what is left of it (the *lead*, `` "``) may merge with
the answer's first characters, and the answer's last characters may merge with the closing quote.
Here the tokens of a vocabulary are laid along the bytes of the escaped context, so any sequence of
tokens that spells a reply is found, for byte-level and SentencePiece vocabularies alike. What
follows the closing quote is forced again.

Nothing here needs the model: ``SpanVocabulary`` is made once a tokenizer, ``SpanGrammar`` once a
paragraph (a few milliseconds).
"""

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_squad.answers import (
    ANSWER_FOOTER,
    ANSWER_HEADER,
    NO_ANSWER,
    escape_answer,
    format_answer,
)
from llama_squad.decoding.boundaries import (
    Boundaries,
    holds_word,
    is_word_boundary,
    normalized_chars,
)
from llama_squad.decoding.search import State, Successors
from llama_squad.decoding.spelling import token_bytes, unicode_form
from llama_squad.encoding import IGNORE, ChatEncoder

# A state (see ``SpanGrammar``) of a span that has not begun, and the mark of one without a word.
_FRESH: State = ()
_BARE = -(2**62)

# Replies whose tokens show where this tokenizer merges the quotes with what is inside of them.
_PROBES = [
    NO_ANSWER,
    "a",
    "B",
    "1",
    "é",
    "中",
    *"!#$%&'()*+,-./:;<=>@[]^_`{|}~–’”",
    '"',
    "\\",
    "\n1",
]


@dataclass(frozen=True)
class _Matches:
    """Tokens by the bytes of the span that they spell."""

    inside: Mapping[bytes, int]  # the span goes on after them
    closing: Mapping[bytes, list[tuple[int, int]]]  # (token, bytes of the footer it spells too)
    lengths: Mapping[int, list[int]]  # first byte → lengths of ``inside``
    closing_lengths: list[int]

    @classmethod
    def build(cls, tokens: Mapping[bytes, int], ends: Sequence[int]) -> "_Matches":
        """Index the tokens, which may end with the first ``ends`` bytes of the footer."""
        footer = ANSWER_FOOTER.encode()
        lengths: dict[int, set[int]] = defaultdict(set)
        closing: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        for spelled, token_id in tokens.items():
            if spelled:
                lengths[spelled[0]].add(len(spelled))
            for end in ends:
                if spelled.endswith(footer[:end]):
                    closing[spelled[: len(spelled) - end]].append((token_id, end))
        return cls(
            {spelled: token_id for spelled, token_id in tokens.items() if spelled},
            dict(closing),
            {byte: sorted(found) for byte, found in lengths.items()},
            sorted({len(head) for head in closing}),
        )


class SpanVocabulary:
    """How one tokenizer spells replies.

    Attributes:
        header: token ids that open every reply, forced.
        no_answer: the ids that follow them where the reply is ``NO_ANSWER``, through the end of
            the turn, as in training.
        tails: bytes of the footer that the closing token spells → the forced ids after it,
            through the end of the turn.
        lead: ids of the lead, where the answer begins with a letter.
        form: the Unicode form that the tokenizer brings texts into; None where it leaves them.

    Raises:
        ValueError: the spelling of this tokenizer's tokens is not known, or it does not open all
            replies with the same tokens.
    """

    def __init__(self, encoder: ChatEncoder) -> None:
        self._bytes = token_bytes(encoder.tokenizer)
        self.form = unicode_form(encoder.tokenizer)
        replies = {probe: reply_ids(encoder, probe) for probe in _PROBES}
        self.header, lead_text = self._split_header(replies[NO_ANSWER])
        size = len(self.header)
        if any(ids[:size] != self.header for ids in replies.values()):
            raise ValueError(
                "this tokenizer opens replies with different tokens: use free decoding"
            )
        self.no_answer = replies[NO_ANSWER][size:]
        self.tails: dict[int, list[int]] = {}
        for probe, ids in replies.items():
            self._learn_tail(probe, ids[size:], len(lead_text))
        self.lead_text = lead_text
        self.lead = self._lead(replies["a"][size:])
        tokens = _spellings(self._bytes)
        ends = sorted(self.tails)
        self.plain = _Matches.build(tokens, ends)
        # For each rest of the lead: the tokens that end within it, and those that reach beyond.
        self.within: dict[int, list[tuple[int, int]]] = {}
        self.beyond: dict[int, _Matches] = {}
        for left in range(1, len(lead_text) + 1):
            rest = lead_text[-left:]
            self.within[left] = [
                (tokens[rest[:n]], left - n) for n in range(1, left + 1) if rest[:n] in tokens
            ]
            longer = {s[left:]: t for s, t in tokens.items() if len(s) > left and s[:left] == rest}
            self.beyond[left] = _Matches.build(longer, ends)

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that tokens stand for (control tokens: none)."""
        return b"".join(self._bytes.get(token_id, b"") for token_id in ids)

    def _split_header(self, ids: Sequence[int]) -> tuple[list[int], bytes]:
        """Return the leading tokens that end at or before the header's colon, and the lead."""
        header = ANSWER_HEADER.encode()
        spelled = self.to_bytes(ids)
        start = spelled.find(header)
        if start < 0:
            raise ValueError(
                f"the tokens of a reply spell {spelled!r}: span decoding does not know this kind "
                "of tokenizer, use --decoding free"
            )
        count = 0
        while len(self.to_bytes(ids[: count + 1])) <= start + len(header) - 2:
            count += 1
        return list(ids[:count]), spelled[len(self.to_bytes(ids[:count])) : start + len(header)]

    def _learn_tail(self, probe: str, ids: Sequence[int], lead: int) -> None:
        closing = lead + len(escape_answer(probe).encode())
        for count in range(1, len(ids)):
            end = len(self.to_bytes(ids[:count])) - closing
            if end > 0:
                self.tails.setdefault(end, list(ids[count:]))
                return

    def _lead(self, ids: Sequence[int]) -> list[int]:
        count = 0
        while len(self.to_bytes(ids[: count + 1])) <= len(self.lead_text):
            count += 1
        return list(ids[:count])


@functools.lru_cache(maxsize=4)
def span_vocabulary(encoder: ChatEncoder) -> SpanVocabulary:
    """Return the encoder's ``SpanVocabulary``, made once (a second or two)."""
    return SpanVocabulary(encoder)


def reply_ids(encoder: ChatEncoder, text: str) -> list[int]:
    """Return the ids of the reply that answers ``text``, through the end of the turn."""
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": format_answer(text)},
    ]
    return [label for label in encoder.encode([messages])[0]["labels"] if label != IGNORE]


def _spellings(spelled: Mapping[int, bytes]) -> dict[bytes, int]:
    """Return one token for each spelling: of two, the one of more characters in the vocabulary.

    SentencePiece has a byte token beside the ordinary one for each ASCII character: the ordinary
    one, which the tokenizer itself writes, comes later in the vocabulary.
    """
    return {text: token_id for token_id, text in sorted(spelled.items()) if text}


class SpanGrammar:
    """The replies that are spans of one context.

    A state holds the byte offsets of the escaped context at which the span may go on, after
    ``_BARE`` while it holds no word yet (no letter or digit; where boundaries are "any", no whole
    character); it is ``()`` at the span's start (anywhere), and ``(-n,)`` while n bytes of the lead
    are due. A target is the next state's offsets (a list), or an int where the token closes the
    string: how many bytes of the footer it spells.

    A tokenizer that normalises texts spelled them so in training: a span is spelled in that form,
    and read as it stands in the context.

    Args:
        vocabulary: the tokenizer's.
        context: what the spans are substrings of.
        boundaries: where they may begin and end.
    """

    def __init__(
        self, vocabulary: SpanVocabulary, context: str, boundaries: Boundaries = "any"
    ) -> None:
        self._vocabulary, self._context = vocabulary, context
        chars = normalized_chars(context, vocabulary.form)
        chunks = [escape_answer(char).encode() for char in chars]
        self._text = b"".join(chunks)
        self._as_it_is = chars == list(context)
        self._ends = bytearray(len(self._text) + 1)
        # How many of the characters that a span must hold one of end up to each byte.
        counts = holds_word if boundaries == "word" else bool
        self._words = [0] * (len(self._text) + 1)
        self._starts = []
        self._places = {len(self._text): len(context)}  # bytes before a character → its index
        offset = count = 0
        edges = [boundaries == "any" or is_word_boundary(context, at)
                 for at in range(len(context) + 1)]  # fmt: skip
        for index, (char, chunk) in enumerate(zip(context, chunks, strict=True)):
            if not char.isspace():
                if edges[index] and chunk:  # or it is part of the character before it
                    self._starts.append(offset)
                self._ends[offset + len(chunk)] = edges[index + 1]
            if chunk:
                self._places[offset] = index
            self._words[offset : offset + len(chunk)] = [count] * len(chunk)
            offset, count = offset + len(chunk), count + counts(char)
        self._words[offset] = count
        self._last_end = max(0, self._ends.rfind(1))
        self.start: State = (-len(vocabulary.lead_text),) if vocabulary.lead_text else _FRESH
        self.successors = functools.cache(self._successors)

    def read_span(self, ids: Sequence[int], closing: int) -> str:
        """Return the span that tokens after the header spell, up to the one that closes it.

        ``closing`` is that token's target: how many bytes of the footer it spells. The span is
        the context's own text, in whatever Unicode form.
        """
        vocabulary = self._vocabulary
        spelled = vocabulary.to_bytes(ids)[len(vocabulary.lead_text) : -closing]
        if self._as_it_is:
            return json.loads(b'"' + spelled + b'"')
        start = self._text.find(spelled)
        while start not in self._starts or not self._ends[start + len(spelled)]:
            start = self._text.index(spelled, start + 1)
        return self._context[self._places[start] : self._places[start + len(spelled)]]

    def accepts(self, ids: Sequence[int]) -> bool:
        """Tell whether the tokens after the header, through the end of the turn, are a reply."""
        state = self.start
        for index, token_id in enumerate(ids):
            found = self.successors(state)
            targets = dict(zip(found.ids or [], found.targets, strict=True))
            if token_id not in targets:
                return False
            target = targets[token_id]
            if isinstance(target, int):
                return list(ids[index + 1 :]) == self._vocabulary.tails[target]
            state = tuple(target)
        return False

    def _successors(self, state: State) -> Successors:
        inside: dict[int, list[int]] = {}
        closing: dict[int, int] = {}
        if state and _BARE < state[0] < 0:
            left = -state[0]
            for token_id, rest in self._vocabulary.within[left]:
                inside[token_id] = [-rest] if rest else []
            self._match(self._vocabulary.beyond[left], self._starts, True, inside, closing)
        elif state == _FRESH:
            self._match(self._vocabulary.plain, self._starts, True, inside, closing)
        else:
            bare = state[0] == _BARE
            offsets = state[1:] if bare else state
            self._match(self._vocabulary.plain, offsets, bare, inside, closing)
            # A span that has begun mostly goes on, and a tokenizer mostly takes what is longest.
            longest = max(inside.items(), key=lambda item: item[1][-1], default=None)
            guess = None if longest is None else list(inside).index(longest[0])
            return Successors([*inside, *closing], [*inside.values(), *closing.values()], guess)
        return Successors([*inside, *closing], [*inside.values(), *closing.values()])

    def _match(
        self,
        matches: _Matches,
        offsets: Sequence[int],
        bare: bool,
        inside: dict[int, list[int]],
        closing: dict[int, int],
    ) -> None:
        """Lay tokens along the context from each offset (``bare``: the span holds no word yet).

        Spans of the same bytes hold the same words, so all offsets of a token agree on ``_BARE``.
        """
        text, tokens, closers = self._text, matches.inside, matches.closing
        words, last = self._words, self._last_end
        for offset in offsets:
            if offset < len(text):
                for length in matches.lengths.get(text[offset], ()):
                    end = offset + length
                    token_id = tokens.get(text[offset:end])
                    if token_id is None or end > last:
                        continue
                    still = bare and words[end] == words[offset]
                    if not still or words[last] > words[end]:  # a span can yet end
                        inside.setdefault(token_id, [_BARE] * still).append(end)
            for length in matches.closing_lengths:
                end = offset + length
                if end > last or not self._ends[end]:
                    continue
                if not bare or words[end] > words[offset]:
                    closing.update(closers.get(text[offset:end], ()))
