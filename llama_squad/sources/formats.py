"""The forms that question files come in: each file becomes rows of one loose shape.

Reads SQuAD's official JSON and its relatives, the Hub's flat form, JSON lines, CSV and parquet.
Nothing is judged here but the form; ``llama_squad.sources.cleaning`` turns rows into checked
records. Uses nothing of ours.
"""

import ast
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMS = (
    'expected SQuAD\'s JSON, {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", '
    '"question", "answers": [{"text", "answer_start"}]}]}]}]}, or rows with context, question and '
    "answer (JSON, JSON lines, CSV or parquet): see docs/own-data.md"
)
COLUMNS = (
    *("id", "title", "context", "question"),
    *("answers", "answer", "answer_start", "is_impossible"),
)
"""What a row may say; other columns are ignored. Missing or empty where the file has nothing."""
_LISTS = ("answers", "answer_start")
"""Columns whose cell may hold a list."""
_DELIMITERS = ",;\t|"
_ARRAY = re.compile(r"\barray\((\[.*?\])(?:,\s*dtype=\w+)?\)(?=[,}])", re.S)
OF_VERDICTS = {"verdict", "uid", "corrected", "corrected_start", "undoes"}
"""What a reviewer's verdict says beside its question: there "answer" is the model's."""
_NO_OBJECT = "not a JSON object"
_TOO_DEEP = "lists or objects nested too deeply"


@dataclass(frozen=True, slots=True)
class InputRow:
    """One question as its file has it."""

    place: str
    """Where in the file: ``data[0].paragraphs[2].qas[1]``, ``line 7``, ``row 7``."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What it says, by the names of ``COLUMNS``; values of any type."""
    article: str = ""
    """Place of the article that it is part of; "" in flat forms, which have none."""
    fault: str = ""
    """Why nothing can be read here."""


