"""One loose row → one record: what can be read in one way is taken, and every change is told.

Uses the rows of ``llama_squad.sources.formats``, ``llama_squad.sources.matching`` and
``llama_squad.answers``.
"""

import math
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llama_squad.answers import NO_ANSWER
from llama_squad.sources.formats import InputRow
from llama_squad.sources.matching import find_spans, nearest_span

# What may be changed to make a record of a row.
ID_NUMBER = "id: a number, taken as text"
ID_MADE = "id: none, made from file and place"
TITLE_MADE = "title: none, made from file and place"
NO_ANSWERS = "answers: none given, and marked is_impossible"
ANSWERS_LEFT_OUT = "answers: left out, since marked is_impossible (--mend)"
FOUND = "answer_start: none, found"
FOUND_FIRST = "answer_start: none, the first of several places taken"
MENDED = "answer_start: wrong, mended where the text occurs once"
MENDED_NEAREST = "answer_start: wrong, the nearest of several places taken (--mend)"
RESPELT = "answer: written as its context has it (Unicode form, spaces, line ends, quotes)"

_SURROGATE = re.compile(r"[\ud800-\udfff]")
HALF = r"half a character in its text (a lone surrogate, \ud800 to \udfff)"
_FLAGS = {"true": True, "yes": True, "1": True, "1.0": True}
_FLAGS |= {"false": False, "no": False, "0": False, "0.0": False}


class Fault(ValueError):
    """Why a question cannot be taken; ``mendable`` where ``--mend`` would take it."""

    def __init__(self, why: str, mendable: bool = False) -> None:
        super().__init__(why)
        self.mendable = mendable


def read_record(
    row: InputRow, name: str, titles: dict[str, str], mend: bool
) -> tuple[dict[str, Any], dict[str, None]]:
    """Return the record of a row, and what was changed to make it one.

    Args:
        row: the row.
        name: what ids and titles that are made begin with.
        titles: context → the place where the file has it first; grows.
        mend: take the best guess where there is one.

    Raises:
        Fault: it cannot be made one.
    """
    if row.fault:
        raise Fault(row.fault)
    values = row.values
    changes: dict[str, None] = {}
    context, question = _needed(values, "context"), _needed(values, "question")
    key, title = as_text(values.get("id")), as_text(values.get("title"))
    if not key or not key.strip():
        key = f"{name}: {row.place}"
        changes[ID_MADE] = None
    elif not isinstance(values["id"], str):
        changes[ID_NUMBER] = None
    if not title or not title.strip():
        # flat rows have no articles: a context is one, so that some can be held out
        place = row.article or titles.setdefault(context, row.place)
        title = f"{name}: {place}"
        changes[TITLE_MADE] = None
    given = _answers(values, changes, mend)
    if any(map(has_surrogate, (key, title, context, question, *(text for text, _ in given)))):
        raise Fault(HALF)
    found = [_locate(context, text, start, changes, mend) for text, start in given]
    answers = {"text": [text for text, _ in found], "answer_start": [start for _, start in found]}
    record = {"id": key, "title": title, "context": context, "question": question}
    return record | {"answers": answers}, changes


def has_surrogate(text: str) -> bool:
    """Tell whether a text holds half a character, which no tokenizer takes: see ``HALF``."""
    return bool(_SURROGATE.search(text))


