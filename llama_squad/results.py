"""The result file: one CSV row per question, appended durably, resumed, merged and summarised.

Beside ``results.csv`` stands ``results.csv.config.json``, the resolved configuration that made it,
so that rows of two configurations never meet in one file. All cells are quoted, so that a reply may
hold anything: quotes, newlines, NUL bytes, unicode line separators.

In memory a row is a dict with the keys of ``COLUMNS``: "answers" is a list of strings, "n_best" a
list of {text, probability, log_prob} or None, "na_prob", "score" and the log-probabilities are
floats or None, "best_span" is a string or None, "Exact match" a bool, and all others are strings.
Files are read and written a row at a time: what is kept of each is its id, or a few figures.
"""

import ast
import contextlib
import csv
import errno
import io
import itertools
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, get_args

from llama_squad.answers import MALFORMED, NO_ANSWER, Answer, State, format_answer
from llama_squad.config import write_json
from llama_squad.metrics import (
    Interval,
    Outcome,
    ScoreTable,
    is_exact_match,
    mean_interval,
    score_answer,
    strict_counts,
    strict_outcome,
    wilson_interval,
)

Row = dict[str, Any]

SEED_COLUMNS = ("Prompt", "Correct answers", "Model answer", "Full response", "Exact match")
"""The columns of the original repository's result file."""
_FIRST_COLUMNS = (
    *("id", "title", "question", "answers", "prediction_text", "state", "completion"),
    *("na_prob", "score"),
)
_SPAN_COLUMNS = ("best_span", "best_span_log_prob", "no_answer_log_prob", "n_best")
COLUMNS = (*_FIRST_COLUMNS, *_SPAN_COLUMNS, *SEED_COLUMNS)
_OLDER_COLUMNS = (*_FIRST_COLUMNS, *SEED_COLUMNS)
"""The columns of our files before rows kept their best span."""
_STATES: tuple[State, ...] = get_args(State)
_NUMBERS = ("na_prob", "score", "best_span_log_prob", "no_answer_log_prob")


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


