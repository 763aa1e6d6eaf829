"""Tokens run ahead of need, and rows dropped: fewer passes, and the same replies."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from helpers import make_records, tiny_model, tiny_tokenizer

from llama_squad.answers import escape_answer
from llama_squad.decoding import batch as batches
from llama_squad.decoding import lookahead
from llama_squad.decoding.cache import TokenTree
from llama_squad.decoding.constraints import FreeSpeech
from llama_squad.decoding.generator import Generator, stop_ids
from llama_squad.decoding.replies import Paragraph, Reply
from llama_squad.decoding.search import Closing, Successors
from llama_squad.decoding.spans import SpanGrammar, span_vocabulary
from llama_squad.encoding import ChatEncoder
from llama_squad.prompts import build_messages

ENCODER = ChatEncoder(tiny_tokenizer())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(initializer_range=0.4)


def make_paragraphs(questions: Sequence[int]) -> list[Paragraph]:
    """Make a paragraph of so many questions each."""
    paragraphs = []
    for group in make_records(len(questions), questions):
        paragraphs.append(group)
    by_context: dict[str, list[dict[str, Any]]] = {}
    for record in paragraphs:
        by_context.setdefault(record["context"], []).append(record)
    return [
        Paragraph(context, ENCODER.encode_prompts([build_messages(r, answer=False) for r in found]))
        for context, found in by_context.items()
    ]


PARAGRAPHS = make_paragraphs([3, 1, 2])


def run(
    model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[list[Reply]], list[tuple[int, int]]]:
    """Answer; return the replies, and the rows and tokens of each pass over hypotheses."""
    passes = []
    extend = TokenTree.extend

    def watched(self: Any, rows: Any) -> Any:
        if self._length:
            passes.append((len(rows), sum(len(b.tokens) for row in rows for b in row)))
        return extend(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(TokenTree, "extend", watched)
        replies = Generator(model, ENCODER, **options).reply(PARAGRAPHS)
    return [list(found) for found in replies], passes


def assert_same(replies: Sequence[Sequence[Reply]], others: Sequence[Sequence[Reply]]) -> None:
    """Assert that replies agree, their scores to float32's noise."""
    for reply, other in zip(chain(*replies), chain(*others), strict=True):
        assert reply.token_ids == other.token_ids
        assert reply.proven_best == other.proven_best
        assert [span.text for span in reply.spans] == [span.text for span in other.spans]
        scores = [span.score for span in other.spans]
        assert [span.score for span in reply.spans] == pytest.approx(scores, abs=1e-4)
        assert reply.no_answer_score == pytest.approx(other.no_answer_score, abs=1e-4)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 1}, {"num_beams": 10}, {"n_best": 4}], ids=str
)
def test_guesses_save_passes_and_change_nothing(
    model: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookahead, "PASS_TOKENS", 0)
    plain, many = run(model, monkeypatch, **options)
    monkeypatch.setattr(lookahead, "PASS_TOKENS", 256)
    ahead, few = run(model, monkeypatch, **options)
    assert_same(ahead, plain)
    assert len(few) < len(many), (len(few), len(many))


def test_guesses_outlive_a_compact_tree(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(model, monkeypatch, num_beams=10)
    monkeypatch.setattr(batches, "COMPACT_AFTER", 1)
    assert_same(run(model, monkeypatch, num_beams=10)[0], plain)


class Guessed(FreeSpeech):
    """Three tokens in any order, and a guess which one follows another."""

    def successors(self, state: Any) -> Successors:
        """Guess a token that depends on the last; see ``Grammar``."""
        last = state[0] if state else 0
        return Successors([40, 41, 42], [None] * 3, last % 3)

    def step(self, ids: Sequence[int], target: Any) -> Any:
        """Keep the last token as the state; see ``Grammar``."""
        step = super().step(ids, target)
        return step if isinstance(step, Closing) else (ids[-1],)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])  # of the two searches
def test_a_constraint_of_ones_own_may_guess(
    model: Any, length_penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "decoding": Guessed(ENCODER.tokenizer, stop_ids(model, ENCODER)),
        "num_beams": 12, "max_new_tokens": 9, "length_penalty": length_penalty,
    }  # fmt: skip
    monkeypatch.setattr(lookahead, "PASS_TOKENS", 0)
    plain, _ = run(model, monkeypatch, **options)
    used: list[Any] = []
    attach = lookahead.attach

    def watched(node: Any, ahead: Any) -> None:
        attach(node, ahead)
        used.extend(child for child in node.children or () if child.ahead)

    monkeypatch.setattr(batches, "attach", watched)
    monkeypatch.setattr(lookahead, "PASS_TOKENS", 10**4)
    monkeypatch.setattr(batches, "COMPACT_AFTER", 1)
    ahead, _ = run(model, monkeypatch, **options)
    assert used
    assert [r.token_ids for r in chain(*ahead)] == [r.token_ids for r in chain(*plain)]
    scores = [reply.score for reply in chain(*plain)]
    assert [reply.score for reply in chain(*ahead)] == pytest.approx(scores, abs=1e-4)


def test_finished_rows_are_dropped(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "PASS_TOKENS", 0)
    monkeypatch.setattr(batches, "KEPT_ROWS", -1.0)
    plain, whole = run(model, monkeypatch)
    monkeypatch.setattr(batches, "KEPT_ROWS", 0.75)
    dropped, fewer = run(model, monkeypatch)
    assert_same(dropped, plain)
    assert {rows for rows, _ in whole} == {3}
    assert [tokens for _, tokens in fewer] == [tokens for _, tokens in whole]
    assert min(rows for rows, _ in fewer) == 1


def test_free_replies_are_not_guessed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, passes = run(model, monkeypatch, decoding="free", max_new_tokens=4)
    assert max(tokens for _, tokens in passes) <= 6


def test_a_pass_is_filled_up_and_no_more() -> None:
    assert lookahead.guesses([1]) == lookahead.MOST_GUESSES
    assert lookahead.guesses([8, 2]) == lookahead.PASS_TOKENS // 16 - 1
    assert lookahead.guesses([40] * 4) < 1


def test_what_is_guessed_is_the_context_s_next_token() -> None:
    context = 'He paid 1,200 pounds for the "unbelievable" Wednesday market, said Émile.'
    vocabulary = span_vocabulary(ENCODER)
    grammar = SpanGrammar(vocabulary, context)
    state, ids = grammar.start, list[int]()
    first = context.index("Wed")  # no other token of the context begins so
    while True:
        found = grammar.successors(state)
        following = found.ids
        assert following is not None
        if not ids or not vocabulary.to_bytes(ids)[len(vocabulary.lead_text) :]:
            # the lead, and then the one start that is looked at
            wanted = vocabulary.lead_text + context[first:].encode()
            spelled = vocabulary.to_bytes(ids)
            index = max(
                (i for i, token in enumerate(following)
                 if not isinstance(found.targets[i], int)
                 and wanted.startswith(spelled + vocabulary.to_bytes([token]))),
                key=lambda i: len(vocabulary.to_bytes([following[i]])),
            )  # fmt: skip
        elif found.guess is None:
            break
        else:
            index = found.guess
        ids.append(following[index])
        state = tuple(found.targets[index])
    said = vocabulary.to_bytes(ids)[len(vocabulary.lead_text) :].decode()
    assert len(said) > 20
    assert "".join(map(escape_answer, context[first:])).startswith(said)
