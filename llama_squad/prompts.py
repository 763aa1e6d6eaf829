"""Prompt styles: from a SQuAD record to chat messages.

The context stands before the question, which lets the questions of one paragraph share everything
up to the question (see ``llama_squad.tree``). The styles that ask first, so that the context is
read with the question in mind, share the instruction alone: several times the tokens.
Contexts and questions are data: they are joined in, never formatted in, so braces in them mean
nothing.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from llama_squad.answers import ANSWER_FOOTER, ANSWER_HEADER, NO_ANSWER, format_answer

Record = Mapping[str, Any]
"""A question: {"id", "title", "context", "question", "answers": {"text": [...], "answer_start":
[...]}}, as on the Hub; no texts where it has no answer. Only readers of gold answers need these."""

Message = dict[str, str]

ActsFrom = Literal["start", "context", "question", "reply"]
"""From where on an adapter acts: on all tokens, or from the task's context, question or reply on.

From the context on, that is from the question on where that stands first."""

SYSTEM_PROMPT = (
    "You are a helpful and honest assistant. You answer from the text you are given, you do not "
    "make anything up, and you say so when you do not know."
)

_FORMAT = ANSWER_HEADER + "..." + ANSWER_FOOTER
_ABSTAIN = f'If the context does not hold the answer, the answer is "{NO_ANSWER}".'
_INSTRUCTION = (
    "Find the shortest span of the context that answers the question, and copy it word for word. "
    f"You may think it through first. Then give the answer as JSON, like this:\n{_FORMAT}\n"
    f"{_ABSTAIN}"
)


def _context(record: Record) -> str:
    return "\nContext: " + record["context"]


def _question(record: Record) -> str:
    return "\nQuestion: " + record["question"].strip()


def question_of(turn: str, context: str) -> str | None:
    """Return the question of a user turn that holds it beside this context; None of any other."""
    head, found, tail = turn.partition("\nContext: " + context)
    for part in (tail, head) if found and context else ():
        _, asked, question = part.partition("\nQuestion: ")
        if asked:
            return question
    return None


def _single_turn(record: Record) -> list[str]:
    return [_INSTRUCTION + _context(record) + _question(record)]


def _question_first(record: Record) -> list[str]:
    return [_INSTRUCTION + _question(record) + _context(record)]


def _question_twice(record: Record) -> list[str]:
    return [_INSTRUCTION + _question(record) + _context(record) + _question(record)]


def _multi_turn(record: Record) -> list[str]:
    return [
        "Use the following context to answer the question. You may think it through first."
        + _context(record)
        + _question(record),
        "Extract the shortest span of the context that answers the question, word for word.",
        "Now give the answer as JSON, like this:\n" + _FORMAT + "\n" + _ABSTAIN,
    ]


PROMPTS: dict[str, Callable[[Record], list[str]]] = {
    "single_turn": _single_turn,
    "multi_turn": _multi_turn,
    "question_first": _question_first,
    "question_twice": _question_twice,
}
"""Name of a style → builder of its user turns, in order."""


def adapter_start(
    messages: Sequence[Message], record: Record, prompt: str, where: ActsFrom
) -> tuple[int, int]:
    """Return from where on an activated adapter acts in a conversation: message and character.

    Args:
        messages: of ``build_messages``, to its end or to any of its user turns.
        record: that they are about.
        prompt: their style.
        where: "context": from the line of the context on, or of the question, where that is
            earlier; "question": from the line of the question on; "reply": from the end of the last
            user turn on, so with the tokens that open the assistant's.

    Raises:
        ValueError: the style has no place for it, or the messages are of another one.
    """
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if where == "reply":
        return users[-1], len(messages[users[-1]]["content"])
    turn, before = _before("question", record, prompt)
    if where == "context":
        turn, before = min((turn, before), _before("context", record, prompt), key=_place)
    if not messages[users[turn]]["content"].startswith(before):
        raise ValueError(f"the messages are not of the prompt style {prompt!r}")
    return users[turn], before.rfind("\n") + 1


def _before(part: str, record: Record, prompt: str) -> tuple[int, str]:
    """Return the user turn that a part of a record is first in, and what stands in front of it."""
    # what two records of one character have in common
    first, other = (PROMPTS[prompt]({**record, part: mark}) for mark in "\ue000\ue001")
    for turn, (a, b) in enumerate(zip(first, other, strict=True)):
        if a != b:
            differ = bisect_left(range(len(a)), True, key=lambda n: a[: n + 1] != b[: n + 1])
            return turn, a[:differ]
    raise ValueError(f"the prompt style {prompt!r} does not hold the {part}")


def _place(found: tuple[int, str]) -> tuple[int, int]:
    return found[0], len(found[1])


def gold_answer(record: Record) -> str:
    """Return the answer to teach: the first gold answer, or ``NO_ANSWER`` where there is none."""
    texts = record["answers"]["text"]
    return texts[0] if texts else NO_ANSWER


def build_messages(
    record: Record,
    prompt: str = "single_turn",
    system_prompt: str = SYSTEM_PROMPT,
    answer: bool = True,
) -> list[Message]:
    """Build the conversation about one record.

    Args:
        record: has "context", "question" and, where ``answer`` is set, "answers" in the form
            ``{"text": [...], "answer_start": [...]}``.
        prompt: a key of ``PROMPTS``.
        system_prompt: the system message; "" leaves it out.
        answer: end with the assistant's JSON answer (to train on); else end with the last user
            turn (to generate from).

    Between the user turns of a multi-turn style stand empty assistant replies: when training there
    is nothing to say there, and at inference the model's own replies take their place.

    Raises:
        ValueError: no such prompt style.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"unknown prompt {prompt!r}: choose one of {', '.join(PROMPTS)}")
    messages = (
        [{"role": "system", "content": system_prompt.strip()}] if system_prompt.strip() else []
    )
    for turn in PROMPTS[prompt](record):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": ""}]
    if answer:
        messages[-1]["content"] = format_answer(gold_answer(record))
    else:
        messages.pop()
    return messages