def _csv(records: Iterable[Sequence[Any]]) -> bytes:
    """Write CSV records. A lone surrogate, which UTF-8 cannot hold, is written as its escape."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(records)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


def _json(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _encode(rows: Iterable[Row]) -> bytes:
    cells = (row | {name: _json(row[name]) for name in ("answers", "n_best")} for row in rows)
    return _csv([row[name] for name in COLUMNS] for row in cells)


_HEADER = _csv([COLUMNS])
_OLDER_HEADER = _csv([_OLDER_COLUMNS])


def config_path(path: str | Path) -> Path:
    """Return where the settings of a result file are: ``results.csv.config.json`` beside it."""
    path = Path(path)
    return path.with_name(f"{path.name}.config.json")


@contextlib.contextmanager
def one_line_errors(path: str | Path) -> Iterator[None]:
    """Turn an error of the operating system into one line about ``path``, with its cure.

    Raises:
        ValueError: in place of OSError.
    """
    try:
        yield
    except OSError as error:
        cure = "choose another place for it"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cure = "make room, and the same command goes on: what was written whole is kept"
        raise ValueError(f"cannot write {path}: {error.strerror}; {cure}") from error


def check_writable(path: str | Path) -> None:
    """Find out, before anything costly, whether a result file can be written.

    Its folder is made; the file itself is not touched, since another process may be writing it.

    Raises:
        ValueError: no permission, no room, or a folder in its place.
    """
    path = Path(path)
    with one_line_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            kind = errno.EISDIR if path.is_dir() else errno.EINVAL
            raise OSError(kind, "it is no regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        probe = path.with_name(f".{path.name}.probe{os.getpid()}")
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


class ResultsFile:
    """A result file open for appending, by one process at a time; use it in a ``with`` block.

    A file that exists and was made with the same settings is resumed: ``done`` is the set of ids
    that it holds a reply for, ``failed`` that of the questions without one, and a last row that a
    killed process left half-written is cut off. Each ``append`` is on disk when it returns.

    The lock is held until the block ends, also where ``gather`` puts another file in the place of
    this one.

    Args:
        path: the CSV file; its folder is made.
        settings: the resolved configuration (JSON-able), saved in ``config_path(path)``.
        volatile: names of settings that may differ between runs of one file (versions, ...).
        overwrite: start anew, whatever the file holds.

    Raises:
        ValueError: on entering, where another process writes the file, or it was made with other
            settings, or it is no result file, or it cannot be written; the message gives the cure.
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
        self.failed: set[str] = set()
        self._settings = json.loads(json.dumps(settings, default=str))
        self._volatile = set(volatile)
        self._overwrite = overwrite
        self._fd = -1

    def __enter__(self) -> Self:
        """Open, lock and check the file, and cut off a torn last row."""
        with one_line_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = _open_locked(self.path)
        try:
            with one_line_errors(self.path):
                if self._overwrite:
                    os.ftruncate(self._fd, 0)
                if _HEADER.startswith(os.pread(self._fd, len(_HEADER) + 1, 0)):
                    # New, or killed before its first row.
                    os.ftruncate(self._fd, 0)
                    write_json(config_path(self.path), self._settings)
                    _write(self._fd, [_HEADER])
                else:
                    self._resume()
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
            ValueError: a row's id is in the file already, or the disk is full.
        """
        ids = [row["id"] for row in rows]
        doubled = [
            id_
            for id_, number in Counter(ids).items()
            if number > 1 or id_ in self.done or id_ in self.failed
        ]
        if doubled:
            raise ValueError(f"{self.path} already has a row for question {min(doubled)}")
        with one_line_errors(self.path):
            _write(self._fd, [_encode(rows)])
        for row in rows:
            self._add(row["id"], row["state"] == "failed")

    def gather(self, shards: Sequence[Path], order: Sequence[str]) -> None:
        """Take in the rows of other result files, and put all into the order of the dataset.

        The whole is written aside and then renamed, so that a reader never sees half of it. Of a
        question that is in several files the first reply counts, and a failed row gives way.

        Args:
            shards: files of the same columns, which no one writes.
            order: all ids of the dataset, in its order.

        Raises:
            ValueError: a file is damaged, or holds an id that is not in ``order``; the disk is
                full.
        """
        here = list(_places(self.path))
        places: dict[str, _Place] = {}
        for place in itertools.chain(here, *map(_places, shards)):
            if place.id not in places or places[place.id].failed:
                places[place.id] = place
        strangers = places.keys() - set(order)
        if strangers:
            raise ValueError(
                f"{len(strangers):,} rows of {', '.join(map(str, [self.path, *shards]))} are not "
                f"of this dataset (the first: {min(strangers)}): delete those files, or choose "
                "another --output"
            )
        wanted = [places[id_] for id_ in order if id_ in places]
        if wanted != here:
            with one_line_errors(self.path):
                self._replace(_copy(wanted))
        self.done, self.failed = set(), set()
        for place in wanted:
            self._add(place.id, place.failed)

    def check_complete(self, order: Sequence[str]) -> None:
        """See to it that the file on disk has exactly one row for each question.

        Raises:
            ValueError: it has not.
        """
        counts = Counter(place.id for place in _places(self.path))
        wrong = [id_ for id_ in order if counts[id_] != 1]
        if wrong or len(counts) != len(order):
            raise ValueError(
                f"{self.path} should have one row for each of {len(order):,} questions, but has "
                f"{counts.total():,} rows for {len(counts):,}"
                + f" (look at {wrong[0]})" * bool(wrong)
                + ": was it changed by hand? Run the same command again, or --overwrite it"
            )

    def _add(self, id_: str, failed: bool) -> None:
        (self.failed if failed else self.done).add(id_)

    def _replace(self, records: Iterable[bytes]) -> None:
        """Put another file in the place of this one, and keep the lock."""
        aside = self.path.with_name(f".{self.path.name}.merged")
        aside.unlink(missing_ok=True)  # of a run that was killed
        fd = _open_locked(aside)
        try:
            _write(fd, itertools.chain([_HEADER], records))
            aside.replace(self.path)
        except BaseException:
            aside.unlink(missing_ok=True)
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd

    def _resume(self) -> None:
        head = os.pread(self._fd, len(_HEADER), 0)
        if head.startswith(_OLDER_HEADER):
            raise ValueError(
                f"{self.path} is of an earlier version, whose rows do not hold "
                f"{', '.join(_SPAN_COLUMNS)}: it can be summarised, but not resumed. Choose "
                "another --output file, or --overwrite it"
            )
        if head != _HEADER:
            raise ValueError(
                f"{self.path} exists and is no result file of this program: choose another "
                "--output file, or --overwrite it"
            )
        self._check_settings()
        end = len(_HEADER)
        for place in _places(self.path):
            end = place.end
            self._add(place.id, place.failed)
        if end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, end)
            os.fsync(self._fd)

    def _check_settings(self) -> None:
        cure = "give the same again, choose another --output file, or --overwrite it"
        try:
            saved = json.loads(config_path(self.path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds results, but their settings cannot be read from "
                f"{config_path(self.path)} ({error}): {cure}"
            ) from error
        different = differences(saved, self._settings, self._volatile)
        if different:
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(different)}): {cure}"
            )


def _open_locked(path: Path) -> int:
    """Open a file for appending, made where there is none, and lock it.

    Raises:
        ValueError: another process has the lock.
    """
    import fcntl  # here, so that Windows can at least summarise

    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except BlockingIOError as error:
            os.close(fd)
            raise ValueError(
                f"another process is writing {path}: wait for it, or choose another --output"
            ) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # between opening and locking, another file has come in its place


def _write(fd: int, parts: Iterable[bytes]) -> None:
    """Write all parts, and return when they are on disk."""
    for part in parts:
        content = memoryview(part)
        while content:
            content = content[os.write(fd, content) :]
    os.fsync(fd)


class _Place(NamedTuple):
    """Where a file holds the row of a question: bytes ``start`` to ``end``."""

    id: str
    failed: bool
    path: Path
    start: int
    end: int


def _places(path: Path) -> Iterator[_Place]:
    """Find the whole rows of a file of ours. Raises ValueError where one is damaged."""
    with path.open("rb") as file, _named_errors(path):
        start = len(file.readline())
        for number, record in enumerate(_whole_records(file), 1):
            row = _read_row(_read_own_row, number, COLUMNS, _parse(record))
            yield _Place(row["id"], row["state"] == "failed", path, start, start + len(record))
            start += len(record)


def _copy(places: Iterable[_Place]) -> Iterator[bytes]:
    """Read rows, as bytes."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for place in places:
            if place.path not in files:
                files[place.path] = stack.enter_context(place.path.open("rb"))
            files[place.path].seek(place.start)
            yield files[place.path].read(place.end - place.start)


