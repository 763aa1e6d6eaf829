"""The result file: one CSV row a question, appended durably, resumed, merged and summarised.

Beside ``results.csv`` stands ``results.config.json``, the resolved configuration that made it, so
that rows of two configurations never meet in one file. All cells are quoted, so that a reply may
hold anything: quotes, newlines, NUL bytes, unicode line separators.

In memory a row is a dict with the keys of ``COLUMNS``: "answers" is a list of strings, "na_prob"
and "score" are floats or None, "Exact match" is a bool, and all others are strings.
"""

import ast
import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llama_squad.answers import MALFORMED, NO_ANSWER, Answer
from llama_squad.config import write_json
from llama_squad.metrics import (
    Interval,
    is_exact_match,
    mean_interval,
    raw_scores,
    score_predictions,
    strict_counts,
    wilson_interval,
)

Row = dict[str, Any]

SEED_COLUMNS = ("Prompt", "Correct answers", "Model answer", "Full response", "Exact match")
"""The columns of the original repository's result file."""
COLUMNS = (
    *("id", "title", "question", "answers", "prediction_text", "state", "completion"),
    *("na_prob", "score"),
    *SEED_COLUMNS,
)
_STATES = ("answer", "no_answer", "malformed")


def make_row(
    record: Mapping[str, Any],
    completion: str,
    answer: Answer,
    prompt_text: str,
    na_prob: float | None = None,
    *,
    score: float | None = None,
) -> Row:
    """Make the row of one question.

    Args:
        record: {id, title, question, answers: {"text": [...], "answer_start": [...]}}.
        completion: the model's whole reply.
        answer: what the reply says (``extract_answer``), after any threshold.
        prompt_text: the prompt as the model saw it.
        na_prob: probability that there is no answer.
        score: log-probability of the reply, or whatever the search ranks by.
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
        "Prompt": prompt_text,
        "Correct answers": json.dumps(golds or [NO_ANSWER], ensure_ascii=False),
        "Model answer": answer.text,
        "Full response": completion,
        "Exact match": is_exact_match(answer, golds),
    }


def row_answer(row: Row) -> Answer:
    """Return what the reply of a row says."""
    return Answer(row["state"], row["prediction_text"])


def _csv(records: Iterable[Sequence[Any]]) -> bytes:
    """Write CSV records. A lone surrogate, which UTF-8 cannot hold, is written as its escape."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(records)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


def _encode(rows: Iterable[Row]) -> bytes:
    cells = (row | {"answers": json.dumps(row["answers"], ensure_ascii=False)} for row in rows)
    return _csv([row[name] for name in COLUMNS] for row in cells)


_HEADER = _csv([COLUMNS])


def config_path(path: str | Path) -> Path:
    """Return where the settings of a result file are: ``results.config.json`` beside it."""
    return Path(path).with_suffix(".config.json")


class ResultsFile:
    """A result file open for appending, by one process at a time; use it in a ``with`` block.

    A file that exists and was made with the same settings is gone on with: ``done`` is the set of
    ids it holds, and a last row that a killed process left half-written is cut off. Each ``append``
    is on disk when it returns.

    Args:
        path: the CSV file; its folder is made.
        settings: the resolved configuration (JSON-able), saved in ``config_path(path)``.
        volatile: names of settings that may differ between runs of one file (versions, batch size).
        overwrite: start anew, whatever the file holds.

    Raises:
        ValueError: on entering, where another process writes the file, or it was made with other
            settings, or it is no result file; the message gives the cure.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        volatile: Collection[str] = (),
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.done: set[str] = set()
        self._settings = json.loads(json.dumps(settings, default=str))
        self._volatile = set(volatile)
        self._overwrite = overwrite
        self._fd = -1

    def __enter__(self) -> Self:
        """Open, lock and check the file, and cut off a torn last row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            if self._overwrite:
                os.ftruncate(self._fd, 0)
            content = self.path.read_bytes()
            if _HEADER.startswith(content):  # new, or killed before its first row
                os.ftruncate(self._fd, 0)
                write_json(config_path(self.path), self._settings)
                self._write(_HEADER)
            else:
                self._resume(content)
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file, which gives up the lock."""
        os.close(self._fd)

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows, and return when they are on disk.

        Raises:
            ValueError: a row's id is in the file already.
        """
        ids = [row["id"] for row in rows]
        doubled = self.done.intersection(ids) or [i for i, n in Counter(ids).items() if n > 1]
        if doubled:
            raise ValueError(f"{self.path} already has a row for question {min(doubled)}")
        self._write(_encode(rows))
        self.done.update(ids)

    def _write(self, content: bytes) -> None:
        while content:
            content = content[os.write(self._fd, content) :]
        os.fsync(self._fd)

    def _lock(self) -> None:
        import fcntl  # here, so that Windows can at least summarise

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing {self.path}: wait for it, or choose another --output"
            ) from error

    def _resume(self, content: bytes) -> None:
        if not content.startswith(_HEADER):
            raise ValueError(
                f"{self.path} exists and is no result file of this program: choose another "
                "--output file, or --overwrite it"
            )
        self._check_settings()
        whole = _whole_records(content)
        if whole < len(content):
            os.ftruncate(self._fd, whole)
            os.fsync(self._fd)
        self.done = {row["id"] for row in _decode(content[:whole], self.path)}

    def _check_settings(self) -> None:
        cure = "choose another --output file, or --overwrite it"
        try:
            saved = json.loads(config_path(self.path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds results, but their settings cannot be read from "
                f"{config_path(self.path)} ({error}): {cure}"
            ) from error
        differences = _differences(saved, self._settings, self._volatile)
        if differences:
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(differences)}): {cure}"
            )


