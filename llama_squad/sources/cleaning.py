"""From the loose rows of a file to checked records: what is clear is taken, the rest refused.

Whatever differs from SQuAD's own files is counted by kind. What can be read in one way only is
taken (ids that are numbers, a wrong offset of a text that occurs once); with ``mend`` also what has
a best guess; with ``skip_bad`` what is left is dropped and listed, and without it refused.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_squad.prompts import Record
from llama_squad.sources.formats import InputRow
from llama_squad.sources.records import ID_MADE, TITLE_MADE, Fault, as_text, read_record

ID_NUMBERED = "id: another question had it, a number added (--mend)"
JOINED = "joined to the same question before it, whose answers hold too"


@dataclass(frozen=True)
class Dropped:
    """A question that was left out; ``id`` is "" where it has none."""

    why: str
    file: str
    place: str
    id: str


@dataclass
class Cleaner:
    """Makes records of rows, over all files of a dataset, and keeps account of it."""

    mend: bool = False
    """Take the best guess where there is one (``--mend``)."""
    skip_bad: bool = False
    """Drop what cannot be taken (``--skip_bad``), instead of refusing the file."""
    changed: Counter[str] = field(default_factory=Counter)
    """How questions were changed to be taken → how many of them."""
    first: dict[str, str] = field(default_factory=dict)
    """Kind of change or fault → where it was seen first."""
    dropped: list[Dropped] = field(default_factory=list)
    _files: dict[str, Path] = field(default_factory=dict)
    _ids: dict[str, tuple[str, Record]] = field(default_factory=dict)
    _numbers: Counter[str] = field(default_factory=Counter)
    _unnamed: dict[tuple[str, str, str], Record] = field(default_factory=dict)
    _named: dict[tuple[str, str, str], tuple[str, Record]] = field(default_factory=dict)

    def clean(
        self, rows: Iterable[InputRow], file: str, split: str, name: str = ""
    ) -> list[Record]:
        """Return the records of one file.

        Args:
            rows: its rows.
            file: what messages and the list of dropped questions call it.
            split: the split that it is part of: no id may be in two splits.
            name: what ids and titles that are made begin with (default: ``file``).

        Raises:
            ValueError: questions cannot be taken and ``skip_bad`` is not set: every kind, how
                many, the first of each, and the flags that help; or no question is left.
        """
        records: list[Record] = []
        faults: Counter[str] = Counter()
        mendable = 0
        titles: dict[str, str] = {}
        for row in rows:
            try:
                record, changes = read_record(row, name or file, titles, self.mend)
                is_new = self._settle(record, split, changes)
            except Fault as fault:
                key, why = as_text(row.values.get("id")) or "", str(fault)
                faults[why] += 1
                mendable += fault.mendable
                where = f"{file}, {row.place}" + (f", id {key!r}" if key else "")
                self.first.setdefault(why, where)
                self.dropped.append(Dropped(why, file, row.place, key))
                continue
            if is_new:
                records.append(record)
            for change in changes:
                self.changed[change] += 1
                self.first.setdefault(change, f"{file}, {row.place}")
        kinds = "; ".join(f"{why}: {n:,} (first: {self.first[why]})" for why, n in faults.items())
        if faults and not self.skip_bad:
            cure = _cure(faults.total(), mendable)
            raise ValueError(f"{file}: {kinds}. Nothing was written: {cure}")
        if not records:
            left = f" but what --skip_bad left out ({kinds})" if faults else ""
            raise ValueError(f"{file} holds no questions{left}: name another file, or leave it out")
        return records

    def _settle(self, record: dict[str, Any], split: str, changes: dict[str, None]) -> bool:
        """See to it that the record's id is its own; False where it was joined to another.

        Raises:
            Fault: its id is another's, or the question is there already and says something else.
        """
        if ID_MADE in changes:
            text = (split, record["context"], record["question"])
            owner, twin = split, self._unnamed.setdefault(text, record)
        else:  # by the id that its file gives it, or by one that was made or numbered
            text = (record["id"], record["context"], record["question"])
            found = self._named.get(text) or self._ids.get(record["id"])
            owner, twin = found or (split, record)
        if twin is not record and _same_question(twin, record):
            if owner != split:
                raise Fault(
                    f"it is in the {owner} split too, same id and text (name another file for one)"
                )
            _join(twin, record)
            self._named.setdefault(text, (owner, twin))
            for change in (ID_MADE, TITLE_MADE):
                changes.pop(change, None)
            changes[JOINED] = None
            return False
        if twin is not record:
            if not self.mend:
                where = "" if owner == split else f" of the {owner} split"
                raise Fault(
                    f"another question{where} has its id (--mend adds a number)", mendable=True
                )
            changes[ID_NUMBERED] = None
        record["id"] = self._free_id(record["id"])
        self._ids[record["id"]] = self._named[text] = (split, record)
        return True

    def _free_id(self, key: str) -> str:
        if key not in self._ids:
            return key
        number = self._numbers[key] + 2
        while f"{key}-{number}" in self._ids:
            number += 1
        self._numbers[key] = number - 1
        return f"{key}-{number}"

    def name_file(self, path: Path) -> str:
        """Return a short name of a file that no other file of this dataset has."""
        return path.name if self._files.setdefault(path.name, path) == path else str(path)

    def count_dropped(self) -> dict[str, int]:
        """Count the questions that were left out, by kind, the most frequent first."""
        return dict(Counter(dropped.why for dropped in self.dropped).most_common())

    def summary(self, dropped_file: str) -> str:
        """Return what was changed and dropped, a line a kind; "" where nothing was."""
        lines = []
        if self.changed:
            lines.append("Taken with changes (questions):")
            lines += [self._line(change, n) for change, n in self.changed.most_common()]
        if self.dropped:
            lines.append(f"Left out: {len(self.dropped):,}, listed in {dropped_file}:")
            lines += [self._line(why, n) for why, n in self.count_dropped().items()]
        return "\n".join(lines)

    def _line(self, kind: str, number: int) -> str:
        return f"{number:9,}  {kind} (first: {self.first[kind]})"


def _cure(total: int, mendable: int) -> str:
    """Return what the flags would do about questions that cannot be taken."""
    others = "the others" if 0 < mendable < total else "them" if total > 1 else "it"
    mend = f"--mend takes {mendable:,} of these {total:,}, " if mendable else ""
    return f"{mend}--skip_bad leaves {others} out and lists what it left out beside the dataset."


def _same_question(one: Record, other: Record) -> bool:
    return one["context"] == other["context"] and one["question"] == other["question"]


def _join(record: Record, again: Record) -> None:
    """Give a record the answers of another about the same question, once each."""
    answers, more = record["answers"], again["answers"]
    if bool(answers["text"]) != bool(more["text"]):
        raise Fault("it is there before, and only one of the two has an answer")
    for text, start in zip(more["text"], more["answer_start"], strict=True):
        if text not in answers["text"]:
            answers["text"].append(text)
            answers["answer_start"].append(start)