def _whole_records(file: BinaryIO) -> Iterator[bytes]:
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


def _parse(record: bytes) -> list[str]:
    return next(csv.reader([record.decode("utf-8")], strict=True))


def differences(
    saved: Any, settings: Any, volatile: Collection[str] = (), name: str = ""
) -> list[str]:
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
            for line in differences(
                saved.get(key, absent), settings.get(key, absent), volatile, prefix + key
            )
        ]
    return [f"{name}: {saved!r} in the file, {settings!r} now"]


def iter_results(path: str | Path) -> Iterator[Row]:
    """Read a result file row by row, ours or one of the original repository (five columns).

    In a row of the original, the id is the row's number, and what its columns do not tell (title,
    question, na_prob, score) is empty. So is what older files of ours do not tell (best_span and
    the like). A torn last row is left out.

    Raises:
        ValueError: no such file, no rows, not a result file, a damaged row, or an id twice.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}. test_llama_squad.py writes such a file "
            "(--output)"
        ) from error
    # Of the ids a hash is kept: of a million rows, two would have the same once in 30 million.
    ids: set[int] = set()
    with file, _named_errors(path):
        lines = _lines(file)
        header = tuple(next(lines, ()))
        reader = _row_reader(header)
        for number, cells in enumerate(lines, 1):
            row = _read_row(reader, number, header, cells)
            if hash(row["id"]) in ids:
                raise ValueError(f"row {number}: question {row['id']} is there twice")
            ids.add(hash(row["id"]))
            yield row
    if not ids:
        raise ValueError(f"{path} holds no results: let test_llama_squad.py finish its first batch")


def read_results(path: str | Path) -> list[Row]:
    """Read a whole result file; see ``iter_results``."""
    return list(iter_results(path))


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name the file that is damaged."""
    csv.field_size_limit(sys.maxsize)  # prompts may be longer than the default 128 KiB
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is damaged or no result file: {error}") from error


