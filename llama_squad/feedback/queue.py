"""Which question is most worth a look: a queue over a result file, a split, or a file of one's own.

Worth a look is what the model answers otherwise than the dataset, then what it is unsure of:
na_prob near the threshold, or two spans nearly as likely.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_squad.answers import Answer
from llama_squad.calibration import Calibration
from llama_squad.feedback.verdicts import Key, key_of
from llama_squad.metrics import is_exact_match
from llama_squad.prompts import Record
from llama_squad.result_reader import iter_results
from llama_squad.rows import Row, recalibrate, rethreshold, row_answer
from llama_squad.sources.formats import read_rows
from llama_squad.sources.records import Fault, read_record

CHUNK = 32
"""Questions that are read at a time, to look for those worth a look."""

UNASKED = "the model could not be asked"

LEASE_S = 600.0
"""Seconds for which a question that one window shows is not shown in another."""


@dataclass(frozen=True)
class Doubt:
    """How much a question is worth a look, higher first, and why, in plain words."""

    worth: float
    why: str


def doubt(
    na_prob: float | None,
    threshold: float,
    log_probs: Sequence[float],
    right: bool | None,
) -> Doubt:
    """Weigh a model's answer.

    Args:
        na_prob: its probability of no answer; None where nobody told.
        threshold: above which it abstains.
        log_probs: of its likeliest spans, best first.
        right: it answers as the dataset does; None where that is not known.
    """
    reasons = {}
    if na_prob is not None:
        reasons["whether there is an answer is nearly undecided"] = _near(na_prob, threshold)
    if len(log_probs) > 1:
        reasons["two answers are nearly as likely"] = math.exp(log_probs[1] - log_probs[0])
    why, unsure = max(reasons.items(), key=lambda item: item[1], default=("", 0.0))
    if right is False:
        return Doubt(1 + unsure, "the dataset has another answer")
    return Doubt(unsure, why if unsure >= 0.1 else "the model is sure")


def _near(na_prob: float, threshold: float) -> float:
    """Return 1 at the threshold, and less with the distance of the log-odds."""
    return math.exp(-abs(_log_odds(na_prob) - _log_odds(threshold)))


def _log_odds(probability: float) -> float:
    within = min(max(probability, 1e-9), 1 - 1e-9)
    return math.log(within / (1 - within))


@dataclass(frozen=True)
class Item:
    """A question to look at.

    Attributes:
        record: the question's; it has no "answers" where no right answer is known.
        doubt: how much it is worth a look.
        said: the answer in the result file that it comes from; None where it comes from none.
    """

    record: Record
    doubt: Doubt
    said: Answer | None = None

    @property
    def key(self) -> Key:
        """What the question is told by."""
        return key_of(self.record)


def item_of_row(row: Row, record: Record, threshold: float) -> Item:
    """Weigh a row of a result file; its golds are known."""
    if row["state"] == "failed":
        return Item(record, Doubt(-1, UNASKED), row_answer(row))
    log_probs = [span["log_prob"] for span in row["n_best"] or ()]
    said = row_answer(row)
    if row["na_prob"] is not None:
        row = rethreshold(row, threshold)
    right = is_exact_match(row_answer(row), row["answers"])
    return Item(record, doubt(row["na_prob"], threshold, log_probs, right), said)


class ReviewQueue:
    """Questions, those most worth a look first, for several windows at once.

    Args:
        items: weighed already.
        unread: records that are yet to be read, ``CHUNK`` at a time.
        weigh: reads records, and says how much they are worth a look.
        too_long: how many questions were left out, as they are too long to be read.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        unread: Iterable[Record] = (),
        weigh: Callable[[Sequence[Record]], list[Doubt]] | None = None,
        too_long: int = 0,
    ) -> None:
        self.too_long = too_long
        self._items = sorted(items, key=lambda item: -item.doubt.worth)
        self._unread = list(unread)
        self._weigh = weigh
        self._leases: dict[Key, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def __len__(self) -> int:
        """Return how many questions there are, read and unread."""
        return len(self._items) + len(self._unread)

    def keys(self) -> set[Key]:
        """Return what the questions are told by."""
        return set(map(key_of, [*(item.record for item in self._items), *self._unread]))

    def next(self, window: str, seen: Collection[Key], again: Key | None = None) -> Item | None:
        """Return the question most worth a look that is not ``seen``; None where none is left.

        Args:
            window: who asks: what one window shows, another does not get.
            seen: what was judged, or skipped.
            again: show this one, whether seen or not (after an undo).
        """
        while True:
            with self._lock:
                now = time.monotonic()
                free = [item for item in self._items if self._is_free(item.key, window, now)]
                open_ = [i for i in free if i.key not in seen or i.key == again]
                first = next((i for i in open_ if i.key == again), None)
                known = sum(item.doubt.worth >= 0 for item in open_)
                if first is None and open_ and (known >= CHUNK // 2 or not self._unread):
                    first = open_[0]
                if first is not None or not self._unread:
                    self._lease(first, window, now)
                    return first
            self._read_more()

    def _is_free(self, key: Key, window: str, now: float) -> bool:
        holder, since = self._leases.get(key, (window, now))
        return holder == window or now - since > LEASE_S

    def _lease(self, item: Item | None, window: str, now: float) -> None:
        self._leases = {k: v for k, v in self._leases.items() if v[0] != window}
        if item is not None:
            self._leases[item.key] = (window, now)

    def _read_more(self) -> None:
        assert self._weigh is not None
        with self._reading:
            with self._lock:
                chunk = self._unread[:CHUNK]
            doubts = self._weigh(chunk)
            with self._lock:
                self._unread = self._unread[len(chunk) :]
                self._items += [Item(r, d) for r, d in zip(chunk, doubts, strict=True)]
                self._items.sort(key=lambda item: -item.doubt.worth)


# What it is over -----------------------------------------------------------------------------


def items_of_results(
    path: str | Path, records: Mapping[str, Record], threshold: float, calibration: Calibration
) -> list[Item]:
    """Return the questions of a result file that a dataset holds.

    Args:
        path: the result file.
        records: the dataset's, by id: result files hold no contexts.
        threshold: above which the model abstains.
        calibration: of the na_prob that the threshold is of; the file may have been made before.

    Raises:
        ValueError: it is none, or none of its questions is in the dataset.
    """
    items = [
        item_of_row(recalibrate(row, calibration), records[row["id"]], threshold)
        for row in iter_results(path)
        if row["id"] in records
    ]
    if not items:
        raise ValueError(
            f"none of the questions of {path} is in the dataset: name the dataset that they are "
            "of with --dataset_name"
        )
    return items


def records_of_file(path: str | Path) -> list[Record]:
    """Read questions of any form, with answers or without.

    Raises:
        ValueError: the file cannot be read, or a question or context is missing.
    """
    path = Path(path)
    records: dict[str, Record] = {}
    titles: dict[str, str] = {}
    for row in read_rows(path, answered=False):
        values = dict(row.values)
        labelled = any(values.get(name) is not None for name in ("answers", "answer"))
        known = labelled or values.get("is_impossible") not in (None, "")
        filled = values if known else values | {"is_impossible": True}
        try:
            filled_row = dataclasses.replace(row, values=filled)
            record, _ = read_record(filled_row, path.name, titles, mend=False)
        except Fault as fault:
            raise ValueError(f"{path.name}, {row.place}: {fault}") from fault
        if not known:
            del record["answers"]
        if records.setdefault(record["id"], record) is not record:
            raise ValueError(f"{path.name}, {row.place}: id {record['id']!r} is there twice")
    if not records:
        raise ValueError(f"{path.name} holds no questions")
    return list(records.values())
