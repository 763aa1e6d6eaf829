"""Where a window of the review is, and what it does there."""

import dataclasses
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_squad.feedback import verdicts
from llama_squad.feedback.queue import Item
from llama_squad.feedback.verdicts import Key, Kind, Verdict
from llama_squad.page.desk import Desk, decide
from llama_squad.page.sources import Sources
from llama_squad.page.text import HOW_TO_MARK
from llama_squad.reader import Reading, SpanAnswer


@dataclass(frozen=True)
class Seat:
    """Where one window is.

    Attributes:
        window: tells it from others.
        source: what it reviews.
        item: the question that it shows; None where there is none.
        reading: what the model reads there, never abstaining.
        answer: what it answers, at the page's threshold.
        given: the verdicts that it gave, to be undone.
        fault: why the next question cannot be shown; "" where nothing is wrong.
    """

    window: str
    source: str = ""
    item: Item | None = None
    reading: Reading | None = None
    answer: Reading | None = None
    given: tuple[Verdict, ...] = ()
    fault: str = ""


def new_seat() -> Seat:
    """Return the seat of a new window."""
    return Seat(uuid.uuid4().hex)


class Review:
    """What a window does, without its looks.

    Args:
        desk: the model, and the page's arguments.
        sources: what there is to review.
    """

    def __init__(self, desk: Desk, sources: Sources) -> None:
        self.desk, self.sources = desk, sources
        self.path = Path(desk.args.feedback)

    def next(self, seat: Seat, source: str, again: Key | None = None) -> Seat:
        """Show the next question of a source, or one ``again``. Raises ValueError."""
        if not source:
            raise ValueError(
                "There is nothing to review yet: upload a file of questions, start the page with "
                "--review, or build a dataset with `python create_squad_dataset.py`."
            )
        seen = self.sources.feedback.read().seen()
        item = self.sources.get(source).next(seat.window, seen, again)
        seat = dataclasses.replace(
            seat, source=source, item=item, reading=None, answer=None, fault=""
        )
        if item is None:
            return seat
        (reading,) = self.desk.read([item.record])
        return dataclasses.replace(
            seat, reading=reading, answer=decide(reading, self.desk.threshold)
        )

    def give(
        self, seat: Seat, kind: Kind, note: str, reviewer: str, *, rank: int = 0,
        marked: Sequence[int] | None = None,
    ) -> Seat:  # fmt: skip
        """Keep a verdict on the question that is shown, and show the next one.

        Args:
            seat: the window's.
            kind: the verdict.
            note: the reviewer's own words.
            reviewer: who says so.
            rank: of the model's span that is right, where one is picked.
            marked: first character and end of the words that are marked.

        Raises:
            ValueError: nothing is shown or marked, or the verdict cannot be written.
        """
        if seat.item is None or seat.reading is None or seat.answer is None:
            raise ValueError("No question is shown: choose a source first.")
        record = seat.item.record
        span = self._corrected(seat, kind, rank, marked)
        by = self.desk.answering
        verdict = Verdict(
            id=record["id"], title=record["title"], context=record["context"],
            question=record["question"], verdict=kind, answer=seat.answer.answer,
            na_prob=seat.answer.na_prob, corrected=span[0] if span else None,
            corrected_start=span[1] if span else None, golds=record.get("answers"),
            note=note.strip(), reviewer=reviewer.strip(), **dataclasses.asdict(by),
        )  # fmt: skip
        verdicts.append(self.path, [verdict])
        seat = dataclasses.replace(seat, given=(*seat.given, verdict))
        return self._go_on(seat)

    def _go_on(self, seat: Seat, again: Key | None = None) -> Seat:
        """Show what comes next; where that fails, what was done before holds all the same."""
        try:
            return self.next(seat, seat.source, again)
        except Exception as error:
            if not isinstance(error, ValueError):  # those say what the visitor can do
                traceback.print_exception(error)
            fault = str(error) or type(error).__name__
            return dataclasses.replace(seat, item=None, reading=None, answer=None, fault=fault)

    @staticmethod
    def _corrected(
        seat: Seat, kind: Kind, rank: int, marked: Sequence[int] | None
    ) -> tuple[str, int] | None:
        """Return the right answer and its offset, as a verdict of a kind says it."""
        assert seat.item is not None and seat.reading is not None and seat.answer is not None
        if kind == "right" and seat.answer.failure:
            raise ValueError(f"There is no answer that could be right: {seat.answer.failure}")
        if kind == "right" and seat.answer.answer is not None:
            assert seat.answer.start is not None
            return seat.answer.answer, seat.answer.start
        if kind == "picked":
            span: SpanAnswer = seat.reading.n_best[rank]
            return span.text, span.start
        if kind == "marked":
            if not marked:
                raise ValueError(f"Mark the right words first. {HOW_TO_MARK}")
            start, end = marked
            return seat.item.record["context"][start:end], start
        return None

    def undo(self, seat: Seat) -> Seat:
        """Take this window's last verdict back, and show its question again. Raises ValueError."""
        if not seat.given:
            raise ValueError("There is nothing to undo in this window.")
        last = seat.given[-1]
        verdicts.undo(self.path, last)
        return self._go_on(dataclasses.replace(seat, given=seat.given[:-1]), last.key)

    def progress(self, seat: Seat) -> str:
        """Say how far the review is, and how much is right."""
        feedback = self.sources.feedback.read()
        latest = feedback.latest()
        queue = self.sources.get(seat.source) if seat.source else None
        keys = queue.keys() if queue else set()
        judged = [latest[key] for key in keys if key in latest]
        parts = [f"{len(judged):,} of {len(keys):,} judged here, {len(latest):,} in all"]
        by = dataclasses.asdict(self.desk.answering).items()
        own = [v for v in judged if by <= dataclasses.asdict(v).items()]
        if own:  # others are of another model, or of none
            right = sum(v.agrees for v in own)
            parts.append(f"the model is right in {right:,} of {len(own):,}")
        if queue and queue.too_long:
            parts.append(f"{queue.too_long:,} too long to be read are left out")
        several, agreed = feedback.agreement()
        if several:
            parts.append(f"reviewers agree on {agreed:,} of {several:,} judged more than once")
        if feedback.torn:
            parts.append(f"a half-written line of {feedback.torn} bytes is put aside at the next")
        return " · ".join(parts) + "."