def _lines(file: BinaryIO) -> Iterator[list[str]]:
    """Yield the cells of each line of a CSV file.

    A file of another program need not end in a newline; one of ours that does not is torn.
    """
    ours = file.readline() in (_HEADER, _OLDER_HEADER)
    file.seek(0)
    if ours:
        return map(_parse, _whole_records(file))
    return csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)


_Reader = Callable[[int, dict[str, str]], Row]


def _read_row(reader: _Reader, number: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    try:
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells instead of {len(header)}")
        return reader(number, dict(zip(header, cells, strict=True)))
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"row {number}: {error}") from error


def _row_reader(header: Sequence[str]) -> _Reader:
    """Return what reads the rows of this header. Raises ValueError where it is of no known file."""
    names = set(header)
    if len(names) == len(header):
        if names in (set(COLUMNS), set(_OLDER_COLUMNS)):
            return _read_own_row
        if names == set(SEED_COLUMNS):
            return _read_seed_row
    if not header:
        raise ValueError("it is empty")
    doubled = [name for name, n in Counter(header).items() if n > 1]
    if doubled:
        raise ValueError(f"it has the column {', '.join(map(repr, doubled))} twice")
    known = max(
        (COLUMNS, _OLDER_COLUMNS, SEED_COLUMNS),
        key=lambda columns: len(names & set(columns)) / len(names | set(columns)),
    )
    missing = [name for name in known if name not in names]
    unknown = [name for name in header if name not in known]
    problems = ["it has no column " + ", ".join(missing)] * bool(missing)
    problems += ["nobody knows its column " + ", ".join(map(repr, unknown))] * bool(unknown)
    raise ValueError("; ".join(problems))


def _read_own_row(number: int, cells: dict[str, str]) -> Row:
    row: Row = dict.fromkeys(_SPAN_COLUMNS) | cells
    row["answers"] = _strings(json.loads(cells["answers"]), "answers")
    if row["state"] not in _STATES:
        raise ValueError(f"state is {row['state']!r}, not one of {', '.join(_STATES)}")
    for name in _NUMBERS:
        row[name] = float(row[name]) if row[name] else None
    row["best_span"] = row["best_span"] or None
    row["n_best"] = json.loads(row["n_best"]) if row["n_best"] else None
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


def write_official(rows: Iterable[Row], directory: str | Path) -> None:
    """Write the official scorer's predictions.json and, where all rows have one, na_prob.json.

    No answer is "" there; a malformed reply is ``MALFORMED_PREDICTION``, which scores as wrong.

    Raises:
        ValueError: a file cannot be written.
    """
    directory = Path(directory)
    predictions, na_probs = official_predictions(rows)
    with one_line_errors(directory):
        write_json(directory / "predictions.json", predictions)
        if na_probs is None:  # none may stay there from another run
            (directory / "na_prob.json").unlink(missing_ok=True)
        else:
            write_json(directory / "na_prob.json", na_probs)


