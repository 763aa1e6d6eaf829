"""The verdict of a reviewer on one answer, and the file that keeps them: ``data/feedback.jsonl``.

One JSON object per line, only ever appended to. Each append takes the file's lock, so that several
windows and processes write at once, and returns when the line is on disk. A line that a killed
process left half-written is moved to ``feedback.jsonl.torn`` by the next append: it is never read
as a verdict, and never lost without a word.
"""

import contextlib
import dataclasses
import getpass
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from llama_squad.durable import one_line_errors, write_durably
from llama_squad.prompts import Record

Kind = Literal["right", "wrong", "picked", "marked", "unanswerable", "skipped", "undone"]
"""right: the model's answer stands. picked: another of its spans. marked: a span selected in the
text. unanswerable: the text does not hold the answer. wrong: it is something else, unknown what.
undone: the verdict that ``undoes`` names does not count."""

KINDS: tuple[Kind, ...] = get_args(Kind)
ANSWERING: tuple[Kind, ...] = ("right", "picked", "marked", "unanswerable")
"""Verdicts that say what the right answer is."""

Key = tuple[str, str, str]
"""What a question is told by: its id, context and question."""


def key_of(record: Record) -> Key:
    """Return what a record's question is told by."""
    return record["id"], record["context"], record["question"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def user_name() -> str:
    """Return the name of this machine's user."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in this container
        return "reviewer"


def _new_uid() -> str:
    return uuid.uuid4().hex[:16]


@dataclass(frozen=True)
class Verdict:
    """What a reviewer says about the answer to one question.

    Attributes:
        id, title, context, question: the question's.
        verdict: one of ``KINDS``.
        answer: the model's: words of the context, or None where it found no answer.
        na_prob: its probability that there is no answer; None where nobody told.
        corrected: the right answer, where the verdict says it; None for none in the context.
        corrected_start: the character of the context at which it begins.
        golds: the dataset's right answers, ``{"text": [...], "answer_start": [...]}``; None where
            they were not known.
        note: the reviewer's own words.
        reviewer: who says so.
        model, adapter: what answered; "" where nobody did (questions labelled elsewhere).
        model_digest, adapter_digest: of their weights; None where they are not local.
        time: when, in UTC, ISO 8601.
        uid: tells this verdict from all others.
        undoes: the uid of the verdict that an undone one takes back.
    """

    id: str
    title: str
    context: str
    question: str
    verdict: Kind
    answer: str | None = None
    na_prob: float | None = None
    corrected: str | None = None
    corrected_start: int | None = None
    golds: dict[str, list] | None = None
    note: str = ""
    reviewer: str = ""
    model: str = ""
    adapter: str = ""
    model_digest: str | None = None
    adapter_digest: str | None = None
    time: str = field(default_factory=_now)
    uid: str = field(default_factory=_new_uid)
    undoes: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises ValueError."""
        if self.verdict not in KINDS:
            raise ValueError(f"verdict is {self.verdict!r}, not one of {', '.join(KINDS)}")
        texts = (self.id, self.title, self.context, self.question)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("id, title, context and question must be texts")
        if self.corrected is None:
            return
        start = self.corrected_start
        if start is None or start < 0 or not self.context.startswith(self.corrected, start):
            raise ValueError(
                f"the answer {self.corrected!r:.80} does not stand at character {start} of the text"
            )
        if not self.corrected.strip():
            raise ValueError("the answer is empty: mark at least one word of the text")

    @property
    def key(self) -> Key:
        """What the question is told by."""
        return self.id, self.context, self.question

    @property
    def answers(self) -> bool:
        """Whether it says what the right answer is."""
        return self.verdict in ANSWERING

    @property
    def agrees(self) -> bool:
        """Whether the right answer is the model's; one that could not be asked has no na_prob."""
        same = self.corrected == self.answer and self.na_prob is not None
        return self.verdict == "right" or (self.answers and same)

    def record(self) -> dict[str, Any]:
        """Return the question as a SQuAD record: the reviewer's answer, then the dataset's own.

        The dataset's go where the reviewer says that the text does not hold the answer.

        Raises:
            ValueError: the verdict does not say what the right answer is.
        """
        if not self.answers:
            raise ValueError(f"a verdict of {self.verdict} holds no answer")
        answers: dict[str, list] = {"text": [], "answer_start": []}
        if self.corrected is not None:
            found = [(self.corrected, self.corrected_start)]
            golds = self.golds or answers
            found += zip(golds["text"], golds["answer_start"], strict=True)
            found = list(dict.fromkeys(found))
            answers = {"text": [t for t, _ in found], "answer_start": [s for _, s in found]}
        texts = {"id": self.id, "title": self.title or self.id, "context": self.context}
        return texts | {"question": self.question, "answers": answers}


# The file ------------------------------------------------------------------------------------


def torn_path(path: str | Path) -> Path:
    """Return where half-written lines of a feedback file are put aside."""
    return Path(f"{path}.torn")


def append(path: str | Path, verdicts: Sequence[Verdict]) -> None:
    """Append verdicts, and return when they are on disk.

    Raises:
        ValueError: the file cannot be written, or the disk is full: then it is as it was.
    """
    lines = [
        json.dumps(dataclasses.asdict(v), ensure_ascii=False).encode(errors="backslashreplace")
        for v in verdicts
    ]
    path = Path(path)
    with one_line_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
            size = _put_torn_line_aside(fd, path)
            try:
                write_durably(fd, [b"".join(line + b"\n" for line in lines)])
            except OSError:
                os.ftruncate(fd, size)
                raise
            if not size:  # the name of a new file is to be on disk, too
                _sync_folder(path.parent)


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    import fcntl  # here, so that Windows can at least summarise

    fd = os.open(path, flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)  # which gives up the lock


def _put_torn_line_aside(fd: int, path: Path) -> int:
    """Cut a half-written last line off, once it stands in another file; return the size then."""
    size = os.fstat(fd).st_size
    end = size
    while end and os.pread(fd, 1, end - 1) != b"\n":
        step = min(end, 4096)
        block = os.pread(fd, step, end - step)
        end = end - step + block.rfind(b"\n") + 1
    if end < size:
        torn = os.pread(fd, size - end, end)
        aside = os.open(torn_path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            write_durably(aside, [torn + b"\n"])
        finally:
            os.close(aside)
        os.ftruncate(fd, end)
    return end


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Feedback:
    """What a feedback file holds.

    Attributes:
        verdicts: in the order in which they were given, without those that were undone.
        torn: bytes of a last line that a killed process left half-written.
    """

    verdicts: tuple[Verdict, ...] = ()
    torn: int = 0

    def latest(self) -> dict[Key, Verdict]:
        """Return the verdict that counts of each question: the latest; a skip is none."""
        in_time = sorted(self.verdicts, key=lambda v: v.time)  # imported ones may be older
        return {v.key: v for v in in_time if v.verdict != "skipped"}

    def seen(self) -> set[Key]:
        """Return the questions that were judged or skipped."""
        return {v.key for v in self.verdicts}

    def agreement(self) -> tuple[int, int]:
        """Return how many questions have several answers from reviewers, and of those how many one.

        The difference is the number of conflicts.
        """
        said: dict[Key, list[str | None]] = {}
        for v in self.verdicts:
            if v.answers:
                said.setdefault(v.key, []).append(v.corrected)
        several = [answers for answers in said.values() if len(answers) > 1]
        return len(several), sum(len(set(answers)) == 1 for answers in several)

    def counts(self) -> dict[str, int]:
        """Count the questions by the verdict that counts."""
        kinds = [v.verdict for v in self.latest().values()]
        return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def load(path: str | Path) -> Feedback:
    """Read a feedback file; one that is not there holds nothing. Raises ValueError: see below."""
    verdicts: dict[str, Verdict] = {}
    lines, torn = read_lines(path)
    for verdict in lines:
        if verdict.verdict == "undone":
            verdicts.pop(verdict.undoes, None)
        else:
            verdicts[verdict.uid] = verdict
    return Feedback(tuple(verdicts.values()), torn)


def read_lines(path: str | Path) -> tuple[list[Verdict], int]:
    """Return all verdicts of a file, undone ones too, and the bytes of a half-written last line.

    Raises:
        ValueError: it cannot be read, or a line of it is no verdict.
    """
    path = Path(path)
    if not path.exists():
        return [], 0
    try:
        with _locked(path, os.O_RDONLY):  # not in the middle of an append
            content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    end = content.rfind(b"\n") + 1
    verdicts = []
    for number, line in enumerate(content[:end].split(b"\n")[:-1], 1):
        try:
            verdicts.append(Verdict(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}, is no verdict ({error}): mend that line, or delete it"
            ) from error
    return verdicts, len(content) - end


def undo(path: str | Path, verdict: Verdict) -> None:
    """Take a verdict back: a line says so; the verdict's own stays. Raises ValueError."""
    taken_back = dataclasses.replace(
        verdict, verdict="undone", undoes=verdict.uid, uid=_new_uid(), time=_now(), note=""
    )
    append(path, [taken_back])


class FeedbackFile:
    """A feedback file that is read again only where another window or process has written to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known = Feedback()
        self._stamp: Any = None

    def read(self) -> Feedback:
        """Return what the file holds now. Raises ValueError."""
        stamp = self._stamp_now()
        if stamp != self._stamp:
            self._known, self._stamp = load(self.path), stamp
        return self._known

    def _stamp_now(self) -> Any:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
