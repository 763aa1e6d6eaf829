"""What there is to review, by name: a result file, the dataset's splits, uploaded files."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_squad.answers import NO_ANSWER, Answer
from llama_squad.feedback import queue
from llama_squad.feedback.queue import UNASKED, Doubt, ReviewQueue, doubt
from llama_squad.feedback.verdicts import FeedbackFile, user_name
from llama_squad.metrics import is_exact_match
from llama_squad.page.desk import Desk, check_length, decide
from llama_squad.reader import Reading

SPLITS = ("val", "test", "train")
SPLIT_LABEL = "{} split of {}"


def signature(request: Any) -> str:
    """Return the name of who is at the page: as logged in, else as on this machine."""
    return str(getattr(request, "username", None) or user_name())


class Sources:
    """The queues of one page, which all its windows share; made when they are first asked for.

    Args:
        desk: reads what no file has read.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.feedback = FeedbackFile(desk.args.feedback)
        self._queues: dict[str, ReviewQueue] = {}
        self._files: dict[str, Path] = {}
        self._lock = threading.Lock()
        if desk.args.review:
            self._files[desk.args.review] = Path(desk.args.review)

    def names(self) -> list[str]:
        """Return what can be reviewed: files first, then splits."""
        splits = [SPLIT_LABEL.format(name, self.desk.args.dataset_name) for name in SPLITS]
        there = (Path(self.desk.args.dataset_name) / "dataset_dict.json").is_file()
        return [*self._files, *(splits if there else [])]

    def add(self, path: str) -> str:
        """Add an uploaded file; return its name. Raises ValueError: it holds no questions."""
        found = self._of_file(Path(path))
        with self._lock:
            # another file of that name may be there, of another visitor or the host's
            name = first = Path(path).name
            number = 1
            while self._files.get(name, Path(path)) != Path(path):
                number += 1
                name = f"{first} ({number})"
            self._files[name], self._queues[name] = Path(path), found
        return name

    def get(self, name: str) -> ReviewQueue:
        """Return the queue of a name. Raises ValueError: it cannot be read."""
        with self._lock:
            if name not in self._queues:
                self._queues[name] = self._make(name)
            return self._queues[name]

    def _make(self, name: str) -> ReviewQueue:
        if name in self._files:
            return self._of_file(self._files[name])
        from llama_squad.data import load_squad

        dataset = load_squad(self.desk.args.dataset_name)
        split = name.partition(" ")[0]
        if split not in dataset:
            raise ValueError(f"{self.desk.args.dataset_name} has no {split} split: choose another")
        return self._unread(map(record_of, dataset[split]))

    def _of_file(self, path: Path) -> ReviewQueue:
        if path.suffix.lower() == ".csv" and _is_result_file(path):
            records = _records_of(path, self.desk.args.dataset_name)
            threshold, calibration = self.desk.threshold, self.desk.calibration
            items = queue.items_of_results(path, records, threshold, calibration)
            asked = [item for item in items if _can_be_read(item.record)]
            return ReviewQueue(asked, too_long=len(items) - len(asked))
        return self._unread(queue.records_of_file(path))

    def _unread(self, records: Iterable[Mapping[str, Any]]) -> ReviewQueue:
        """Return the queue of records that are yet to be read, but for those that cannot be."""
        found = list(records)
        asked = [record for record in found if _can_be_read(record)]
        return ReviewQueue(unread=asked, weigh=self._weigh, too_long=len(found) - len(asked))

    def _weigh(self, records: Sequence[Mapping[str, Any]]) -> list[Doubt]:
        """Read records, and say how much each is worth a look."""
        return list(map(self._doubt, records, self.desk.read(records)))

    def _doubt(self, record: Mapping[str, Any], reading: Reading) -> Doubt:
        if reading.failure:
            return Doubt(-1, UNASKED)
        right = None
        if "answers" in record:
            answer = decide(reading, self.desk.threshold).answer
            said = Answer("answer", answer) if answer else Answer("no_answer", NO_ANSWER)
            right = is_exact_match(said, record["answers"]["text"])
        log_probs = [span.log_prob for span in reading.n_best]
        return doubt(reading.na_prob, self.desk.threshold, log_probs, right)


def _records_of(path: Path, dataset_name: str) -> dict[str, dict[str, Any]]:
    """Return the dataset's records of a result file's questions, by id.

    Ids are read first, and then only those rows: all of SQuAD takes 6 s and 600 MB.
    """
    from llama_squad.data import load_squad
    from llama_squad.result_reader import iter_results

    wanted = {row["id"] for row in iter_results(path)}
    records: dict[str, dict[str, Any]] = {}
    for split in load_squad(dataset_name).values():
        places = [n for n, id_ in enumerate(split["id"]) if id_ in wanted]
        records |= {row["id"]: record_of(row) for row in split.select(places)}
    return records


def record_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("id", "title", "context", "question", "answers")}


def _can_be_read(record: Mapping[str, Any]) -> bool:
    try:
        check_length(record["context"], record["question"])
    except ValueError:
        return False
    return True


def _is_result_file(path: Path) -> bool:
    from llama_squad.rows import HEADER, OLDER_HEADER

    try:
        with path.open("rb") as file:
            head = file.readline()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return head in (HEADER, OLDER_HEADER)
