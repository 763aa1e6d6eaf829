"""Verdicts out and in: SQuAD 2.0 files that other tools take, and datasets merged with verdicts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from llama_squad.config import write_json
from llama_squad.durable import one_line_errors
from llama_squad.feedback.verdicts import Feedback, Key, Verdict, append, key_of, load, read_lines
from llama_squad.prompts import Record, gold_answer
from llama_squad.sources.cleaning import Cleaner
from llama_squad.sources.formats import OF_VERDICTS, read_rows
from llama_squad.sources.records import paragraphs_at_random

CHANGED = "answers: a reviewer's, in place of others (--feedback)"
CONFIRMED = "answers: as they were, and a reviewer agrees (--feedback)"
ADDED = "question: new, answered by a reviewer (--feedback)"
ID_NUMBERED = "id: another question had it, a number added (--feedback)"

LEAST_REPLAY = 100
"""Old questions to mix with verdicts, at least: fewer would be learned by heart."""


def provenance_path(path: str | Path) -> Path:
    """Return where it is told whose the answers of an exported file are."""
    path = Path(path)
    return path.with_name(f"{path.stem}.provenance.json")


def export(feedback: Feedback, path: str | Path) -> int:
    """Write the questions whose right answer is known as SQuAD 2.0 JSON; return their number.

    Beside it, in ``provenance_path(path)``, stands who said so, when and about which model, and
    which verdicts hold no answer and are therefore left out.

    Raises:
        ValueError: no verdict holds an answer, or the file cannot be written.
    """
    latest = feedback.latest().values()
    answered = [v for v in latest if v.answers]
    if not answered:
        raise ValueError("there is nothing to export: no verdict says yet what a right answer is")
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    ids: set[str] = set()
    sources = []
    for verdict in answered:
        record = verdict.record()
        id_ = _free_id(verdict.id, ids)
        ids.add(id_)
        texts, starts = record["answers"]["text"], record["answers"]["answer_start"]
        pairs = zip(texts, starts, strict=True)
        question = {
            "id": id_,
            "question": verdict.question,
            "answers": [{"text": text, "answer_start": start} for text, start in pairs],
            "is_impossible": not texts,
        }
        paragraphs = articles.setdefault(record["title"], {})
        paragraphs.setdefault(verdict.context, []).append(question)
        sources.append({"exported_id": id_, **_source(verdict)})
    data = [
        {"title": title, "paragraphs": [{"context": c, "qas": qas} for c, qas in contexts.items()]}
        for title, contexts in articles.items()
    ]
    path = Path(path)
    with one_line_errors(path):
        write_json(path, {"version": "v2.0", "data": data})
        several, agreed = feedback.agreement()
        left_out = [_source(v) for v in latest if not v.answers]
        content = {"questions": len(answered), "conflicts": several - agreed}
        write_json(provenance_path(path), content | {"answers": sources, "left_out": left_out})
    return len(answered)


def _source(verdict: Verdict) -> dict[str, Any]:
    content = dataclasses.asdict(verdict)
    return {name: content[name] for name in content if name not in ("context", "golds", "undoes")}


def import_file(source: str | Path, path: str | Path, reviewer: str) -> tuple[int, int]:
    """Append the questions of a file that was labelled elsewhere, of any form, as verdicts.

    Those of another feedback file are appended as they are.

    Returns:
        How many were appended, and how many stood there already, with the same answer.

    Raises:
        ValueError: the file is not all usable, or one of the two cannot be read or written.
    """
    source = Path(source)
    if _holds_verdicts(source):
        theirs, torn = read_lines(source)
        if torn:
            raise ValueError(f"{source}: the last line is cut off: mend it, or delete it")
        known = {v.uid for v in read_lines(path)[0]}
        new = [v for v in theirs if v.uid not in known]
        if new:
            append(path, new)
        return len(new), len(theirs) - len(new)
    records = Cleaner().clean(read_rows(source), str(source), "train", source.name)
    there = load(path).latest()
    verdicts = []
    for record in records:
        texts, starts = record["answers"]["text"], record["answers"]["answer_start"]
        verdict = Verdict(
            id=record["id"], title=record["title"], context=record["context"],
            question=record["question"], verdict="marked" if texts else "unanswerable",
            corrected=texts[0] if texts else None, corrected_start=starts[0] if starts else None,
            golds=record["answers"], reviewer=reviewer, note=f"imported from {source.name}",
        )  # fmt: skip
        before = there.get(verdict.key)
        if before is None or not before.answers or before.corrected != verdict.corrected:
            verdicts.append(verdict)
    if verdicts:
        append(path, verdicts)
    return len(verdicts), len(records) - len(verdicts)


def _holds_verdicts(source: Path) -> bool:
    """Tell a feedback file from one of questions, by its first line."""
    try:
        with source.open("rb") as file:
            values = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):  # what reads questions says so
        return False
    return isinstance(values, dict) and values.keys() >= OF_VERDICTS


def merge(
    splits: Mapping[str, Sequence[Record]],
    feedback: Feedback,
    file: str,
    cleaner: Cleaner,
    *,
    replay: float | None = None,
    seed: int = 0,
) -> dict[str, list[Record]]:
    """Put the questions with a verdict into the train split, with the reviewers' answers.

    They leave the split that they were in, so that no figure is taken on what was trained. What was
    done is added to the account of the ``cleaner``.

    Args:
        splits: records by split.
        feedback: the verdicts; the latest of a question counts.
        file: what messages call them.
        cleaner: keeps account.
        replay: keep of the old training questions only so many for each question with a verdict,
            and ``LEAST_REPLAY`` at least: whole paragraphs at random. None: keep all.
        seed: of that choice.

    Raises:
        ValueError: no verdict holds an answer.
    """
    answered = [v for v in feedback.latest().values() if v.answers]
    if not answered:
        raise ValueError(f"{file} holds no verdict that says what a right answer is: review some")
    merged, taken = _take_out(splits, {v.key for v in answered})
    ids = {r["id"] for records in merged.values() for r in records}
    corrected = _corrected(answered, taken, ids, file, cleaner)
    old_ones = merged.get("train", [])
    if replay is not None:
        old_ones = _sample(old_ones, max(LEAST_REPLAY, round(replay * len(corrected))), seed)
    merged["train"] = corrected + old_ones
    return {name: records for name, records in merged.items() if records}


def _corrected(
    answered: Sequence[Verdict],
    taken: Mapping[tuple[str, str, str], Record],
    ids: set[str],
    file: str,
    cleaner: Cleaner,
) -> list[Record]:
    """Return the questions with the reviewers' answers, under ids of their own; see ``merge``."""
    corrected: list[Record] = []
    for verdict in answered:
        record: Record = verdict.record()
        old = taken.get(verdict.key)
        if old is not None and _answer(old) == _answer(record):
            record, change = old, CONFIRMED
        else:
            change = ADDED if old is None else CHANGED
        record = dict(record, id=_free_id(record["id"], ids))
        for kind in [change] + [ID_NUMBERED] * (record["id"] != verdict.id):
            cleaner.changed[kind] += 1
            cleaner.first.setdefault(kind, f"{file}, id {verdict.id!r}")
        ids.add(record["id"])
        corrected.append(record)
    return corrected


def _take_out(
    splits: Mapping[str, Sequence[Record]], keys: Set[Key]
) -> tuple[dict[str, list[Record]], dict[Key, Record]]:
    """Return the splits without the questions of these keys, and those."""
    merged: dict[str, list[Record]] = {}
    taken: dict[Key, Record] = {}
    for name, records in splits.items():
        found = {key: r for r in records if (key := key_of(r)) in keys}
        taken |= found
        merged[name] = [r for r in records if key_of(r) not in found]
    return merged, taken


def _answer(record: Record) -> tuple[str, list[int]]:
    """Return what a record teaches, and where it stands."""
    return gold_answer(record), record["answers"]["answer_start"][:1]


def _free_id(id_: str, ids: set[str]) -> str:
    free, number = id_, 2
    while free in ids:
        free, number = f"{id_}-{number}", number + 1
    return free


def _sample(records: Sequence[Record], questions: int, seed: int) -> list[Record]:
    """Return whole paragraphs at random that hold so many questions, or a few more."""
    paragraphs = ((record["title"], record["context"]) for record in records)
    return [records[index] for index in paragraphs_at_random(paragraphs, questions, seed)]
