"""Where spans begin and end."""

import functools
import unicodedata
from typing import Any

import pytest
from helpers import tiny_model, tiny_tokenizer

from llama_squad.answers import extract_answer
from llama_squad.decoding.boundaries import (
    Boundaries,
    Form,
    find_span,
    is_span,
    normalized_chars,
)
from llama_squad.decoding.generator import Generator
from llama_squad.decoding.replies import Paragraph
from llama_squad.decoding.search import State
from llama_squad.decoding.spans import SpanGrammar, span_vocabulary
from llama_squad.encoding import ChatEncoder
from llama_squad.prompts import build_messages


@functools.cache
def encoder() -> Any:
    return ChatEncoder(tiny_tokenizer())


def ask(context: str, **options: Any) -> Any:
    messages = [build_messages({"context": context, "question": "Who?"}, answer=False)]
    paragraph = Paragraph(context, encoder().encode_prompts(messages))
    return Generator(tiny_model(), encoder(), **options).reply([paragraph])[0][0]


@pytest.mark.parametrize(
    ("context", "text", "start"),
    [
        ("from 1562 to 1598.", "1562", 5),
        ("from 1562 to 1598.", "562", -1),
        ("largest gold rushes", "gold rush", -1),
        ("in the 1990s", "1990", 7),  # digits and letters
        ("US$5m, 20 %", "$5", 2),
        ("US$5m, 20 %", "20 %", 7),
        ("the euro (€)", "(€)", -1),  # no letter, no digit
        ("the euro (€)", "the euro (€)", 0),
        ("Yes. No.", ".", -1),
        ("Yes. No.", "No", 5),
        ("Nonetheless, No", "No", 13),  # not where it first occurs
        ('"ok"', '"ok', 0),
        ("cat's", "cat", 0),
        ("x? 1", "?", -1),
        (" a ", " a", -1),
        ("职业碗四次入选", "四次", 3),  # no spaces between words
        ("대통령은 갔다", "대통령", 0),  # particles are tied to words
        ("ne\u0301e", "ne", -1),  # an accent belongs to its letter
        ("ne\u0301", "ne\u0301", 0),
        ("बाला जी", "बाला", 0),
        ("", "a", -1),
    ],
)
def test_spans_begin_and_end_at_word_boundaries(context: str, text: str, start: int) -> None:
    assert find_span(context, text, "word") == start


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@pytest.mark.parametrize(
    "text", ["", "plain", "e\u0301a", "q\u0307\u0323x", "\u0301e", "\u1112\u1161\u11ab\u1100\u1161",
             "\u212b\u2126", "\ufb01n \u0301", "\u0b47\u0b3e\u0b47", "a\u0315\u0300\u05ae\u0300b", "\u0f73\u0f71\u0f80a\u0f73"],
)  # fmt: skip
def test_a_text_is_normalized_character_by_character(text: str, form: Form) -> None:
    chars = normalized_chars(text, form)
    assert "".join(chars) == unicodedata.normalize(form, text)
    assert len(chars) == len(text)
    assert normalized_chars(text, None) == list(text)
    assert normalized_chars(unicodedata.normalize("NFD", "né"), "NFC") == ["n", "é", ""]


def walk(grammar: Any, vocabulary: Any) -> Any:
    stack: list[tuple[State, tuple[int, ...]]] = [(grammar.start, ())]
    while stack:
        state, ids = stack.pop()
        found = grammar.successors(state)
        assert found.ids, "a dead end"
        for token_id, target in zip(found.ids, found.targets, strict=True):
            if isinstance(target, int):
                reply = [*vocabulary.header, *ids, token_id, *vocabulary.tails[target]]
                yield extract_answer(vocabulary.to_bytes(reply).decode()).text
            else:
                stack.append((tuple(target), (*ids, token_id)))


@pytest.mark.parametrize("boundaries", ["word", "any"])
@pytest.mark.parametrize("context", ["Ab. (c 1x).", "-a?", "é. ", " 中文 "])
def test_grammar_admits_all_such_spans_and_no_others(context: str, boundaries: Boundaries) -> None:
    vocabulary = span_vocabulary(encoder())
    texts = {context[i:j] for i in range(len(context)) for j in range(i + 1, len(context) + 1)}
    expected = {text for text in texts if is_span(context, text, boundaries)}
    grammar = SpanGrammar(vocabulary, context, boundaries)
    assert set(walk(grammar, vocabulary)) - {"?"} == expected


def test_the_rule_holds_for_every_span_of_n_best() -> None:
    context = "Ka. (lo) mir, 12 ven; -- tu!"
    words = ask(context, n_best=12, num_beams=4)
    assert len(words.spans) == 12
    assert all(is_span(context, span.text, "word") for span in words.spans)
    assert all(context.startswith(span.text, span.start) for span in words.spans)
    assert is_span(context, words.best.text, "word")
    every = ask(context, n_best=12, num_beams=4, span_boundaries="any")
    assert not all(is_span(context, span.text, "word") for span in every.spans)


@pytest.mark.parametrize("context", ["...", "(—)", "? !"])
def test_a_context_without_words_is_answered_by_abstaining(context: str) -> None:
    reply = ask(context)
    assert (reply.best, reply.na_prob) == (None, 1.0)