def official_predictions(
    rows: Iterable[Row],
) -> tuple[dict[str, str], dict[str, float] | None]:
    """Return {id: official text} and, where every row has one, {id: na_prob}, else None."""
    predictions: dict[str, str] = {}
    na_probs: dict[str, float] = {}
    for row in rows:
        predictions[row["id"]] = row_answer(row).official
        if row["na_prob"] is not None:
            na_probs[row["id"]] = row["na_prob"]
        elif row["state"] == "failed":  # an answer that is wrong at every threshold
            na_probs[row["id"]] = 0.0
    return predictions, na_probs if len(na_probs) == len(predictions) else None


class Tally:
    """What is kept of the rows of one file for its figures: some bytes of each row.

    The predictions are those of the file, where a threshold has been applied already. Beside them
    the rows' best spans are scored, so that best_exact and best_f1 are the same whatever the
    threshold was. A failed question, which has no na_prob, is wrong at every threshold.
    """

    def __init__(self) -> None:
        self._outcomes, self._states = Counter[Outcome](), Counter[str]()
        self._given, self._best = ScoreTable(), ScoreTable()
        self._tells = self._weighs = True

    def add(self, row: Row) -> None:
        """Count a row in."""
        golds, answer, best = row["answers"], row_answer(row), best_answer(row)
        na_prob = 0.0 if answer.state == "failed" else row["na_prob"]
        self._states[answer.state] += 1
        self._outcomes[strict_outcome(answer, golds)] += 1
        score = score_answer(answer.official, golds)
        self._given.add(bool(golds), answer.official, score, na_prob)
        self._weighs = self._weighs and na_prob is not None
        self._tells = self._tells and self._weighs and best is not None
        if self._tells and best is not None:
            best_score = score if best == answer else score_answer(best.official, golds)
            self._best.add(bool(golds), best.official, best_score, na_prob)

    def weighed(self) -> ScoreTable | None:
        """Return what can be compared with a threshold; None where a row has no na_prob.

        Those are the best spans, or in older files, which do not tell them, the predictions.
        """
        return None if not self._weighs else self._best if self._tells else self._given

    def figures(self) -> dict[str, Any]:
        """Return the figures of ``summarize``."""
        figures: dict[str, Any] = {}
        intervals: dict[str, Interval] = {}
        for name, (successes, trials) in strict_counts(self._outcomes).items():
            figures[name] = 100.0 * successes / trials if trials else None
            if trials:
                intervals[name] = wilson_interval(successes, trials)
        intervals |= _official_intervals(self._given)
        return {
            "n": len(self._given),
            "states": {state: self._states[state] for state in _STATES},
            **figures,
            **self._given.averages(),
            **(self._best.best() if self._tells else {}),
            "intervals": {name: list(ends) for name, ends in intervals.items()},
        }


def summarize(rows: Iterable[Row]) -> dict[str, Any]:
    """Compute the figures of one result file, in per cent; the rows are passed over once.

    Returns:
        "n"; "states" (count of each); ``STRICT_COLUMNS`` (None where no question counts for one);
        the official figures of ``evaluate_predictions`` over the rows' own gold answers, best_*
        only where all rows tell their best span (``best_answer``) and have a na_prob; and
        "intervals": figure → [low, high] at 95 %, Wilson's for proportions and the normal one for
        F1 (see ``llama_squad.metrics``).
    """
    tally = Tally()
    for row in rows:
        tally.add(row)
    return tally.figures()


def _official_intervals(table: ScoreTable) -> dict[str, Interval]:
    intervals: dict[str, Interval] = {}
    for prefix, wanted in (("", (0, 1)), ("HasAns_", (1,)), ("NoAns_", (0,))):
        chosen = bytearray(has in wanted for has in table.has_answer)
        if any(chosen):
            exact = sum(itertools.compress(table.exact, chosen))
            f1 = array("d", itertools.compress(table.f1, chosen))
            intervals[f"{prefix}exact"] = wilson_interval(exact, sum(chosen))
            intervals[f"{prefix}f1"] = mean_interval(f1)
    return intervals
