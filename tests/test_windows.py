"""Prompts that are longer than what the model reads at once."""

import functools
import itertools
from typing import Any

import pytest
from helpers import make_records, tiny_model, tiny_tokenizer

from llama_squad.decoding.generator import Generator
from llama_squad.decoding.replies import Reply, Span
from llama_squad.decoding.windows import cut_windows, merge_windows
from llama_squad.encoding import ChatEncoder
from llama_squad.predictors.local import LocalModel
from llama_squad.prompts import build_messages

LONG = " ".join(f"Word{i} stands at place {i}." for i in range(60))


@functools.cache
def encoder() -> Any:
    return ChatEncoder(tiny_tokenizer())


def local(positions: Any = 512, **options: Any) -> Any:
    model = tiny_model(max_position_embeddings=positions)
    return LocalModel(model, encoder(), system_prompt="", **options)


def tokens(text: str) -> Any:
    return len(tiny_tokenizer().encode(text, add_special_tokens=False))


def test_windows_cover_the_context_and_overlap_at_words() -> None:
    windows = cut_windows(tiny_tokenizer().backend_tokenizer, LONG, 100, 30)
    assert windows[0][0] == 0
    assert windows[-1][1] == len(LONG)
    assert len(windows) > 4
    for (a, b), (c, _) in itertools.pairwise(windows):
        assert a < c < b
        assert tokens(LONG[c:b]) >= 30 - 15
        assert LONG[c - 1] == " "
        assert LONG[b - 1] == " "
        assert tokens(LONG[a:b]) <= 100 + 15
    assert cut_windows(tiny_tokenizer().backend_tokenizer, "A b.", 100, 30) == [(0, 4)]
    assert cut_windows(tiny_tokenizer().backend_tokenizer, "", 100, 30) == [(0, 0)]
    blob = "x" * 500
    assert cut_windows(tiny_tokenizer().backend_tokenizer, blob, 100, 30)[-1][1] == 500


def reply(text: str, log_prob: float, no_answer: Any, at: Any = 3, **more: Any) -> Any:
    span = Span(text, log_prob, at)
    na_prob = 0.5
    return Reply(text, [], log_prob, span, (span,), no_answer, na_prob, **more)


def test_the_window_that_is_surest_of_an_answer_gives_it() -> None:
    replies = [(0, reply("a", -1.0, -0.1)), (50, reply("b", -9.0, -9.5)), (90, reply("c", -2, -2))]
    merged = merge_windows(replies, n_best=2)
    assert merged.best == Span("b", -9.0, 53)
    assert merged.completion == "b"
    # by their odds: 0.5, 0 and -0.9 against no answer
    assert [(s.text, s.start, s.score) for s in merged.spans] == [("b", 53, -9.0), ("c", 93, -9.5)]
    nothing = Reply("?", [], -1.0, None, (), -1.0, 1.0)
    assert merge_windows([(0, nothing), (9, reply("a", -5.0, -1.0))]).best == Span("a", -5.0, 12)
    assert merge_windows([(0, nothing), (9, nothing)]).best is None


@pytest.mark.usefixtures("narrow")
def test_a_long_context_may_spell_control_tokens() -> None:
    """They are several tokens each in a prompt, and one to the tokenizer itself."""
    context = " ".join(f"Ka met <|eot_id|> in {1500 + n}." for n in range(60))
    record = {"id": "1", "context": context, "question": "Which?", "answers": {"text": []}}
    (found,) = local(max_new_tokens=8, na_prob_thresh=1.0).answer([[record]])
    assert not found.failure
    assert found.reply.best is not None and found.reply.best.text in context


@pytest.mark.usefixtures("narrow")
def test_a_long_context_is_read_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"id": "1", "context": LONG, "question": "Which?", "answers": {"text": []}}
    short = make_records(1, [2])
    model = local(n_best=3, max_new_tokens=8, na_prob_thresh=1.0)
    asked = []

    reply = Generator.reply
    generators = []

    def watched(self: Generator, paragraphs: Any) -> Any:
        generators.append(self)
        asked.extend(paragraphs)
        return reply(self, paragraphs)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "reply", watched)
        found = model.answer([short, [record]])
    assert [p.record["id"] for p in found] == [*(r["id"] for r in short), "1"]
    windows = [paragraph for paragraph in asked if paragraph.context in LONG]
    assert len(windows) > 2
    assert all(max(map(len, paragraph.prompts)) <= 512 - 8 for paragraph in asked)
    best = found[2].reply.best
    assert not found[2].failure
    assert best
    assert LONG[best.start : best.start + len(best.text)] == best.text
    separate = [generators[0].reply([window])[0][0] for window in windows]
    odds = []
    for each in separate:
        assert each.best and each.no_answer_score is not None
        odds.append((each.no_answer_score - each.best.score, each.best.text))
    assert best.text == min(odds)[1]
    alone = local(n_best=3, max_new_tokens=8, na_prob_thresh=1.0).answer([short])
    assert [p.reply.best.text for p in alone] == [p.reply.best.text for p in found[:2]]


@pytest.mark.parametrize("decoding", ["free", "span"])
def test_what_cannot_be_asked_fails_with_its_reason(decoding: str) -> None:
    record = {"id": "1", "context": LONG, "question": "Which?", "answers": {"text": []}}
    if decoding == "span":
        record |= {"context": "Ka lo.", "question": LONG}
    found = local(decoding=decoding, max_new_tokens=8).answer([[record], make_records(1, [1])])
    assert "tokens long" in found[0].failure
    assert "512" in found[0].failure
    assert not found[1].failure
    assert found[1].reply.completion
    only = local(decoding=decoding, max_new_tokens=8).answer([[record]])
    assert only[0].failure


def test_one_long_question_leaves_the_others_of_its_paragraph_alone() -> None:
    short = make_records(1, [2])
    long = {**short[0], "id": "x", "question": LONG}
    found = local(max_new_tokens=8).answer([[short[0], long, short[1]]])
    assert [bool(p.failure) for p in found] == [False, True, False]


def test_replies_end_where_the_positions_do() -> None:
    record = make_records(1, [1])[0]
    model = local(decoding="free", max_new_tokens=300)
    (ids,) = encoder().encode_prompts([build_messages(record, system_prompt="", answer=False)])
    (prediction,) = model.answer([[record]])
    assert len(prediction.reply.token_ids) <= 512 - len(ids)


def test_filler_takes_room_as_well() -> None:
    """The prompt is short, in bytes too; what comes before the reply is not."""
    record = {"id": "1", "context": "Ka lo.", "question": "Which?", "answers": {"text": []}}
    filled = ChatEncoder(tiny_tokenizer(), filler=400)
    model = LocalModel(
        tiny_model(max_position_embeddings=512), filled, system_prompt="", max_new_tokens=8
    )
    (found,) = model.answer([[record]])
    assert "512" in found.failure
