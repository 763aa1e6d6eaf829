"""What every predictor gives, and how records come to it: by paragraph, a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from llama_squad.decoding.replies import Reply
from llama_squad.prompts import Record


@dataclass(frozen=True)
class Prediction:
    """A record with the model's reply to it."""

    record: Record
    prompt_text: str
    reply: Reply
    failure: str = ""
    """Why there is no reply (the question was refused); "" where there is one."""


def group_paragraphs(records: Sequence[Record]) -> list[list[Record]]:
    """Group records by context, in the order in which the contexts come first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["context"], []).append(record)
    return list(groups.values())


Batch = Sequence[Sequence[Record]]
"""Records by paragraph."""


PARAGRAPH_QUESTIONS = 64
"""A paragraph of more questions is split, whatever the batch size."""


def batch_paragraphs(records: Sequence[Record], batch_size: int) -> Iterator[Batch]:
    """Yield whole paragraphs, as many as hold ``batch_size`` questions, one at least.

    Which questions of a paragraph are answered together does not depend on ``batch_size``: in 16
    bits that would change the answers.
    """
    batch: list[list[Record]] = []
    for group in group_paragraphs(records):
        for start in range(0, len(group), PARAGRAPH_QUESTIONS):
            part = list(group[start : start + PARAGRAPH_QUESTIONS])
            if batch and sum(map(len, batch)) + len(part) > batch_size:
                yield batch
                batch = []
            batch.append(part)
    if batch:
        yield batch


class Predictor(Protocol):
    """Whoever answers records."""

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer the records of several paragraphs, in order."""


@runtime_checkable
class ConcurrentPredictor(Predictor, Protocol):
    """Whoever can answer many records at once, with no need to wait for the rest of a batch."""

    def answer_all(self, records: Sequence[Record]) -> Iterator[list[Prediction]]:
        """Answer records, and yield the predictions as they are known, in whatever order."""
