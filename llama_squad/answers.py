"""The answer format and its parser: the one home of what a reply looks like.

A reply holds a fenced JSON object with the string "answer", which is a span of the context word for
word, or ``NO_ANSWER``. Reading a reply gives one of three states that are never mixed: an answer,
an abstention, or a malformed reply (which is not an abstention, and scores as wrong).
"""

import json
from dataclasses import dataclass
from typing import Literal

NO_ANSWER = "?"

ANSWER_HEADER = '```json\n{\n  "answer": "'
"""Everything before the answer's first character. Byte-pair vocabularies may merge the quote with
what follows, so only ``ANSWER_HEADER[:-2]`` (up to the colon) may be forced on a model."""
ANSWER_FOOTER = '"\n}\n```'
"""Everything after the answer's last character."""

_THINK, _THOUGHT = "<think>", "</think>"
"""What reasoning stands between where a server does not part it from the reply."""

_FENCE = "```"
_OPENING_FENCE = f"{_FENCE}json"

ANSWER_SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
"""JSON schema of the object, for servers that can hold a reply to one."""

MALFORMED_PREDICTION = "\ufffdmalformed\ufffd"
"""What stands for a malformed reply in an official prediction file, where "" means no answer: a
text that shares no word with any gold answer, so that it is exact 0 and F1 0 everywhere."""

AnswerState = Literal["answer", "no_answer", "malformed", "failed"]
"""A reply's three states, and that of a question that got no reply ("failed": scores as wrong)."""


@dataclass(frozen=True)
class Answer:
    """What a reply says: ``text`` is the answer, ``NO_ANSWER``, or "" (malformed or failed)."""

    state: AnswerState
    text: str

    @property
    def official(self) -> str:
        """The text as the official prediction file has it: "" means no answer there."""
        if self.state == "no_answer":
            return ""
        return self.text if self.text.strip() else MALFORMED_PREDICTION


MALFORMED = Answer("malformed", "")
FAILED = Answer("failed", "")


def escape_answer(text: str) -> str:
    """Return ``text`` as it stands between the quotes of the JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def format_answer(text: str) -> str:
    """Return the reply that gives ``text`` as the answer (``NO_ANSWER`` to abstain).

    Accents stay as they are, so that the span in the reply is the span of the context.
    """
    return ANSWER_HEADER + escape_answer(text) + ANSWER_FOOTER


def _as_answer(value: object) -> Answer | None:
    """Read a decoded JSON value; None if it is no object with a usable string "answer"."""
    if not isinstance(value, dict) or not isinstance(value.get("answer"), str):
        return None
    text = value["answer"]
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no file could hold
        return None
    return Answer("no_answer", NO_ANSWER) if text.strip() == NO_ANSWER else Answer("answer", text)


def extract_answer(completion: str) -> Answer:
    """Read a model's reply: the first JSON object in it that has a string "answer".

    An object in a ```` ```json ```` fence is preferred to one outside of it, and text around the
    object (reasoning before it, chatter after it) is ignored; so are drafts within ``<think>`` and
    ``</think>``, of which the prompt may have opened the first. The JSON is read by a JSON decoder,
    so braces and quotes inside the answer are no obstacle.
    """
    before, thought, reply = completion.partition(_THOUGHT)
    if completion.lstrip().startswith(_THINK):
        found = _read_answer(reply)
    else:
        found = _read_answer(completion)
        if thought and found and found[1] <= len(before):  # a draft: the mark is not in the answer
            found = _read_answer(reply) or found
    return found[0] if found else MALFORMED


def _read_answer(reply: str) -> tuple[Answer, int] | None:
    """Return the answer of a reply without its reasoning, and where it ends; None: malformed."""
    fence = reply.find(_OPENING_FENCE)
    found = _first_answer(reply, fence) if fence >= 0 else None
    return found or _first_answer(reply, 0)


def answer_is_closed(completion: str) -> bool:
    """Tell whether a reply so far has its answer in a fence, and closes that fence right after it.

    Whatever is said after that, ``extract_answer`` reads the same, but for a reasoning that its
    prompt opened and that ends later. That does not hold of an object without a fence (one in a
    fence may follow, and is preferred), nor of a fence that holds no answer, nor of an object that
    something else follows (it may be part of a larger one).
    """
    if completion.lstrip().startswith(_THINK):
        completion = completion.partition(_THOUGHT)[2]
    fence = completion.find(_OPENING_FENCE)
    found = _first_answer(completion, fence) if fence >= 0 else None
    return found is not None and completion[found[1] :].lstrip().startswith(_FENCE)


def _first_answer(text: str, start: int) -> tuple[Answer, int] | None:
    """Return the first object with a usable "answer", and where it ends; None if there is none."""
    decoder = json.JSONDecoder()
    position = text.find("{", start)
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # a plain ValueError: a number of over 4,300 digits
            end = position + 1
        else:
            found = _as_answer(value)
            if found is not None:
                return found, end
        position = text.find("{", end)
    return None