def read_rows(path: Path, answered: bool = True) -> Iterator[InputRow]:
    """Yield the rows of a file: by its name's ending, and JSON by what is in it.

    Args:
        path: the file.
        answered: a table must have a column of answers. In JSON each row may have one or not.

    Raises:
        ValueError: the file cannot be read, or is of no known form.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in _TABLES:
            yield from _TABLES[suffix](path, answered)
        else:
            yield from _json_lines(path) if suffix in _JSON_LINES else _json(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def check_columns(columns: Iterable[str], where: str, answered: bool = True) -> None:
    """See that a table can be read; where it is ``answered``, its answers, too.

    Raises:
        ValueError: a column that is needed is missing.
    """
    names = list(columns)
    missing = [name for name in ("context", "question") if name not in names]
    if answered and not {"answers", "answer", "is_impossible"} & set(names):
        missing.append("answer")
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)} (it has {', '.join(names) or 'nothing'}): {FORMS}"
        )


def flat_row(place: str, values: Any, where: str = "it") -> InputRow:
    """Return the row of a question that stands beside its context.

    Raises:
        ValueError: it is a reviewer's verdict; ``where`` says in which file.
    """
    if not isinstance(values, dict):
        return InputRow(place, fault=_NO_OBJECT)
    if values.keys() >= OF_VERDICTS:
        raise ValueError(
            f"{where} holds verdicts of a review, not questions ({place}): give it as --feedback, "
            "or append it to yours: python -m llama_squad.feedback --import FILE"
        )
    return InputRow(place, values)


# JSON ----------------------------------------------------------------------------------------


def decode(content: bytes, name: str | Path) -> str:
    """Return the text of a file in UTF-8, with a byte-order mark or without, or in UTF-16 with one.

    Raises:
        ValueError: it is neither; ``name`` says which file.
    """
    # spreadsheets save "Unicode text" as UTF-16, which its byte-order mark tells
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise ValueError(
                f"{name} is no text, but binary, as a spreadsheet's own files are: export it as "
                "CSV in UTF-8"
            ) from error
        raise ValueError(f"{name} is not UTF-8 text ({error}): save it as UTF-8") from error


def _json(path: Path) -> Iterator[InputRow]:
    text = decode(path.read_bytes(), path)
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is of no known form ({_TOO_DEEP}): {FORMS}") from error
    except ValueError as error:  # also of a number with thousands of digits
        # one object on a line, then another: JSON lines under another name
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            first = text[: error.pos]
            if "\n" in first and "\n" not in first.strip():
                yield from _json_lines(path)
                return
        raise ValueError(f"{path} is not JSON: {error}") from error
    key = ""
    if isinstance(content, dict) and "data" in content:
        key, content = "data", content["data"]
    elif isinstance(content, dict) and isinstance(content.get("question"), str):
        content = [content]
    if not isinstance(content, list):
        named = isinstance(content, dict) and content and not key
        what = f"keys {', '.join(list(content)[:3])}" if named else f"{key or 'it'} is no list"
        raise ValueError(f"{path} is of no known form ({what}): {FORMS}")
    head = content[0] if content else None
    if isinstance(head, dict) and not {"paragraphs", "qas"} & head.keys():
        check_columns([*head, "answer"], str(path))  # another row may have the answer
        yield from (flat_row(f"{key}[{n}]", values, str(path)) for n, values in enumerate(content))
        return
    for n, node in enumerate(content):
        at = f"{key}[{n}]"
        if isinstance(node, dict) and "paragraphs" in node:
            yield from _article(node, at)
        else:
            yield from _paragraph(node, at, None, at)


def _article(article: dict[str, Any], at: str) -> Iterator[InputRow]:
    paragraphs = article["paragraphs"]
    if not isinstance(paragraphs, list):
        yield InputRow(at, fault="'paragraphs' is not a list")
        return
    for n, paragraph in enumerate(paragraphs):
        yield from _paragraph(paragraph, f"{at}.paragraphs[{n}]", article.get("title"), at)


def _paragraph(paragraph: Any, at: str, title: Any, article: str) -> Iterator[InputRow]:
    if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
        yield InputRow(at, fault="no list 'qas' (and no 'paragraphs')")
        return
    shared = {"title": paragraph.get("title", title), "context": paragraph.get("context")}
    for n, qa in enumerate(paragraph["qas"]):
        if isinstance(qa, dict):
            yield InputRow(f"{at}.qas[{n}]", shared | qa, article)
        else:
            yield InputRow(f"{at}.qas[{n}]", fault=_NO_OBJECT)


def _json_lines(path: Path) -> Iterator[InputRow]:
    first = True
    # not splitlines(): a context may hold U+2028, which JSON leaves as it is
    for n, line in enumerate(decode(path.read_bytes(), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:  # also of a number with thousands of digits
            row = InputRow(f"line {n}", fault=f"not JSON ({getattr(error, 'msg', error)})")
        except RecursionError:
            row = InputRow(f"line {n}", fault=_TOO_DEEP)
        else:
            row = flat_row(f"line {n}", values, str(path))
        if first and row.values:
            check_columns([*row.values, "answer"], str(path))  # another line may have the answer
            first = False
        yield row


# Tables --------------------------------------------------------------------------------------


def _csv(path: Path, answered: bool) -> Iterator[InputRow]:
    text = decode(path.read_bytes(), path)
    csv.field_size_limit(2**31 - 1)  # the default refuses contexts of over 131,072 characters
    header, delimiter = _header(text)
    check_columns(header, str(path), answered)
    if twice := sorted({name for name in header if name in COLUMNS and header.count(name) > 1}):
        raise ValueError(
            f"{path} has the column {twice[0]} more than once: name one otherwise (several answers "
            'to a question go into one cell of "answers", as a list, or on rows of their own)'
        )
    # strict: else a quote that is not closed takes the rows that follow into its cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    n = 0  # rows read, as a spreadsheet counts them
    try:
        for n, cells in enumerate(reader, 1):
            if n == 1 or not any(map(str.strip, cells)):  # spreadsheets end with empty rows
                continue
            if len(cells) > len(header):
                fault = f"more cells than columns (a text with {delimiter!r} needs quotes)"
                yield InputRow(f"row {n}", fault=fault)
            else:
                values: dict[str, Any] = dict(zip(header, cells, strict=False))
                read = {name: _cell(values[name]) for name in _LISTS if name in values}
                if read.get("answers") and values["answers"] in values.get("context", ""):
                    del read["answers"]  # words of the text, such as "[3]"
                yield InputRow(f"row {n}", values | read)
    except csv.Error as error:
        raise ValueError(
            f"{path}, row {n + 1}: not CSV ({error}): a cell that begins with a quote must end "
            'with one, and quotes within it are written twice, as in "the ""Ash"" line"'
        ) from error


def _header(text: str) -> tuple[list[str], str]:
    """Return the columns' names and the delimiter: that by which most of the names are found."""
    line = io.StringIO(text, newline="").readline()
    found = []
    for delimiter in _DELIMITERS:
        cells = next(csv.reader([line], delimiter=delimiter), [])
        found.append(([cell.strip().lower() for cell in cells], delimiter))
    return max(found, key=lambda pair: (len(set(COLUMNS) & set(pair[0])), len(pair[0])))


def _cell(text: str) -> Any:
    """Read a cell that holds a list or an object, as JSON or as Python prints it; else its text.

    The Hub's ``Dataset.to_csv`` prints NumPy arrays: ``{'text': array(['x'], dtype=object), ...}``.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    plain = _ARRAY.sub(r"\1", text.strip())
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for read in readers:
        try:
            return read(plain)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def _parquet(path: Path, answered: bool) -> Iterator[InputRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_columns(names, str(path), answered)
            known = [name for name in names if name in COLUMNS]
            batches = file.iter_batches(batch_size=1000, columns=known)
            rows = (values for batch in batches for values in batch.to_pylist())
            yield from (InputRow(f"row {n}", values) for n, values in enumerate(rows, 1))
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not parquet: {error}") from error


_JSON_LINES = (".jsonl", ".ndjson")
_TABLES: dict[str, Callable[[Path, bool], Iterator[InputRow]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