def _whole_records(content: bytes) -> int:
    """Return the length of the complete records: those that end in a newline outside of quotes.

    A newline is outside of quotes where an even number of quotes stands before it (a quote inside
    a cell is written twice), so bytes are enough, even where a character is torn in two.
    """
    quotes_before, end = content.count(b'"'), len(content)
    while end > 0:
        newline = content.rfind(b"\n", 0, end)
        quotes_before -= content.count(b'"', newline + 1, end)
        if quotes_before % 2 == 0:
            return newline + 1
        end = newline
    return 0


def _differences(saved: Any, settings: Any, volatile: Collection[str], name: str = "") -> list[str]:
    """Say which settings differ, as "key: saved value, now value"; nested keys are dotted."""
    if name in volatile or saved == settings:
        return []
    if isinstance(saved, dict) and isinstance(settings, dict):
        keys = sorted(saved.keys() | settings.keys())
        prefix = f"{name}." if name else ""
        absent = "(absent)"
        return [
            line
            for key in keys
            for line in _differences(
                saved.get(key, absent), settings.get(key, absent), volatile, prefix + key
            )
        ]
    return [f"{name}: {saved!r} in the file, {settings!r} now"]


def read_results(path: str | Path) -> list[Row]:
    """Read a result file, ours or one of the original repository (its five columns alone).

    In a row of the original, the id is the row's number, and what its columns do not tell (title,
    question, na_prob, score) is empty. A torn last row is left out.

    Raises:
        ValueError: no such file, no rows, not a result file, a damaged row, or an id twice.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}. test_llama_squad.py writes such a file "
            "(--output)"
        ) from error
    # A file of another program need not end in a newline; one of ours that does not is torn.
    whole = _whole_records(content) if content.startswith(_HEADER) else len(content)
    rows = _decode(content[:whole], path)
    if not rows:
        raise ValueError(f"{path} holds no results: let test_llama_squad.py finish its first batch")
    doubled = [id_ for id_, n in Counter(row["id"] for row in rows).items() if n > 1]
    if doubled:
        raise ValueError(f"{path} has {len(doubled):,} ids twice (the first: {doubled[0]})")
    return rows


def _decode(content: bytes, path: Path) -> list[Row]:
    """Parse a whole file's bytes. Raises ValueError, naming ``path``, where they are not ours."""
    limit = csv.field_size_limit(sys.maxsize)  # prompts may be longer than the default 128 KiB
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = tuple(next(lines, ()))
        read_row = _row_reader(header, path)
        rows = []
        for number, cells in enumerate(lines, 1):
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells instead of {len(header)} in row {number}")
            try:
                rows.append(read_row(number, dict(zip(header, cells, strict=True))))
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"row {number}: {error}") from error
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is damaged or no result file: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _row_reader(header: Sequence[str], path: Path) -> Callable[[int, dict[str, str]], Row]:
    if set(COLUMNS) <= set(header):
        return _read_own_row
    if set(SEED_COLUMNS) <= set(header):
        return _read_seed_row
    if not header:
        raise ValueError("it is empty")
    missing = [name for name in COLUMNS if name not in header]
    raise ValueError(f"it has no column {', '.join(missing)}")


def _read_own_row(number: int, cells: dict[str, str]) -> Row:
    row: Row = dict(cells)
    row["answers"] = _strings(json.loads(cells["answers"]), "answers")
    if row["state"] not in _STATES:
        raise ValueError(f"state is {row['state']!r}, not one of {', '.join(_STATES)}")
    for name in ("na_prob", "score"):
        row[name] = float(cells[name]) if cells[name] else None
    row["Exact match"] = cells["Exact match"] == "True"
    return row


