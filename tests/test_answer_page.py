"""The page of answers: the text as it is, the answers marked in it, nothing from outside."""

from typing import Any

import pytest
from helpers import Page

from llama_squad.answer_page import render

HOSTILE = "<script>alert(1)</script> & \"R&B\" 'n' </div>\n\n\tÉté 中文 <|im_end|> ends."


def said(context: str, answer: str | None, question: str = "Who?", **more: Any) -> dict[str, Any]:
    start = None if answer is None else context.index(answer)
    end = None if start is None else start + len(answer or "")
    return {
        "question": question, "context": context, "answer": answer, "start": start, "end": end,
        "na_prob": 0.25, **more,
    }  # fmt: skip


def test_texts_and_answers_are_those_that_were_given() -> None:
    answers = [
        said(HOSTILE, '<script>alert(1)</script> & "R&B"', "<b>What?</b>"),
        said("Ada met Bob.", "Bob"),
        said(HOSTILE, "alert(1)"),
        said(HOSTILE, None, na_prob=0.996),
    ]
    page = Page.of(render(answers, title="A <i> title"))
    assert page.texts == [HOSTILE, "Ada met Bob."]
    assert page.marks == {"1-1": answers[0]["answer"], "1-2": "alert(1)", "2-1": "Bob"}
    assert page.items == [
        f"<b>What?</b> {answers[0]['answer']} (no answer: 25.0 %)",
        "Who? alert(1) (no answer: 25.0 %)",
        "Who? not in the text (no answer: 99.6 %)",
        "Who? Bob (no answer: 25.0 %)",
    ]
    assert page.title == "A <i> title"


@pytest.mark.parametrize(
    ("first", "second"),
    [("met Bob", "Bob in"), ("Ada", "Ada met"), ("Bob", "met Bob"), ("Bob", "Bob"), ("Ada", "Bob")],
)
def test_answers_that_overlap(first: str, second: str) -> None:
    context = "Ada met Bob in 1912."
    page = Page.of(render([said(context, first), said(context, second)]))
    assert page.texts == [context]
    assert page.marks == {"1-1": first, "1-2": second}


def test_failures_and_unknown_probabilities_are_said() -> None:
    context = "Ada met Bob."
    failed = said(context, None, na_prob=None, failure="longer than the model reads")
    page = Page.of(render([failed, said(context, "Ada", na_prob=None)]))
    assert page.items == ["Who? could not be asked: longer than the model reads", "Who? Ada"]


def test_nothing_is_loaded_and_both_schemes_are_there() -> None:
    text = render([said("Ada met Bob.", "Bob")])
    assert "default-src 'none'" in text
    assert not {"script", "link", "img", "iframe", "base", "form"} & Page.of(text).tags
    assert "color-scheme: light dark" in text
    assert "prefers-color-scheme: dark" in text
    assert all(address.startswith("#") for address in Page.of(text).addresses)