def _needed(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Fault(f"no {key}, or an empty one")
    return value


def as_text(value: Any) -> str | None:
    """Return a text or number as text, "" for null and NaN, None for anything else."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # spreadsheets and pandas make 7.0 of 7
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _answers(
    values: Mapping[str, Any], changes: dict[str, None], mend: bool
) -> list[tuple[str, int | None]]:
    """Return the gold answers with their offsets as given; [] where the question has none."""
    given = _given_answers(values)
    impossible = _flag(values.get("is_impossible"))
    if impossible:
        if given is None:
            changes[NO_ANSWERS] = None
        elif any(text.strip() for text, _ in given):
            if not mend:
                raise Fault(
                    "is_impossible is true, but there are answers (--mend leaves them out)",
                    mendable=True,
                )
            changes[ANSWERS_LEFT_OUT] = None
        return []
    if given is None:
        raise Fault("no answers, and not marked is_impossible")
    if not given and impossible is False:
        raise Fault("is_impossible is false, but there is no answer")
    for text, _ in given:
        if not text.strip():
            raise Fault("an answer is empty")
        if text.strip() == NO_ANSWER:
            raise Fault(f'a gold answer is "{NO_ANSWER}", which stands for no answer')
    return given


def _flag(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    text = as_text(value)
    if text is None or (text.strip() and text.strip().lower() not in _FLAGS):
        raise Fault("is_impossible is neither true nor false")
    return _FLAGS.get(text.strip().lower())


def _given_answers(values: Mapping[str, Any]) -> list[tuple[str, int | None]] | None:
    """Return the texts and offsets that a row gives, in any of their forms; None where it is mute.

    Of "answers" and "answer" the first that holds any.
    """
    columns = [values[name] for name in ("answers", "answer") if name in values]
    if not columns:
        return None
    found = [_read_answers(column, values.get("answer_start")) for column in columns]
    given = next(filter(None, found), [])
    if not found[0] and all(text.strip() == NO_ANSWER for text, _ in given):
        return []  # both say that there is none
    return given


def _read_answers(value: Any, starts: Any) -> list[tuple[str, int | None]]:
    """Return the texts and offsets of a row's answers.

    A list of {"text", "answer_start"}; {"text": [...], "answer_start": [...]}; a list of texts; a
    text. Empty texts mean no answer, but for those of the first form, which are handed on.
    """
    if isinstance(value, dict):
        value, starts = value.get("text"), value.get("answer_start")
    items: list[Any] = value if isinstance(value, list) else [value]
    starts = starts if isinstance(starts, list) else [starts]
    if len(starts) != len(items):
        starts = [None] * len(items)
    given = []
    for item, start in zip(items, starts, strict=True):
        nested = isinstance(item, dict)
        if nested:
            item, start = item.get("text"), item.get("answer_start")
        text = as_text(item)
        if text is None:
            raise Fault("an answer is no text")
        offset = _offset(start)
        if offset is None:  # so nothing says that the spaces around it belong to it
            text = text.strip()
        if nested or text:
            given.append((text, offset))
    return given


def _offset(value: Any) -> int | None:
    """Return an offset; None where there is none (-1 is written for that, too)."""
    try:
        offset = int(float(value)) if isinstance(value, str | float) else value
    except (ValueError, OverflowError):  # no number; NaN, infinity
        return None
    usable = isinstance(offset, int) and not isinstance(offset, bool) and offset >= 0
    return offset if usable else None


def _locate(
    context: str, text: str, start: int | None, changes: dict[str, None], mend: bool
) -> tuple[str, int]:
    """Return an answer as its context has it, and its offset there."""
    if start is not None and context.startswith(text, start):
        return text, start
    spans = find_spans(context, text)
    if not spans:
        raise Fault("an answer is not in its context")
    begin, end = spans[0]
    if start is None:
        changes[FOUND if len(spans) == 1 else FOUND_FIRST] = None
    elif len(spans) == 1:
        changes[MENDED] = None
    elif mend:
        begin, end = nearest_span(context, spans, start)
        changes[MENDED_NEAREST] = None
    else:
        why = (
            "answer_start is wrong, and the text is there several times (--mend takes the nearest)"
        )
        raise Fault(why, mendable=True)
    if context[begin:end] != text:
        changes[RESPELT] = None
    return context[begin:end], begin


def paragraphs_at_random(
    paragraphs: Iterable[tuple[str, str]], questions: int, seed: int
) -> list[int]:
    """Return the indices of questions: whole paragraphs at random, until there are enough of them.

    Args:
        paragraphs: the title and the context of each question.
        questions: how many are enough; all, where there are no more.
        seed: of the choice.
    """
    members: dict[tuple[str, str], list[int]] = {}
    for index, paragraph in enumerate(paragraphs):
        members.setdefault(paragraph, []).append(index)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    chosen: list[int] = []
    for group in groups:
        if len(chosen) >= questions:
            break
        chosen += group
    return chosen
