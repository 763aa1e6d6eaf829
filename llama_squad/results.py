"""The result file: one CSV row per question, appended durably, resumed and merged.

Beside ``results.csv`` stands ``results.csv.config.json``, the resolved configuration that made it,
so that rows of two configurations never meet in one file. All cells are quoted, so that a reply may
hold anything: quotes, newlines, NUL bytes, unicode line separators.

Files are read and written a row at a time: what is kept of each is its id.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from llama_squad.config import write_json
from llama_squad.durable import one_line_errors, open_locked, write_durably
from llama_squad.result_reader import named_errors, read_own_row, read_row
from llama_squad.rows import (
    COLUMNS,
    HEADER,
    OLDER_HEADER,
    SPAN_COLUMNS,
    Row,
    encode_rows,
    parse_record,
    whole_records,
)


def config_path(path: str | Path) -> Path:
    """Return where the settings of a result file are: ``results.csv.config.json`` beside it."""
    path = Path(path)
    return path.with_name(f"{path.name}.config.json")


def saved_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings that a result file was made with; {} where nothing tells them."""
    try:
        saved = json.loads(config_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ResultsFile says so where it matters
        return {}
    return saved if isinstance(saved, dict) else {}


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
        self._settings = _plain(settings)
        self._volatile = set(volatile)
        self._overwrite = overwrite
        self._fd = -1

    def __enter__(self) -> Self:
        """Open, lock and check the file, and cut off a torn last row."""
        with one_line_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = open_locked(self.path)
        try:
            with one_line_errors(self.path):
                if self._overwrite:
                    os.ftruncate(self._fd, 0)
                if HEADER.startswith(os.pread(self._fd, len(HEADER) + 1, 0)):
                    # New, or killed before its first row.
                    os.ftruncate(self._fd, 0)
                    write_json(config_path(self.path), self._settings)
                    write_durably(self._fd, [HEADER])
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
            write_durably(self._fd, [encode_rows(rows)])
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
        fd = open_locked(aside)
        try:
            write_durably(fd, itertools.chain([HEADER], records))
            aside.replace(self.path)
        except BaseException:
            aside.unlink(missing_ok=True)
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd

    def _resume(self) -> None:
        _check_head(self.path, os.pread(self._fd, len(HEADER), 0))
        _check_settings(self.path, self._settings, self._volatile)
        end = len(HEADER)
        for place in _places(self.path):
            end = place.end
            self._add(place.id, place.failed)
        if end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, end)
            os.fsync(self._fd)


def check_same_settings(
    path: Path, settings: Mapping[str, Any], volatile: Collection[str] = ()
) -> None:
    """Find out, before a model is loaded, whether a run may go on with a result file, or begin it.

    Raises:
        ValueError: it was made with other settings, or is no result file.
    """
    with one_line_errors(path):
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(len(HEADER) + 1)
    if not HEADER.startswith(head):
        _check_head(path, head[: len(HEADER)])
        _check_settings(path, _plain(settings), volatile)


def _check_head(path: Path, head: bytes) -> None:
    if head.startswith(OLDER_HEADER):
        raise ValueError(
            f"{path} is of an earlier version, whose rows do not hold "
            f"{', '.join(SPAN_COLUMNS)}: it can be summarised, but not resumed. Choose "
            "another --output file, or --overwrite it"
        )
    if head != HEADER:
        raise ValueError(
            f"{path} exists and is no result file of this program: choose another "
            "--output file, or --overwrite it"
        )


def _check_settings(path: Path, settings: Any, volatile: Collection[str]) -> None:
    cure = "give the same again, choose another --output file, or --overwrite it"
    try:
        saved = json.loads(config_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} holds results, but their settings cannot be read from "
            f"{config_path(path)} ({error}): {cure}"
        ) from error
    # one folder may be named otherwise, as by an absolute path
    same = [
        name
        for name in ("model_name", "adapter_name")
        if isinstance(saved, dict) and _is_one_folder(saved.get(name), settings.get(name))
    ]
    if different := differences(saved, settings, {*volatile, *same}):
        raise ValueError(f"{path} was made with other settings ({'; '.join(different)}): {cure}")


def _is_one_folder(name: Any, other: Any) -> bool:
    try:
        return Path(name).samefile(other)
    except (OSError, TypeError):  # not there, or no name
        return False


def _plain(settings: Mapping[str, Any]) -> Any:
    """Return settings as a JSON file gives them back."""
    return json.loads(json.dumps(settings, default=str))


class _Place(NamedTuple):
    """Where a file holds the row of a question: bytes ``start`` to ``end``."""

    id: str
    failed: bool
    path: Path
    start: int
    end: int


def _places(path: Path) -> Iterator[_Place]:
    """Find the whole rows of a file of ours. Raises ValueError where one is damaged."""
    with path.open("rb") as file, named_errors(path):
        start = len(file.readline())
        for number, record in enumerate(whole_records(file), 1):
            row = read_row(read_own_row, number, COLUMNS, parse_record(record))
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
