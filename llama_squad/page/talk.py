"""The model speaks freely: what its replies amount to, and conversations as they are shown."""

import html
import itertools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llama_squad.answers import NO_ANSWER, Answer, extract_answer
from llama_squad.metrics import is_exact_match, score_answer
from llama_squad.page.desk import Desk
from llama_squad.page.style import card
from llama_squad.prompts import Message, question_of

Talk = list[Message]

WHO = {"tuned": (False,), "base": (True,), "both": (False, True)}
"""Who speaks → with the adapter switched off or not, one after the other."""


# What a reply amounts to ---------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What a reply amounts to; None where there is nothing to compare with."""

    answer: Answer
    verbatim: bool | None  # the answer stands in the context, word for word
    right: bool | None  # strictly equal to a right answer
    f1: float | None  # the official F1, in [0, 1]


def judge(reply: str, context: str | None = None, golds: Sequence[str] | None = None) -> Judgement:
    """Judge a reply; ``golds`` are the right answers, [] if there is none in the context."""
    answer = extract_answer(reply)
    verbatim = right = f1 = None
    if context is not None and answer.state == "answer":
        verbatim = bool(answer.text.strip()) and answer.text in context
    if golds is not None:
        right = is_exact_match(answer, golds)
        f1 = score_answer(answer.official, golds)[1]
    return Judgement(answer, verbatim, right, f1)


def show_judgement(judgement: Judgement, free: bool = False, title: str = "") -> str:
    """Return what a reply amounts to, as HTML; in chat a reply without an answer is no fault."""
    answer, right = judgement.answer, judgement.right
    title = title or REPLY_TITLE
    if free and answer.state == "malformed":
        return card(title, note="none: free chat needs no JSON")
    notes = {
        "answer": {
            None: "an answer",
            True: "word for word in the text",
            False: "not in the text",
        }[judgement.verbatim],
        "no_answer": "abstained: the model finds no answer in the text",
        "malformed": 'malformed: the reply holds no JSON object with a text "answer"',
    }
    at_fault = right is False or judgement.verbatim is False or answer.state == "malformed"
    tone = "good" if right else "bad" if at_fault else "plain"
    score = {None: "", True: "right · ", False: f"wrong (F1 {judgement.f1 or 0:.0%}) · "}[right]
    return card(title, [answer.text] * bool(answer.text), score + notes[answer.state], tone)


def show_golds(golds: Sequence[str]) -> str:
    """Return the right answers as HTML, each once."""
    note = "any of these counts" if len(set(golds)) > 1 else ""
    if not golds:
        note = "the text does not hold the answer: the model should abstain"
    return card(GOLD_TITLE, list(dict.fromkeys(golds)) or [f"no answer: {NO_ANSWER}"], note)


REPLY_TITLE, GOLD_TITLE, FAILED = "Answer in the reply", "Right answer", "That did not work"


def failed(error: Exception) -> str:
    """Tell the visitor what went wrong, in passing and by a card; the log has a fault's trace."""
    if not isinstance(error, ValueError):  # those say what the visitor can do
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    gr.Warning(html.escape(message))
    return card(FAILED, note=message, tone="bad")


# The conversation ----------------------------------------------------------------------------


def answered_turns(talk: Sequence[Message]) -> Talk:
    """Leave out a user turn without a reply (it was stopped, or failed).

    Templates want user and assistant in alternation.
    """
    return [
        message
        for user, reply in itertools.pairwise(talk)
        if user["role"] == "user" and reply["role"] == "assistant" and reply["content"]
        for message in (user, reply)
    ]


def as_shown(talk: Sequence[Message], context: str = "") -> Talk:
    """Write a conversation for the chatbot: prompts about a text folded to their question; escaped.

    The chatbot takes contents for HTML even without Markdown; escaped, "</s>" is seen.
    """
    shown = []
    for message in talk:
        content = message["content"]
        if message["role"] == "user":
            content = question_of(content, context) or content
        shown.append({**message, "content": html.escape(content, quote=False)})
    return shown


Update = tuple[list[Talk], str]
"""The conversations so far, of the tuned model and of the base, and what the replies amount to."""


def speak(
    desk: Desk, context: str, question: str, golds: Sequence[str] | None, who: str
) -> Iterator[Update]:
    """Stream the free replies to a question, and at their end what they amount to.

    Raises:
        ValueError: the text or the question is empty, or too long.
    """
    voices = WHO[who] if desk.has_adapter else (False,)
    streams = [desk.ask(context, question, base) for base in voices]
    talks: list[Talk] = [[], []]
    for talks in _together(streams, voices, [[], []]):
        yield talks, ""
    cards = [
        show_judgement(judge(talks[base][-1]["content"], context, golds), title=_title(base, who))
        for base in voices
    ]
    yield talks, "".join(cards)


def chat(desk: Desk, said: str, talks: Sequence[Talk], who: str) -> Iterator[Update]:
    """Stream one more turn of the conversations with whoever speaks.

    Unless ``--chat_adapter`` the base replies in either, as ``ChatSession.converse`` has it.

    Raises:
        ValueError: nothing was said, or there is no room for it.
    """
    if not said.strip():
        raise ValueError("Write a message first.")
    voices = WHO[who] if desk.has_adapter else (False,)
    before = [answered_turns(talk) for talk in talks]
    streams = [desk.chat(before[base], said, base) for base in voices]
    now = before
    for now in _together(streams, voices, before):
        yield now, ""
    cards = [
        show_judgement(judge(now[base][-1]["content"]), free=True, title=_title(base, who))
        for base in voices
    ]
    yield now, "".join(cards)


def _title(base: bool, who: str) -> str:
    return f"{REPLY_TITLE} of the {'base' if base else 'tuned'} model" if who == "both" else ""


def _together(
    streams: Sequence[Iterator[Talk]], voices: Sequence[bool], before: Sequence[Talk]
) -> Iterator[list[Talk]]:
    """Let several models speak at once: a word of the one, a word of the other."""
    talks = [list(talk) for talk in before]
    for parts in itertools.zip_longest(*streams):
        for base, part in zip(voices, parts, strict=True):
            if part is not None:
                talks[base] = part
        yield list(talks)


def known_golds(record: Mapping[str, Any] | None, context: str, question: str) -> list[str] | None:
    """Return the record's right answers, if context and question are still the record's own."""
    if record and (record["context"], record["question"]) == (context, question):
        return list(record["answers"]["text"])
    return None