def _read_seed_row(number: int, cells: dict[str, str]) -> Row:
    """Derive a row from the original's columns, whose answers are JSON or a Python list."""
    correct = cells["Correct answers"]
    try:
        texts = _strings(json.loads(correct), "Correct answers")
    except json.JSONDecodeError:
        texts = _strings(ast.literal_eval(correct), "Correct answers")
    text = cells["Model answer"]
    answer = Answer("answer", text) if text else MALFORMED
    if text == NO_ANSWER:
        answer = Answer("no_answer", NO_ANSWER)
    record = {
        "id": str(number),
        "question": "",
        "answers": {"text": [] if texts == [NO_ANSWER] else texts},
    }
    return make_row(record, cells["Full response"], answer, cells["Prompt"])


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is {value!r:.80}, not a list of strings")
    return value


def merge_results(
    shard_paths: Sequence[str | Path],
    path: str | Path,
    order: Sequence[str],
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Merge the files of several processes into ``path``, written aside and then renamed.

    Args:
        shard_paths: result files; ``path`` itself may be one. A question that is in several (after
            a resume with another number of processes) is taken from the first.
        path: the merged file.
        order: all ids of the dataset, in its order, which the merged rows take.
        settings: saved beside the merged file (default: those beside the first shard).

    Returns:
        the number of rows written: fewer than ``order`` has where questions are still open.

    Raises:
        ValueError: a shard is no result file, or holds an id that is not in ``order``.
    """
    path, rows = Path(path), dict[str, Row]()
    for shard in shard_paths:
        for row in _decode_shard(Path(shard)):
            rows.setdefault(row["id"], row)
    strangers = rows.keys() - set(order)
    if strangers:
        raise ValueError(
            f"{len(strangers):,} rows of {', '.join(map(str, shard_paths))} are not of this "
            f"dataset (the first: {min(strangers)}): delete those files, or choose another --output"
        )
    if settings is None:
        settings = json.loads(config_path(shard_paths[0]).read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(_HEADER + _encode(rows[id_] for id_ in order if id_ in rows))
    write_json(config_path(path), settings)
    aside.replace(path)
    return len(rows)


def _decode_shard(path: Path) -> list[Row]:
    content = path.read_bytes()
    return _decode(content[: _whole_records(content)], path)


def write_official(rows: Sequence[Row], directory: str | Path) -> None:
    """Write the official scorer's predictions.json and, where all rows have one, na_prob.json.

    No answer is "" there; a malformed reply is ``MALFORMED_PREDICTION``, which scores as wrong.
    """
    directory = Path(directory)
    predictions, na_probs = official_predictions(rows)
    write_json(directory / "predictions.json", predictions)
    if na_probs is None:  # none may stay there from another run
        (directory / "na_prob.json").unlink(missing_ok=True)
    else:
        write_json(directory / "na_prob.json", na_probs)


def official_predictions(rows: Sequence[Row]) -> tuple[dict[str, str], dict[str, float] | None]:
    """Return {id: official text} and, where every row has one, {id: na_prob}, else None."""
    predictions = {row["id"]: row_answer(row).official for row in rows}
    if any(row["na_prob"] is None for row in rows):
        return predictions, None
    return predictions, {row["id"]: row["na_prob"] for row in rows}


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute the figures of one result file, in per cent.

    Returns:
        "n"; "states" (count of each); ``STRICT_COLUMNS`` (None where no question counts for one);
        the official figures of ``evaluate_predictions`` over the rows' own gold answers, with
        best_* where all rows have a na_prob; and "intervals": figure → [low, high] at 95 %,
        Wilson's for proportions and the normal one for F1 (see ``llama_squad.metrics``).

    The predictions are those of the file, where a threshold has been applied already: best_exact
    says what a *lower* threshold would have given.
    """
    golds = {row["id"]: row["answers"] for row in rows}
    predictions, na_probs = official_predictions(rows)
    figures: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    counts = strict_counts([row_answer(row) for row in rows], [row["answers"] for row in rows])
    for name, (successes, trials) in counts.items():
        figures[name] = 100.0 * successes / trials if trials else None
        if trials:
            intervals[name] = wilson_interval(successes, trials)
    scores = raw_scores(golds, predictions)
    official = score_predictions(golds, predictions, na_probs, raw=scores)
    for prefix, wanted in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        chosen = [scores[id_] for id_, texts in golds.items() if bool(texts) in wanted]
        if chosen:
            exact = sum(exact for exact, _ in chosen)
            intervals[f"{prefix}exact"] = wilson_interval(exact, len(chosen))
            intervals[f"{prefix}f1"] = mean_interval([f1 for _, f1 in chosen])
    states = Counter(row["state"] for row in rows)
    return {
        "n": len(rows),
        "states": {state: states[state] for state in _STATES},
        **figures,
        **official,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
    }
