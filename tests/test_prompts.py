"""Prompt styles: what the messages are, and that contexts and questions are data."""

from typing import Any

import pytest

from llama_squad.prompts import PROMPTS, SYSTEM_PROMPT, build_messages

RECORD: dict[str, Any] = {
    "context": 'Braces {context} {0} and a "quote".',
    "question": " What {question}? ",
    "answers": {"text": ['a "quote"', "other"], "answer_start": [29, 0]},
}
REPLY = '```json\n{\n  "answer": "a \\"quote\\""\n}\n```'


def test_single_turn() -> None:
    system, user, assistant = build_messages(RECORD)
    assert system == {"role": "system", "content": SYSTEM_PROMPT}
    assert user["role"] == "user"
    assert user["content"].endswith(
        '\nContext: Braces {context} {0} and a "quote".\nQuestion: What {question}?'
    )
    assert '"answer": "..."' in user["content"] and '"?"' in user["content"]
    assert assistant == {"role": "assistant", "content": REPLY}


def test_multi_turn() -> None:
    messages = build_messages(RECORD, prompt="multi_turn", system_prompt="")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    assert [m["content"] for m in messages[1::2]] == ["", "", REPLY]
    assert messages[0]["content"].endswith("Question: What {question}?")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_to_generate_from(prompt: str) -> None:
    with_answer = build_messages(RECORD, prompt)
    assert build_messages(RECORD, prompt, answer=False) == with_answer[:-1]
    unanswerable = RECORD | {"answers": {"text": [], "answer_start": []}}
    assert '"answer": "?"' in build_messages(unanswerable, prompt)[-1]["content"]


def test_context_stands_before_the_question() -> None:
    """Questions of a paragraph share everything up to the question."""
    for prompt in ("single_turn", "multi_turn"):
        a, b = (
            build_messages(RECORD | {"question": question}, prompt)[1]["content"]
            for question in ("First?", "Second?")
        )
        shared = a[: a.index("First?")]
        assert b.startswith(shared) and RECORD["context"] in shared


def test_the_question_before_the_context() -> None:
    first, twice = (
        build_messages(RECORD, prompt)[1]["content"]
        for prompt in ("question_first", "question_twice")
    )
    context = 'Context: Braces {context} {0} and a "quote".'
    assert first.endswith(f"\nQuestion: What {{question}}?\n{context}")
    assert twice == first + "\nQuestion: What {question}?"
    plain = build_messages(RECORD)[1]["content"]
    assert first.split("\nQuestion")[0] == plain.split("\nContext")[0]


def test_unknown_style() -> None:
    with pytest.raises(ValueError, match="unknown prompt 'haiku': choose one of single_turn"):
        build_messages(RECORD, prompt="haiku")
