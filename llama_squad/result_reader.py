"""Read result files: ours, older ones of ours, and the original's; row by row."""

import ast
import contextlib
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llama_squad.answers import MALFORMED, NO_ANSWER, Answer
from llama_squad.rows import (
    COLUMNS,
    HEADER,
    NUMBERS,
    OLDER_COLUMNS,
    OLDER_HEADER,
    SEED_COLUMNS,
    SPAN_COLUMNS,
    STATES,
    Row,
    make_row,
    parse_record,
    rethreshold,
    whole_records,
)


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
    with file, named_errors(path):
        lines = _lines(file)
        header = tuple(next(lines, ()))
        reader = _row_reader(header)
        for number, cells in enumerate(lines, 1):
            row = read_row(reader, number, header, cells)
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
def named_errors(path: Path) -> Iterator[None]:
    """Name the file that is damaged."""
    csv.field_size_limit(2**31 - 1)  # prompts may be longer than the default 128 KiB
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
    ours = file.readline() in (HEADER, OLDER_HEADER)
    file.seek(0)
    if ours:
        return map(parse_record, whole_records(file))
    return csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)


_Reader = Callable[[int, dict[str, str]], Row]


def read_row(reader: _Reader, number: int, header: Sequence[str], cells: Sequence[str]) -> Row:
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
        if names in (set(COLUMNS), set(OLDER_COLUMNS)):
            return read_own_row
        if names == set(SEED_COLUMNS):
            return _read_seed_row
    if not header:
        raise ValueError("it is empty")
    doubled = [name for name, n in Counter(header).items() if n > 1]
    if doubled:
        raise ValueError(f"it has the column {', '.join(map(repr, doubled))} twice")
    known = max(
        (COLUMNS, OLDER_COLUMNS, SEED_COLUMNS),
        key=lambda columns: len(names & set(columns)) / len(names | set(columns)),
    )
    missing = [name for name in known if name not in names]
    unknown = [name for name in header if name not in known]
    problems = ["it has no column " + ", ".join(missing)] * bool(missing)
    problems += ["nobody knows its column " + ", ".join(map(repr, unknown))] * bool(unknown)
    raise ValueError("; ".join(problems))


def read_own_row(number: int, cells: dict[str, str]) -> Row:
    row: Row = dict.fromkeys(SPAN_COLUMNS) | cells
    row["answers"] = _strings(json.loads(cells["answers"]), "answers")
    if row["state"] not in STATES:
        raise ValueError(f"state is {row['state']!r}, not one of {', '.join(STATES)}")
    for name in NUMBERS:
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


def name_files(files: Sequence[str]) -> dict[str, Path]:
    """Name each file: as in NAME=FILE, else its name less .csv (its folder, for a results.csv)."""
    named = []
    for file in files:
        name, _, rest = file.partition("=")
        path = Path(file if Path(file).exists() or not rest else rest)
        if path == Path(file):
            folder = path.resolve().parent.name
            own = path.stem == "results" and folder not in ("", "results")
            name = folder if own else path.name.removesuffix(".csv")
        named.append((name, path))
    count = Counter(name for name, _ in named)
    names = {name if count[name] == 1 else str(path): path for name, path in named}
    if len(names) < len(named):
        raise ValueError("two result files have one name: give each another, NAME=FILE")
    return names


def read_rows(path: Path, threshold: float | None) -> Iterator[Row]:
    """Read a result file, as another threshold would have made it where one is given."""
    for row in iter_results(path):
        try:
            yield row if threshold is None else rethreshold(row, threshold)
        except ValueError as error:
            raise ValueError(f"--na_prob_thresh cannot be applied to {path}: {error}") from error
