"""One row per question: what a row of the result file holds, and other thresholds for it.

In memory a row is a dict with the keys of ``COLUMNS``: "answers" is a list of strings, "n_best" a
list of {text, probability, log_prob} or None, "na_prob", "score" and the log-probabilities are
floats or None, "best_span" is a string or None, "Exact match" a bool, and all others are strings.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, get_args

from llama_squad.answers import NO_ANSWER, Answer, AnswerState, format_answer
from llama_squad.calibration import Calibration
from llama_squad.metrics import is_exact_match

Row = dict[str, Any]

SEED_COLUMNS = ("Prompt", "Correct answers", "Model answer", "Full response", "Exact match")
"""The columns of the original repository's result file."""

_FIRST_COLUMNS = (
    *("id", "title", "question", "answers", "prediction_text", "state", "completion"),
    *("na_prob", "score"),
)

SPAN_COLUMNS = ("best_span", "best_span_log_prob", "no_answer_log_prob", "n_best")

COLUMNS = (*_FIRST_COLUMNS, *SPAN_COLUMNS, *SEED_COLUMNS)

OLDER_COLUMNS = (*_FIRST_COLUMNS, *SEED_COLUMNS)
"""The columns of our files before rows kept their best span."""

STATES: tuple[AnswerState, ...] = get_args(AnswerState)

NUMBERS = ("na_prob", "score", "best_span_log_prob", "no_answer_log_prob")


def make_row(
    record: Mapping[str, Any],
    completion: str,
    answer: Answer,
    prompt_text: str,
    na_prob: float | None = None,
    *,
    score: float | None = None,
    best_span: str | None = None,
    best_span_log_prob: float | None = None,
    no_answer_log_prob: float | None = None,
    n_best: Sequence[Mapping[str, Any]] | None = None,
) -> Row:
    """Make the row of one question.

    Args:
        record: {id, title, question, answers: {"text": [...], "answer_start": [...]}}.
        completion: the model's whole reply, or why there is none (``FAILED``).
        answer: what the reply says (``extract_answer``), after any threshold.
        prompt_text: the prompt as the model saw it.
        na_prob: probability that there is no answer.
        score: log-probability of the reply, or whatever the search ranks by.
        best_span: what the model answers if it must not abstain, also where it does.
        best_span_log_prob: log-probability of the reply that holds it.
        no_answer_log_prob: log-probability of the reply that abstains.
        n_best: the likeliest spans, best first.
    """
    golds = list(record["answers"]["text"])
    return {
        "id": record["id"],
        "title": record.get("title", ""),
        "question": record["question"],
        "answers": golds,
        "prediction_text": answer.text,
        "state": answer.state,
        "completion": completion,
        "na_prob": na_prob,
        "score": score,
        "best_span": best_span,
        "best_span_log_prob": best_span_log_prob,
        "no_answer_log_prob": no_answer_log_prob,
        "n_best": None if n_best is None else [dict(span) for span in n_best],
        "Prompt": prompt_text,
        "Correct answers": json.dumps(golds or [NO_ANSWER], ensure_ascii=False),
        "Model answer": answer.text,
        "Full response": completion,
        "Exact match": is_exact_match(answer, golds),
    }


def row_answer(row: Row) -> Answer:
    """Return what the reply of a row says."""
    return Answer(row["state"], row["prediction_text"])


def best_answer(row: Row) -> Answer | None:
    """Return what a row would say if it must not abstain; None where the row does not tell.

    Only rows of older files, in which an abstention replaced the best span, do not tell.
    """
    if row["best_span"] is not None:
        return Answer("answer", row["best_span"])
    thresholded = row["state"] == "no_answer" and row["na_prob"] is not None
    if thresholded and row["no_answer_log_prob"] is None:
        return None
    return row_answer(row)  # an abstention here: the context holds no span, or none was weighed


def rethreshold(row: Row, threshold: float) -> Row:
    """Return the row that another threshold would have made: of a failed question, the same.

    Raises:
        ValueError: the row has no na_prob, or does not tell its best span.
    """
    if row["state"] == "failed":
        return row
    best = best_answer(row)
    if row["na_prob"] is None:
        raise ValueError(
            f"question {row['id']} has no na_prob to compare with a threshold: free decoding, "
            "servers and the original's files have none"
        )
    if best is None:
        raise ValueError(
            f"question {row['id']} abstains, and this older file does not hold what it would have "
            "answered: evaluate again for a file that does"
        )
    abstains = row["na_prob"] > threshold
    answer = Answer("no_answer", NO_ANSWER) if abstains else best
    if answer == row_answer(row):
        return row
    completion = format_answer(answer.text)
    return row | {
        "prediction_text": answer.text,
        "state": answer.state,
        "completion": completion,
        "score": row["no_answer_log_prob" if abstains else "best_span_log_prob"],
        "Model answer": answer.text,
        "Full response": completion,
        "Exact match": is_exact_match(answer, row["answers"]),
    }


def log_odds(row: Row) -> float | None:
    """Return the log-odds of no answer; None where no span was found, or the question failed."""
    best, none = row["best_span_log_prob"], row["no_answer_log_prob"]
    return None if best is None or none is None else none - best


def recalibrate(row: Row, calibration: Calibration) -> Row:
    """Return the row with na_prob as calibrated, whatever it was; the same without log-odds."""
    odds = log_odds(row)
    return row if odds is None else row | {"na_prob": calibration(odds)}


def _csv(records: Iterable[Sequence[Any]]) -> bytes:
    """Write CSV records. A lone surrogate, which UTF-8 cannot hold, is written as its escape."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(records)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


def _json(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def encode_rows(rows: Iterable[Row]) -> bytes:
    cells = (row | {name: _json(row[name]) for name in ("answers", "n_best")} for row in rows)
    return _csv([row[name] for name in COLUMNS] for row in cells)


HEADER = _csv([COLUMNS])

OLDER_HEADER = _csv([OLDER_COLUMNS])


def whole_records(file: BinaryIO) -> Iterator[bytes]:
    """Yield the complete records: those that end in a newline outside of quotes.

    A newline is outside of quotes where an even number of quotes stands before it (a quote inside
    a cell is written twice), so bytes are enough, even where a character is torn in two.
    """
    lines, quotes = list[bytes](), 0
    for line in file:
        lines.append(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 and line.endswith(b"\n"):
            yield b"".join(lines)
            lines.clear()


def parse_record(record: bytes) -> list[str]:
    return next(csv.reader([record.decode("utf-8")], strict=True))
